"""One tiny study for all tests: a phantom of 16 voxels a side that went through every command once."""

import shutil

import pytest

from il_cldm import main, make_phantom
from tests.helpers import run_main

TINY = (
    "--device cpu --num_workers 0 --batch_size 2 --learning_rate 1e-3 --log_every 2 --save_every 3 "
    "--aae_channels 4 --aae_groups 4 --disc_channels 4 8 --aae_steps 12 --aae_val_every 2 "
    "--unet_channels 8 --unet_mults 1 2 --unet_groups 4 --unet_res_blocks 1 --time_dim 16 --ldm_steps 12 "
    "--ldm_val_every 2 --val_steps 3 --ema_start 4 --ema_decay 0.9 --steps 4 --classifier_steps 5 --bootstrap 50"
).split()
README_ORDER = ("train_aae", "test_aae", "enc", "enc_test", "train_ldm", "gen", "evaluate")


def call(root, *args):
    """main.py on the study in `root` with the tiny networks; later options win."""
    run_main(main, "--root", root, *TINY, *args)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """Data alone: 5 training subjects (odd), 1 for validation (fewer than a batch), 3 for testing."""
    root = tmp_path_factory.mktemp("phantom")
    sizes = ("--n_train", 5, "--n_val", 1, "--n_test", 3, "--shape", 16, 16, 16)
    run_main(make_phantom, "--out", root, *sizes)
    return root


@pytest.fixture(scope="session")
def trained(phantom, tmp_path_factory):
    """The phantom after each command of the README, one by one and with nothing done by hand in between."""
    root = tmp_path_factory.mktemp("trained") / "study"
    shutil.copytree(phantom, root)
    for flag in README_ORDER:
        call(root, f"--{flag}")
    return root


@pytest.fixture
def data(phantom, tmp_path):
    """A copy of the untrained phantom."""
    return shutil.copytree(phantom, tmp_path / "study")


@pytest.fixture
def study(trained, tmp_path):
    """A copy of the trained study."""
    return shutil.copytree(trained, tmp_path / "study")
