"""One tiny stroke cohort for all tests: 14 phantoms of 48 x 48 x 8 voxels (4 x 4 x 16 mm), 15 time points."""

import shutil

import pytest

from lapt import make_phantom, preprocessing
from lapt.dataset import Intensity
from tests.helpers import run_main

SHAPE, SPACING_MM, N_CASES = (48, 48, 8), (4.0, 4.0, 16.0), 14


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Folder with raw/ (maps in it), labels/, truth.csv, not to be changed; cases 6 and 12 have no lesion."""
    root = tmp_path_factory.mktemp("cohort")
    run_main(make_phantom, "--out", root, "--shape", *SHAPE, "--n_cases", N_CASES, "--maps", "--num_workers", 1)
    return root


@pytest.fixture(scope="session")
def prepared(cohort, tmp_path_factory):
    """The cohort prepared, not to be changed: 9 patients train, 2 validate, 3 test."""
    folder = tmp_path_factory.mktemp("prepared")
    run_main(preprocessing, "--input_dir", cohort / "raw", "--output_dir", folder, "--val_size", 0.15,
             "--test_size", 0.2, "--num_workers", 1)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def intensity(prepared):
    """Intensities of the prepared cohort, by the training set."""
    return Intensity.of_folder(prepared)


@pytest.fixture
def raw_cases(cohort, tmp_path):
    """A copy of the raw cases 1 to 3 to spoil."""
    for number in (1, 2, 3):
        shutil.copytree(cohort / "raw" / f"case_{number:04d}", tmp_path / "raw" / f"case_{number:04d}")
    return tmp_path / "raw"
