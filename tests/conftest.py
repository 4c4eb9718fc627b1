"""For all tests: one thread, as in the subprocesses that they start, so that results agree bit by bit."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_randomness():
    """Keeps one test's random numbers out of the next."""
    np.random.seed(0)
    torch.manual_seed(0)
