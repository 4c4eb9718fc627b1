"""One tiny cardiac cohort for all tests: three phantoms of four frames, with dense truth."""

import shutil

import pytest
import torch

from common import training
from mgdcr import geometry, make_phantom
from mgdcr.model import DiffAE
from tests.helpers import run_main
from tests.mgdcr import stages

FRAMES, N_SUBJECTS = 4, 3
UNTRAINED = dict(image_size=64, model_channels=8, channel_mult=[1, 2, 2], enc_channel_mult=[1, 2, 2, 2],
                 num_res_blocks=1, enc_num_res_blocks=1, attention_resolutions=[], num_heads=1, embed_channels=16,
                 enc_out_channels=16, resblock_updown=True, dropout=0.0)  # fmt: skip


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


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A small prior of random weights for 64 x 64 pixels, saved as a trained one."""
    torch.manual_seed(0)
    network = DiffAE(**UNTRAINED)
    for parameter in network.parameters():  # layers that start at zero would hide the codes
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("untrained") / "best.ckpt"
    training.save_network(path, "mgdcr diffae", network.state_dict(), UNTRAINED, normaliser={}, split="none")
    return path
