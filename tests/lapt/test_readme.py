"""Fact 22: the commands of lapt/README.md run as they stand, in their order, on a CPU, in a copy of the repository.

Only their size is changed, by words behind them: the tiny networks, two training steps, few cases.
"""

import json
import shutil

import nibabel as nib
import pytest

from tests import readme

TINY = "--preset tiny training.steps=2 --device cpu --num_workers 0".split()
SMALLER = {  # words behind a command, by its script and, of main.py, its configuration
    "make_phantom.py": ["--n_cases", "12", "--num_workers", "1"],
    "preprocessing.py": ["--val_size", "0.15", "--test_size", "0.2", "--num_workers", "1"],
    "vqgan.yaml": TINY,
    "guide.yaml": TINY,
    "ldm.yaml": [*TINY, "diffusion.sample_steps=50"],
    "lapt.yaml": [*TINY, "diffusion.sample_steps=50", "diffusion.floor_steps=2"],
    "ldm3d.yaml": [*TINY, "diffusion.sample_steps=2"],
    "lapt3d.yaml": [*TINY, "diffusion.sample_steps=2", "diffusion.floor_steps=2"],
    "main.py": ["--device", "cpu"],
    "sample.py": ["--device", "cpu"],
    "evaluate.py": ["--device", "cpu"],
}


def smaller(words: list[str]) -> list[str]:
    name = words[0].split("/")[-1]
    config = next((word.split("/")[-1] for word in words if word.endswith(".yaml")), name)
    steps = ["--steps", "2"] if name == "sample.py" and "--steps" not in words else []
    return [*words, *SMALLER.get(config, []), *steps]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, cohort):
    """A copy of what the commands need, a patient's CTP and mask, and a folder of two subjects named as ISLES'24."""
    root = tmp_path_factory.mktemp("repository")
    readme.copy_code("lapt", root)
    for what in ("ctp", "mask"):
        shutil.copy(cohort / f"raw/case_0001/{what}.nii.gz", root)
    for number in (1, 2):
        subject = f"sub-stroke{number:04d}"
        for what, session in (("ctp", 1), ("dwi", 2), ("adc", 2)):
            name = f"{subject}/ses-{session:02d}/{subject}_ses-{session:02d}_space-ncct_{what}.nii.gz"
            path = root / "ISLES24" / "derivatives" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(cohort / f"raw/case_{number:04d}/{what}.nii.gz", path)
    return root


@pytest.mark.slow
def test_commands_run_in_their_order(repository):
    found = readme.commands("lapt")
    scripts = {words[0].removeprefix("lapt/") for words in found}
    assert scripts >= {"make_phantom.py", "preprocessing.py", "main.py", "sample.py", "evaluate.py", "export.py"}
    assert sum(word == "-t" for words in found for word in words) == 6  # every stage
    readme.run([smaller(words) for words in found], repository)
    # what the page promises about them
    runs = repository / "lapt" / "runs"
    for stage in ("vqgan", "ldm", "lapt", "guide", "ldm3d", "lapt3d"):
        assert all((runs / stage / "checkpoints" / f"{name}.ckpt").is_file() for name in ("best", "last")), stage
    assert json.loads((runs / "vqgan" / "config.json").read_text())["project"] == "STUDY"
    assert (runs / "lapt/samples/50/evaluation/evaluation.json").is_file()  # the test pass
    assert "synthetic_minus_baseline" in json.loads((runs / "comparison/evaluation.json").read_text())
    sampled = list((repository / "OUT").glob("*/adc_sample_*.nii.gz"))
    assert len(sampled) == 5 and nib.load(sampled[0]).shape == nib.load(repository / "mask.nii.gz").shape
    assert (repository / "lapt.ckpt").is_file() and (repository / "cases.csv").is_file()
