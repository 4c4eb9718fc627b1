"""One tiny longitudinal study for all tests: 16 subjects, 3 sessions, 16 x 20 x 16 voxels of 12 mm."""

import shutil

import pytest

from ldae import make_phantom
from ldae.preprocess import Preparation
from tests.helpers import run_main

SHAPE, SPACING_MM = (16, 20, 16), 12.0


@pytest.fixture(scope="session")
def prep():
    """Preparation of the tiny volumes: no resampling, no crop."""
    return Preparation(shape=SHAPE, spacing_mm=SPACING_MM)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Study folder with data/ alone, not to be changed: 16 subjects x months 0, 6, 12 (CN 6, AD 5, MCI 5)."""
    root = tmp_path_factory.mktemp("cohort")
    run_main(make_phantom, "--out", root, "--shape", *SHAPE, "--n_subjects", 16)
    return root


@pytest.fixture
def study(cohort, tmp_path):
    """A copy of the cohort to work in."""
    return shutil.copytree(cohort, tmp_path / "study")
