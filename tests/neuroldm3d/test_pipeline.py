"""The commands of the README in order, as a user runs them, and what they leave on disk (specification, section 11)."""

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common import nifti
from neuroldm3d import dataset, prepare_nii, preprocess
from neuroldm3d.diffusion import memorisation
from neuroldm3d.preprocess import Preparation
from neuroldm3d.VAE import generate_synthetic_samples, infer
from tests.helpers import ROOT, run_main, run_script
from tests.neuroldm3d.stages import COMMON, TINY_DIT, TINY_VAE

pytestmark = pytest.mark.slow
TINY_CLASSIFIER = (
    "--preset smoke --shape 16 20 16 --crop_start 10 --filters 4 8 --batch_size 4 --epochs 1 --steps_per_epoch 2 "
    "--bootstrap 20 --log_every 1"
).split()
PREP = Preparation(shape=(16, 20, 16), crop_start=10)
COMMANDS = [  # fact 40: script, options
    ("audit", ["--csv", "{root}/data_csvs/master.csv"]),
    (
        "data_split",
        [
            "--csv",
            "{root}/data_csvs/master.csv",
            "--held_out_fraction",
            "0.45",
            "--selection_fraction",
            "0.45",
            "--salt",
            "secret",
        ],
    ),  # fmt: skip  # noqa: E501
    ("VAE/train", TINY_VAE),
    ("VAE/save_latent", []),
    ("diffusion/train", TINY_DIT),
    ("diffusion/save_synth", ["--n_per_class", "4", "--steps", "4"]),
    ("diffusion/per_slice_fid", ["--preset", "smoke", "--bootstrap", "2"]),
    ("classifier/train", [*TINY_CLASSIFIER, "--num_synth_samples", "8"]),
    ("classifier/generate_saliency_maps", ["--max_samples", "3", "--sanity_samples", "1", "--key_slices", "4", "8"]),
]
REPORTS = (
    "data_csvs/audit.json data_csvs/split.json runs/vae/config.json runs/vae/manifest.json runs/vae/log.jsonl "
    "latent_data/latents.json runs/dit/config.json runs/dit/log.jsonl synthetic_data/synthetic.json "
    "fid_results/fid_results.json fid_results/fid_summary.txt fid_results/per_slice_fids.png "
    "runs/classifier/exp_1/all_folds_metrics.json runs/classifier/exp_1/parameters.json "
    "runs/classifier/exp_1/fold_1/individual_test_performance.csv runs/classifier/exp_1/saliency/saliency.json "
    "runs/classifier/exp_1/saliency/attribution_statistics.csv"
).split()


@pytest.fixture(scope="module")
def done(cohort, tmp_path_factory):
    """A study after all commands; they ran in an empty folder, which must stay empty."""
    root, elsewhere = tmp_path_factory.mktemp("pipeline") / "study", tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(cohort, root)
    for split in ("train", "val", "test"):
        (root / "data_csvs" / f"{split}.csv").unlink()  # data_split.py makes them
    for script, options in COMMANDS:
        options = [option.replace("{root}", str(root)) for option in options]
        command = [f"neuroldm3d/{script}.py", "--root", root, *COMMON, *options]
        ended = run_script(command, cwd=elsewhere, env={"OMP_NUM_THREADS": "1"})
        assert ended.returncode == 0, f"{script}\n{ended.stdout}\n{ended.stderr}"
    assert not any(elsewhere.iterdir())
    # What fact 40 does not name, for the facts about files.
    run_main(infer, "--root", root, *COMMON, "--max_files", 2)
    run_main(generate_synthetic_samples, "--root", root, *COMMON, "--n_samples", 2)
    run_main(memorisation, "--root", root, *COMMON, "--top_pairs", 1, "--ms_ssim_pairs", 1)
    run_main(prepare_nii, "--root", root, "--per_class", 2)
    return root


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read(root, name):
    return json.loads((root / name).read_text())


def test_every_stage_leaves_its_report(done):
    """Fact 40: audit, split, VAE, latents, DiT, 8 samples, FID, classifier, saliency, by the scripts alone."""
    assert [name for name in REPORTS if not (done / name).is_file() or not (done / name).stat().st_size] == []
    assert not list(done.rglob(".*.tmp"))
    samples = sorted(p.name for p in (done / "synthetic_data").rglob("*.nii.gz"))
    assert samples == [f"{name}_{i:05d}.nii.gz" for name in dataset.CLASSES for i in range(4)]
    fid = read(done, "fid_results/fid_results.json")
    assert fid["n"] >= 3 and fid["features"]["name"] == "random" and "baseline" in fid["overall"] and fid["warnings"]
    metrics = read(done, "runs/classifier/exp_1/all_folds_metrics.json")
    assert metrics["mode"] == "mixed" and metrics["n_test"] == len(rows(done / "data_csvs/test.csv"))
    assert len(rows(done / "runs/classifier/exp_1/saliency/attribution_statistics.csv")[0]) == 13


def test_every_output_names_the_code_that_made_it(done):
    """A commit, or null outside a clone; and where weights made it, their hash."""
    names = ("data_csvs/split.json runs/vae/manifest.json latent_data/latents.json runs/dit/manifest.json "
             "synthetic_data/synthetic.json fid_results/fid_results.json memorisation_results/summary.json "
             "reconstructions/summary_metrics.json reconstructions/reconstructions.json vae_prior/synthetic.json "
             "runs/classifier/exp_1/parameters.json runs/classifier/exp_1/saliency/saliency.json").split()  # fmt: skip
    found = {name: read(done, name) for name in names}
    assert [name for name in names if not (found[name]["git_revision"] or not (ROOT / ".git").exists())] == []
    vae, dit = (torch.load(done / path, weights_only=True)["hash"] for path in
                ("runs/vae/best_vae.pth", "runs/dit/epoch_best.pth"))  # fmt: skip
    made_with = {name: found[name].get("vae") for name in ("latent_data/latents.json", "synthetic_data/synthetic.json",
                 "vae_prior/synthetic.json", "memorisation_results/summary.json")}  # fmt: skip
    assert set(made_with.values()) == {vae} and found["synthetic_data/synthetic.json"]["dit"] == dit


def test_the_tables_share_nobody(done):
    """Facts 9 and 39: the split by data_split.py is what the stages used; its ids are hashes."""
    split = {name: rows(done / f"data_csvs/{name}.csv") for name in ("train", "val", "test")}
    subjects = [row["sbj_nme"] for part in split.values() for row in part]
    assert len(set(subjects)) == len(subjects) == 24 and not any("sub-" in subject for subject in subjects)
    latents = read(done, "latent_data/latents.json")["splits"]
    for name in ("train", "val"):
        assert latents[name]["names"] == [dataset.stem(row["file"]) for row in split[name]]
    used = read(done, "runs/classifier/exp_1/fold_1/files.json")
    names = {part: {dataset.stem(file) for file in used[part]} for part in ("train_real", "validation", "test")}
    assert names["train_real"] == set(latents["train"]["names"]) and names["validation"] == set(latents["val"]["names"])
    assert names["test"] == {dataset.stem(row["file"]) for row in split["test"]}
    explained = read(done, "runs/classifier/exp_1/saliency/saliency.json")["subjects"]
    assert len(explained) == 3 and set(explained) <= names["test"]


def test_outputs_overlay_on_their_inputs(done):
    """Samples, reconstructions and readers' volumes lie on the prepared grid, saliency maps on that of the file."""
    row = rows(done / "data_csvs/train.csv")[0]
    volume = nifti.load(done / "data_csvs" / row["file"])
    data, affine = nifti.reorient(volume.data, volume.affine, preprocess.AXES)
    grid = preprocess.prepared_affine(affine, data.shape, PREP)
    made = [*(done / "synthetic_data").rglob("*.nii.gz"), *(done / "reconstructions").glob("*.nii.gz")]
    made += [*(done / "vae_prior").rglob("*.nii.gz"), *(done / "nii_test").glob("*.nii")]
    assert len(made) == 8 + 6 + 4 + 8
    for path in made:
        image = nib.load(path)
        assert image.shape == PREP.shape and np.isfinite(image.get_fdata()).all()
        np.testing.assert_allclose(image.affine, grid, atol=1e-3)
        assert image.header["qform_code"] > 0 and image.header["sform_code"] > 0
        assert image.header.get_xyzt_units()[0] == "mm"
    maps = sorted((done / "runs/classifier/exp_1/saliency").rglob("*_attributions.nii.gz"))
    assert len(maps) == 3 * 4
    for path in maps:
        image, source = nib.load(path), nib.load(done / "data/gm" / f"{path.parent.name}.nii.gz")
        assert image.shape == source.shape and np.abs(image.get_fdata()).max() > 0
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)


def test_no_pickle_is_written(done):
    """Fact 38: arrays load without pickle, checkpoints as tensors and plain values."""
    found = [p for p in done.rglob("*") if p.is_file() and not {"cache", "tensorboard"} & set(p.parts)]
    known = set(".csv .gz .json .jsonl .nii .npy .npz .png .pt .pth .txt".split())
    assert {p.suffix for p in found} <= known
    for path in found:
        if path.suffix in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
            for name in getattr(loaded, "files", ()):
                assert loaded[name].dtype != object
        elif path.suffix in (".pt", ".pth"):
            assert torch.load(path, weights_only=True)


def strings(value):
    if isinstance(value, dict):
        return [s for pair in value.items() for part in pair for s in strings(part)]
    if isinstance(value, list):
        return [s for part in value for s in strings(part)]
    return [value] if isinstance(value, str) else []


def test_no_absolute_path_is_recorded(done):
    """Fact 39, though every command was given absolute paths."""
    found = {}
    for path in (p for p in done.rglob("*") if p.suffix in (".json", ".jsonl", ".csv", ".txt")):
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                words = [cell for line in csv.reader(file) for cell in line]
        elif path.suffix == ".txt":
            words = path.read_text().split()
        else:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            content = [json.loads(line) for line in lines]
            words = strings(content)
        bad = [w for w in words if os.path.isabs(w) or str(done) in w or str(ROOT) in w or str(Path.home()) + "/" in w]
        if bad:
            found[str(path.relative_to(done))] = bad[:3]
    assert found == {}


def test_the_same_commands_again_change_no_volume(done):
    """Training says that it is complete, sampling that nothing is new; results are not replaced unasked."""
    kinds = ("*.nii.gz", "*.pth", "*.npz")
    before = {p: p.stat().st_mtime_ns for kind in kinds for p in done.rglob(kind)}
    again = {"VAE/train": (0, "VAE is complete"), "diffusion/save_synth": (0, "(0 new"),
             "diffusion/per_slice_fid": (2, "--overwrite"), "data_split": (2, "--overwrite")}  # fmt: skip
    for script, options in COMMANDS:
        if script in again:
            options = [option.replace("{root}", str(done)) for option in options]
            ended = run_script([f"neuroldm3d/{script}.py", "--root", done, *COMMON, *options])
            status, words = again[script]
            assert ended.returncode == status and words in ended.stdout + ended.stderr, script
    assert {p: p.stat().st_mtime_ns for kind in kinds for p in done.rglob(kind)} == before
