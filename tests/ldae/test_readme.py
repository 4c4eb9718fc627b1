"""Fact 38: the commands of ldae/README.md run as they stand, in their order, on a CPU, in a copy of the repository.

Only their size is changed, by words behind them: the tiny networks, few steps, few scans.
"""

import json
import shutil

import nibabel as nib
import pytest

from ldae import dataset
from tests import readme
from tests.ldae import stages, test_supervised
from tests.ldae.conftest import SHAPE
from tests.ldae.test_upstream import stage_3, write_original

STAGE = [*stages.COMMON, *stages.VOLUME, *stages.LOOP]
SUPERVISED = [*stages.COMMON, *test_supervised.TINY, "--steps", "2"]
SMALLER = {  # words behind a command, by its script and, of run_cli.py, its configuration
    "make_phantom.py": ["--shape", *map(str, SHAPE), "--n_subjects", "12", "--num_workers", "1"],
    "check.py": stages.VOLUME,
    **{f"{stage}.yaml": [*STAGE, *stages.TINY[stage]] for stage in stages.STAGES},
    "classification.yaml": SUPERVISED,
    "regression.yaml": SUPERVISED,
    "save_compressed_latent.py": stages.COMMON,
    "save_semantic_latent.py": stages.COMMON,
    "train_manipulation.py": "--repeats 1 --permutations 2 --bootstrap 50 --strengths 0.1".split(),
    "reconstruction_table.py": [*stages.COMMON, *"--table_steps 2 3 --max_scans 1".split()],
    "interpolation_evaluation.py": [*stages.COMMON, *"--steps 2 --max_subjects 1".split()],
    "generate.py": [*stages.COMMON, "--steps", "2"],
    "train_code_prior.py": "--device cpu --width 8 --layers 1 --batch_size 8 --steps 4 --val_every 4".split(),
    "slice_attention.py": [*stages.COMMON, *"--max_scans 2 --n_single 1".split()],
    "benchmark.py": "--device cpu --preset tiny --measure passes --repeats 1 --steps 2".split(),
    "compare.py": [],
    "save_model_weights.py": [],
    "import_weights.py": [],
}


def smaller(words: list[str]) -> list[str]:
    name = words[0].split("/")[-1]
    config = next((word.split("/")[-1] for word in words if word.endswith(".yaml")), name)
    few = ["--n", "1", "--code_steps", "2"] if "synthesize" in words else ["--n", "1"] if "vary" in words else []
    return [*words, *SMALLER[config if name == "run_cli.py" else name], *few]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, cohort):
    """A copy of what the commands need, two volumes to compare, and weights as the original publishes them."""
    root = tmp_path_factory.mktemp("repository")
    readme.copy_code("ldae", root)
    rows = dataset.read_table(cohort / "data" / "dataset.csv")
    for name, row in zip("AB", rows, strict=False):
        shutil.copy(row.path, root / f"{name}.nii.gz")
    write_original(root, stage_3())
    return root


@pytest.mark.slow
def test_commands_run_in_their_order(repository):
    found = readme.commands("ldae")
    assert {words[0].split("/")[-1] for words in found} == {name for name in SMALLER if name[-3:] == ".py"} | {
        "run_cli.py"}  # fmt: skip
    assert {word.split("/")[-1] for words in found for word in words if word.endswith(".yaml")} == {
        f"{stage}.yaml" for stage in (*stages.STAGES, *test_supervised.STAGES)}  # fmt: skip
    readme.run([smaller(words) for words in found], repository)
    # what the page promises about them
    home = repository / "ldae"
    for stage in (*stages.STAGES, *test_supervised.STAGES):
        assert (home / "runs" / stage / "checkpoints" / "best.ckpt").is_file(), stage
    for target in ("diagnosis_AD_vs_CN", "age"):
        record = json.loads((home / "probes" / f"{target}.json").read_text())
        assert set(record["controls"]) == {"untrained", "pooled_latents", "intensity_pca"}, target
    assert json.loads((home / "runs/ldae_repr_learn/test.json").read_text())["gap"]["loss_other"]
    assert (repository / "OUT" / "interpolation.json").is_file()
    for mode in ("reconstruct", "vary", "interpolate", "manipulate", "synthesize"):
        made = sorted((home / "generated" / mode).glob("*.nii.gz"))
        assert made and nib.load(made[0]).shape == SHAPE, mode
        assert all(path.with_name(path.name.replace(".nii.gz", ".json")).is_file() for path in made), mode
    for path in (home / "evaluation/reconstruction/reconstruction_table.md", home / "evaluation/benchmark.json",
                 home / "attention/slice_attention.csv", home / "check/check.json", home / "models/encoder.safetensors",
                 repository / "published.ckpt", repository / "compare.html"):  # fmt: skip
        assert path.is_file(), path
