"""save_semantic_latent.py as a user runs it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from common import checkpoint
from common.cli import UserError
from ldae import codes, data_split
from ldae.scripts import save_semantic_latent
from tests.helpers import run_main, run_script, two_ranks
from tests.ldae.stages import CODE_DIM, best, last, untrained_ldae

COMMON = "--device cpu --num_workers 0".split()


@pytest.fixture(scope="session")
def modelled(cohort, tmp_path_factory):
    """The cohort with a split and an LDAE of random weights that knows it. Not to be changed."""
    root = shutil.copytree(cohort, tmp_path_factory.mktemp("modelled") / "study")
    run_main(data_split, "--root", root)
    untrained_ldae(best(root), split_hash=data_split.read(root / "split.json").hash)
    return root


@pytest.fixture
def study(modelled, tmp_path):
    return shutil.copytree(modelled, tmp_path / "study")


def export(root, *args):
    run_main(save_semantic_latent, "--root", root, *COMMON, *args)


def test_codes_and_controls(study, capsys):
    """Fact 29 from the command line: codes, then every control, over the same scans with the same splits."""
    export(study, "--with_controls")
    found = codes.load(study / "codes")
    assert len(found) == 48 and found.code_dim == CODE_DIM and set(found.column("split")) == {"train", "val", "test"}
    for name in save_semantic_latent.CONTROLS:
        control = codes.load(study / "codes" / "controls" / name)
        assert control.name == name and [r.scan for r in control.rows] == [r.scan for r in found.rows]
        assert control.record["split"] == found.record["split"] and control.hash != found.hash
    assert "48 codes of 16 numbers" in "".join(capsys.readouterr())
    record = json.loads((study / "codes" / "codes.json").read_text())
    assert record["model_name"] == "ldae_repr_learn" and record["table"] == "dataset.csv"


def test_one_control_alone(study):
    export(study, "--control", "untrained", "--seed", 3)
    assert codes.load(study / "codes" / "controls" / "untrained").record["maker"]["seed"] == 3
    assert not (study / "codes" / "codes.npz").exists()


def test_documented_flags(study, tmp_path):
    """Fact 38: --csv_path, --model_path, --config_path, --model_name, --target_model and --suffix of the original."""
    moved = shutil.move(study / "split.json", tmp_path / "our_split.json")
    config = tmp_path / "ldae.yaml"
    config.write_text(f"stage: ldae_repr_learn\npaths:\n  split: {moved}\n  csv_path: nothing.csv\n  cache: none\n")
    export(study, "--csv_path", study / "data" / "dataset.csv", "--model_path", best(study), "--config_path", config,
           "--model_name", "mine", "--target_model", "ema_encoder", "--suffix", "v2")  # fmt: skip
    assert codes.load(study / "codes_v2").record["model_name"] == "mine"
    assert not (study / "data" / "cache").exists()


def test_weights_as_the_optimizer_left_them(study):
    ldae = untrained_ldae(seed=5)
    state = {f"encoder.{k}": v for k, v in ldae.encoder.state_dict().items()}
    checkpoint.save(last(study, "ldae_repr_learn"), {"learned": state | {"estimator.x": torch.zeros(1)}, "step": 1})
    export(study, "--target_model", "encoder")
    export(study)
    raw, averaged = codes.load(study / "codes_encoder"), codes.load(study / "codes")
    assert raw.name == "encoder" and not np.allclose(raw.values, averaged.values)
    assert raw.encoder != averaged.encoder  # directions of these codes are not for the decoder's averaged encoder


def test_import(study, tmp_path):
    content = {"embeddings": torch.randn(3, 4), "labels": torch.tensor([0.0, 1.0, 1.0]), "subject_id": ["a", "b", "c"]}
    torch.save(content, tmp_path / "train.pt")
    args = ["--import_train", tmp_path / "train.pt", "--classes", "AD", "CN", "--output_dir", tmp_path / "old"]
    export(study, *args)
    assert codes.load(tmp_path / "old").column("diagnosis").tolist() == ["AD", "CN", "CN"]
    with pytest.raises(UserError, match="holds codes already: add --overwrite"):
        export(study, *args)


def test_errors(study, tmp_path):
    with pytest.raises(UserError, match="no representation at .*missing.ckpt; train it .* with --model_path"):
        export(study, "--model_path", tmp_path / "missing.ckpt")
    untrained_ldae(tmp_path / "other.ckpt", split_hash="f" * 16)
    with pytest.raises(UserError, match="the model was trained with ffffffffffffffff; name that split"):
        export(study, "--model_path", tmp_path / "other.ckpt")
    (study / "split.json").unlink()
    with pytest.raises(UserError, match="no split .*; name the model's own with --split, or make one"):
        export(study)
    assert not (study / "codes").exists()


def test_help_from_anywhere(tmp_path):
    """Fact 38: --help needs no data and no torch."""
    env = {"PYTHONPROFILEIMPORTTIME": "1"}
    done = run_script(["ldae/scripts/save_semantic_latent.py", "--help"], cwd=tmp_path, env=env)
    assert done.returncode == 0 and "--target_model" in done.stdout and "--control" in done.stdout
    assert re.search(r"\| +argparse$", done.stderr, re.M) and not re.search(r"\| +torch$", done.stderr, re.M)


@pytest.mark.slow
def test_two_ranks_and_a_user_error(study, modelled):
    """Two ranks share the scans and write what one writes; a bad scan ends in one line and status 2, without codes."""
    export(study)
    before = {p.name: p.read_bytes() for p in (study / "codes").iterdir()}
    shutil.rmtree(study / "codes")
    done = two_ranks(["ldae/scripts/save_semantic_latent.py", "--root", study, *COMMON])
    assert done.returncode == 0, done.stderr
    after = {p.name: p.read_bytes() for p in (study / "codes").iterdir()}
    assert after.keys() == before.keys() and after["codes.npz"] == before["codes.npz"]
    assert after["codes.csv"] == before["codes.csv"] and after["codes.json"] == before["codes.json"]

    shutil.rmtree(study / "codes")
    bad = sorted((study / "data").rglob("*.nii.gz"))
    scan = next(path for path in bad if "label" not in str(path))
    scan.write_bytes(scan.read_bytes()[:100])
    done = run_script(["ldae/scripts/save_semantic_latent.py", "--root", study, *COMMON, "--cache", "none"])
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert scan.name in done.stderr and "Traceback" not in done.stderr
    assert not (study / "codes" / "codes.npz").exists()
