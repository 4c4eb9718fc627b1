"""One tiny cardiac cohort for all tests: three phantoms of four frames, with dense truth."""

import shutil

import pytest

from mgdcr import geometry, make_phantom
from tests.helpers import run_main
from tests.mgdcr import stages

FRAMES, N_SUBJECTS = 4, 3


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Folder with subject_001 to subject_003, truth.csv and phantom.json; not to be changed."""
    root = tmp_path_factory.mktemp("mgdcr_cohort")
    run_main(make_phantom, "--out", root / "data", "--n_subjects", N_SUBJECTS, "--frames", FRAMES)
    return root / "data"


@pytest.fixture(scope="session")
def sax(cohort):
    """Short-axis cine of subject 1."""
    return geometry.load_sax(cohort / "subject_001" / "sax.nii.gz")


@pytest.fixture(scope="session")
def dense(cohort):
    """Dense truth of subject 1."""
    return geometry.load_cine(cohort / "subject_001" / "dense.nii.gz")


@pytest.fixture(scope="session")
def views(cohort):
    """Long-axis views of subject 1 by name."""
    return {name: geometry.load_lax(cohort / "subject_001" / f"lax_{name}.nii.gz") for name in make_phantom.VIEWS}


@pytest.fixture
def spoilt(cohort, tmp_path):
    """A copy of subject 1 to spoil."""
    shutil.copytree(cohort / "subject_001", tmp_path / "data" / "subject_001")
    return tmp_path / "data" / "subject_001"


@pytest.fixture(scope="session")
def slices(cohort):
    """Root folder with a store of the cohort's short-axis slices, not to be changed."""
    return stages.write_store(cohort)


@pytest.fixture(scope="session")
def runs(slices):
    """Root folder with a tiny run of every training, not to be changed."""
    return stages.trained(slices)
