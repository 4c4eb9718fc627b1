"""One tiny study for all tests: a phantom of 33 x 41 x 33 voxels, 32 x 40 x 32 after preparation."""

import shutil

import pytest

from neuroldm3d import make_phantom
from neuroldm3d.preprocess import Preparation
from tests.helpers import run_main


@pytest.fixture(scope="session")
def prep():
    """Preparation of the tiny volumes."""
    return Preparation(shape=(32, 40, 32))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Data alone, not to be changed: 12 training, 6 validation, 6 test subjects."""
    root = tmp_path_factory.mktemp("cohort")
    run_main(make_phantom, "--out", root, "--shape", 33, 41, 33, "--n_train", 12, "--n_val", 6, "--n_test", 6)
    return root


@pytest.fixture
def study(cohort, tmp_path):
    """A copy of the cohort to work in."""
    return shutil.copytree(cohort, tmp_path / "study")
