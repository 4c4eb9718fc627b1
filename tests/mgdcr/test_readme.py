"""The commands of mgdcr/README.md run as they stand, in their order, on a CPU, in a copy of the repository.

Only their size is changed, by words behind them: small networks, few steps, two frames, few iterations.
"""

import csv
import json
import shutil

import nibabel as nib
import pytest

from tests import readme
from tests.mgdcr import stages

LOOP = [*stages.LOOP, "--total_samples", "8"]
RECONSTRUCTION = "--steps 2 --iterations 1 --device cpu".split()
WINDOW = ["--image_size", "32"]  # the prior sees the middle of the slices
SMALLER = {  # words behind a command, by its script
    "make_phantom.py": "--n_subjects 3 --frames 2".split(),
    "lmdb_writer.py": [],
    "run_ffhq128.py": [*LOOP, *stages.TINY["autoenc"], *WINDOW],
    "run_ffhq128_ddim.py": [*LOOP, *stages.TINY["ddim"], *WINDOW],
    "encode.py": ["--device", "cpu"],
    "latent_dpm.py": [*LOOP, *stages.TINY["latent_dpm"]],
    "ex8_multi_optimizer.py": RECONSTRUCTION,
    "evaluate.py": ["--mode", "fast", "--iterations", "1", "--device", "cpu"],
}


def smaller(words: list[str]) -> list[str]:
    sampling = ["--n_samples", "2", "--steps", "2"] if "--sample" in words else []
    return [*words, *SMALLER[words[0].split("/")[-1]], *sampling]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, cohort):
    """A copy of what the commands need, and the files of a study of somebody's own."""
    root = tmp_path_factory.mktemp("repository")
    readme.copy_code("mgdcr", root)
    for name in ("sax", "lax_4ch", "lax_2ch"):
        shutil.copy(cohort / "subject_001" / f"{name}.nii.gz", root / f"{name.removeprefix('lax_')}.nii.gz")
    return root


@pytest.mark.slow
def test_commands_run_in_their_order(repository):
    found = readme.commands("mgdcr")
    assert {words[0].split("/")[-1] for words in found} == set(SMALLER)
    readme.run([smaller(words) for words in found], repository)
    # what the page promises about them
    home = repository / "mgdcr"
    checkpoints = home / "checkpoints"
    for stage in ("cardiac_autoenc", "cardiac_ddim", "cardiac_latent_dpm"):
        assert all((checkpoints / stage / f"{name}.ckpt").is_file() for name in ("best", "last")), stage
    assert (checkpoints / "cardiac_autoenc" / "latent.ckpt").is_file()
    split = json.loads((home / "datasets" / "split.json").read_text())
    assert all(len(split[part]) == 1 for part in ("train", "val", "test"))
    frame = home / "results" / "balanced" / "subject_001" / "frame_000"
    names = ("volume.nii.gz", "seed.nii.gz", "decoded.nii.gz", "codes.ckpt", "log.jsonl", "report.json")
    assert all((frame / name).is_file() for name in names)
    assert nib.load(frame / "volume.nii.gz").shape == (64, 64, 81)
    assert (repository / "OUT" / "sax" / "frame_000" / "volume.nii.gz").is_file()
    assert (home / "results" / "fast" / "subject_002" / "frame_000" / "sd.nii.gz").is_file()
    assert (home / "results" / "ex8_multi" / "subject_001" / "frame_000" / "volume.nii.gz").is_file()
    for folder, left_out in (("balanced/evaluation", "between"), ("views", "2ch"), ("slices", "slice_5")):
        rows = list(csv.DictReader((home / "results" / folder / "scores.csv").open()))
        assert {"linear", "ours"} <= {row["method"] for row in rows if row["left_out"] == left_out}, folder
