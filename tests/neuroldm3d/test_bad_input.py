"""What a user can get wrong ends in one `error:` line, status 2, without traceback, and changes no file.

Every entry script against damaged volumes, tables, network files, records, options, full disks and outputs that exist.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch

from common import checkpoint, cli, nifti, tables
from neuroldm3d import audit, data_split, dataset, from_labels, make_phantom, prepare_nii, reproduce
from neuroldm3d.classifier import generate_saliency_maps, run_saliency_generation
from neuroldm3d.classifier import run as classifier_run
from neuroldm3d.classifier import train as classifier_train
from neuroldm3d.diffusion import memorisation, per_slice_fid, per_slice_fid_ignite, save_synth
from neuroldm3d.diffusion import train as dit_train
from neuroldm3d.VAE import generate_synthetic_samples, infer, save_latent
from neuroldm3d.VAE import train as vae_train
from tests.helpers import run_script
from tests.il_cldm.tools import Ended, complaint, files
from tests.neuroldm3d import stages
from tests.neuroldm3d.stages import COMMON, TINY_DIT, TINY_VAE

TINY_CLASSIFIER = (
    "--preset smoke --shape 16 20 16 --crop_start 10 --filters 4 8 --batch_size 4 --epochs 1 --steps_per_epoch 2 "
    "--bootstrap 10 --log_every 1"
).split()
GRID = [*TINY_CLASSIFIER, *"--budgets 8 --shares 0 --equal_size 0 --synthetic_only 0 --seeds 1".split()]
MAPS = "--methods saliency --max_samples 0 --sanity_samples 0 --pictures 0".split()
SAMPLES = "--n_per_class 2 --steps 2".split()
FID = "--preset smoke --bootstrap 0".split()

# Every entry script with options that work on the study.
SCRIPTS = {
    "audit": (audit, ["--report", "{root}/audit.json"]),
    "data_split": (data_split, ["--csv", "{root}/data_csvs/master.csv", "--out", "{root}/split"]),
    "make_phantom": (make_phantom, "--out {root} --shape 17 21 17 --n_train 1 --n_val 1 --n_test 1".split()),
    "from_labels": (from_labels, "--labels {root}/labels --csv {root}/people.csv --out {root}/new".split()),
    "prepare_nii": (prepare_nii, ["--per_class", "2"]),
    "VAE/train": (vae_train, TINY_VAE),
    "VAE/infer": (infer, []),
    "VAE/save_latent": (save_latent, ["--latents", "{root}/new"]),
    "VAE/generate_synthetic_samples": (generate_synthetic_samples, ["--n_samples", "1"]),
    "diffusion/train": (dit_train, TINY_DIT),
    "diffusion/save_synth": (save_synth, [*SAMPLES, "--out", "{root}/new"]),
    "diffusion/per_slice_fid": (per_slice_fid, FID),
    "diffusion/per_slice_fid_ignite": (per_slice_fid_ignite, FID),
    "diffusion/memorisation": (memorisation, ["--top_pairs", "0", "--ms_ssim_pairs", "0"]),
    "classifier/train": (classifier_train, [*TINY_CLASSIFIER, "--exp", "new"]),
    "classifier/run": (classifier_run, GRID),
    "classifier/generate_saliency_maps": (generate_saliency_maps, MAPS),
    "classifier/run_saliency_generation": (run_saliency_generation, MAPS),
    "reproduce": (reproduce, ["--preset", "smoke", "--out", "{root}/reproduced"]),
}
NO_ROOT = ("make_phantom", "from_labels", "reproduce")
# Records that claim an output folder; the same command continues where they are.
CLAIMS = {"audit.json", "latents.json", "reconstructions.json", "saliency.json", "parameters.json"}


def run(name, root, *more) -> Ended:
    """A script of SCRIPTS in this process: exit status and what it printed."""
    module, options = SCRIPTS[name]
    where = [] if name in NO_ROOT else ["--root", root, *COMMON]
    args = [str(a).replace("{root}", str(root)) for a in (*where, *options, *more)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [module.__file__, *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run(module.main)
        except SystemExit as end:
            status = end.code or 0
    return Ended(status, out.getvalue(), err.getvalue())


def refused(root, name, words, *more):
    """The script ends in one line with these words; no file is changed, and at most a claim is new."""
    before = files(root)
    line = complaint(run(name, root, *more))
    assert all(word in line for word in words), line
    after = files(root)
    assert {k: v for k, v in after.items() if k in before} == before, "changed"
    new = {k for k in set(after) - set(before) if Path(k).name not in CLAIMS}
    assert not new, new
    for k in set(after) - set(before):
        (root / k).unlink()


@contextlib.contextmanager
def told(case):
    """Which of several cases failed."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    """A study after every stage."""
    root = tmp_path_factory.mktemp("bad") / "study"
    shutil.copytree(stages.trained(cohort), root)
    (root / "labels").mkdir()
    for path in sorted((root / "data/regions").iterdir())[:2]:
        shutil.copy(path, root / "labels")
    maps = sorted((root / "labels").iterdir())
    people = [f"{path.name.removesuffix('.nii.gz')},{sex}" for path, sex in zip(maps, "FM", strict=True)]
    (root / "people.csv").write_text("\n".join(["MRID,Sex", *people]) + "\n")
    for name, more in (("diffusion/save_synth", ["--out", root / "synthetic_data"]),
                       ("classifier/train", ["--exp", "exp_1"])):  # fmt: skip
        done = run(name, root, *more)
        assert done.status == 0, done.err
    return root


@pytest.fixture
def study(trained, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(trained, tmp_path / "study", ignore=shutil.ignore_patterns("cache", "tensorboard"))


@pytest.fixture
def fresh(study):
    """The same before anything was trained."""
    for name in ("runs", "latent_data", "synthetic_data"):
        shutil.rmtree(study / name)
    return study


# ---- volumes


def listed(root, table) -> list[Path]:
    return [row.file for row in dataset.read_table(root / f"data_csvs/{table}.csv")]


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edited(path, change):
    image = nib.load(path)
    data = np.asarray(image.dataobj).astype(np.float32)
    nib.save(nib.Nifti1Image(np.asarray(change(data), np.float32), image.affine), path)


def one_voxel(value):
    def change(data):
        data[5, 6, 7] = value
        return data

    return change


VOLUMES = {
    "missing file": (lambda p: p.unlink(), ("do not exist",)),
    "truncated": (cut, ("truncated",)),
    "empty file": (lambda p: p.write_bytes(b""), ()),
    "no NIfTI": (lambda p: p.write_text("no volume"), ()),
    "NaN voxel": (lambda p: edited(p, one_voxel(np.nan)), ("NaN",)),
    "Inf voxel": (lambda p: edited(p, one_voxel(np.inf)), ("Inf",)),
    "constant": (lambda p: edited(p, np.zeros_like), ("every voxel is",)),
    "wrong shape": (lambda p: edited(p, lambda x: x[:, :16]), ("shape",)),
    "two dimensions": (lambda p: edited(p, lambda x: x[0]), ("3D",)),
    "scaled by 1000": (lambda p: edited(p, lambda x: 1000 * x), ("grey-matter fraction",)),
}
READERS = [  # script, table whose volumes are bad
    ("audit", "val"), ("data_split", "val"), ("prepare_nii", "test"), ("VAE/train", "train"), ("VAE/train", "val"),
    ("VAE/infer", "val"), ("VAE/save_latent", "train"), ("diffusion/per_slice_fid", "test"),
    ("diffusion/per_slice_fid", "train"), ("diffusion/memorisation", "test"), ("classifier/train", "train"),
    ("classifier/train", "val"), ("classifier/train", "test"), ("classifier/run", "test"),
    ("classifier/generate_saliency_maps", "test"), ("classifier/run_saliency_generation", "test"),
]  # fmt: skip
NOT_SEEN = {  # what only a preparation can tell
    ("audit", "scaled by 1000"), ("data_split", "scaled by 1000"), ("data_split", "wrong shape"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "table"), READERS)
def test_bad_volumes(study, name, table):
    """Fact 5 among them: a constant volume or one with NaN is named."""
    if name == "VAE/train":
        shutil.rmtree(study / "runs/vae")
    paths = listed(study, table)
    originals = {path: path.read_bytes() for path in paths}
    for case, (spoil, words) in VOLUMES.items():
        if (name, case) in NOT_SEEN:
            continue
        for path in paths:
            spoil(path)
        words = ("grid",) if name == "audit" and case == "wrong shape" else words
        with told(case):
            refused(study, name, words)
        for path, content in originals.items():
            path.write_bytes(content)


# ---- tables


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def relabel(path, label):
    """The last row gets another label in the column that is read."""
    columns, rows = dataset.read_csv(path)
    rows[-1][dataset.LABEL_COLUMN] = label
    tables.write_csv(path, rows)


def blank(path):
    _, rows = dataset.read_csv(path)
    tables.write_csv(path, [row | {dataset.LABEL_COLUMN: ""} for row in rows])


def repeat(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")


TABLES = {
    "missing": (lambda p: p.unlink(), ("no table",)),
    "empty": (lambda p: p.write_bytes(b""), ("no rows",)),
    "header only": (lambda p: p.write_text(p.read_text().splitlines()[0] + "\n"), ("no rows",)),
    "no table": (lambda p: p.write_bytes(bytes(range(256)) * 4), ()),
    "no label column": (lambda p: edit(p, f"{dataset.LABEL_COLUMN},", "diagnosis,"), ("no column",)),
    "no file column": (lambda p: edit(p, "sbj_nme,file,", "sbj_nme,path,"), ("no column file",)),
    "unknown label": (lambda p: relabel(p, "hc"), ("'hc'", "HC, left, right")),
    "no labels": (blank, ("no row has a label",)),
    "volume twice": (repeat, ("several rows",)),
    "short row": (lambda p: p.write_text(p.read_text() + "sub-1,x.nii\n"), ("cells",)),
}


TABLE_READERS = [pair for pair in READERS if pair != ("data_split", "val")]
TABLE_READERS += [("data_split", "master"), ("prepare_nii", "train")]


@pytest.mark.parametrize(("name", "table"), TABLE_READERS)
def test_bad_tables(study, name, table):
    """Fact 10 among them: an unknown label is an error, not TLE."""
    if name == "VAE/train":
        shutil.rmtree(study / "runs/vae")
    path = study / f"data_csvs/{table}.csv"
    original = path.read_bytes()
    optional = name in ("audit", "classifier/run_saliency_generation") or (name, table) == ("prepare_nii", "train")
    for case, (spoil, words) in TABLES.items():
        if case == "missing" and optional:
            continue
        spoil(path)
        with told(case):
            refused(study, name, (f"{table}.csv", *words))
        path.write_bytes(original)


def share_a_subject(root, a, b):
    """The last subject of table a gets the id of one of b."""
    _, rows = dataset.read_csv(root / f"data_csvs/{a}.csv")
    rows[-1][dataset.SUBJECT_COLUMN] = dataset.read_csv(root / f"data_csvs/{b}.csv")[1][0][dataset.SUBJECT_COLUMN]
    tables.write_csv(root / f"data_csvs/{a}.csv", rows)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("audit", ("val", "train")),
        ("VAE/train", ("val", "train")),
        ("prepare_nii", ("test", "train")),
        ("classifier/train", ("test", "train")),
        ("classifier/train", ("test", "val")),
        ("classifier/run", ("val", "train")),
    ],
)
def test_a_subject_in_two_tables(study, name, tables):
    share_a_subject(study, *tables)
    refused(study, name, tuple(f"{t}" for t in tables))


# ---- network files


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("was_executed",))


VAE, DIT, CLASSIFIER = "runs/vae/best_vae.pth", "runs/dit/epoch_best.pth", "runs/classifier/exp_1/fold_1/best_model.pth"
WHOLE = ("--features", "classifier", "--weights", "{root}/" + CLASSIFIER)
NETWORKS = [  # script, file, its other kind, options
    ("VAE/infer", VAE, DIT, ()),
    ("VAE/save_latent", VAE, CLASSIFIER, ()),
    ("VAE/generate_synthetic_samples", VAE, DIT, ()),
    ("VAE/train", VAE, DIT, ("--init", "{root}/" + VAE, "--run", "{root}/runs/new")),
    ("diffusion/train", VAE, DIT, ("--sample_every", 1, "--experiment_name", "new")),
    ("diffusion/save_synth", VAE, DIT, ()),
    ("diffusion/save_synth", DIT, VAE, ()),
    ("diffusion/memorisation", VAE, DIT, ()),
    ("diffusion/memorisation", CLASSIFIER, VAE, WHOLE),
    ("diffusion/per_slice_fid", CLASSIFIER, VAE, WHOLE),
    ("classifier/generate_saliency_maps", CLASSIFIER, VAE, ()),
    ("classifier/run_saliency_generation", CLASSIFIER, DIT, ()),
]


def other_widths(path):
    saved = torch.load(path, weights_only=True)
    name = next(n for n, v in saved["state_dict"].items() if v.ndim > 2 and min(v.shape[:2]) > 1)
    saved["state_dict"][name] = saved["state_dict"][name][:1, :1]
    torch.save(saved, path)


DAMAGE = {
    "missing": lambda p, other: p.unlink(),
    "truncated": lambda p, other: cut(p, 0.9),
    "empty": lambda p, other: p.write_bytes(b""),
    "another network": lambda p, other: shutil.copy(other, p),
    "other widths": lambda p, other: other_widths(p),
    "no network": lambda p, other: torch.save({"weight": torch.zeros(3)}, p),
    "a list": lambda p, other: torch.save([1, 2], p),
    "pickled": lambda p, other: torch.save({"state_dict": Malicious()}, p),
    "plain pickle": lambda p, other: p.write_bytes(pickle.dumps(Malicious())),
}


@pytest.mark.parametrize(("name", "file", "other", "options"), NETWORKS)
def test_network_files(study, monkeypatch, name, file, other, options):
    """Fact 38 among them: nothing in a pickled file runs unless it is trusted."""
    monkeypatch.chdir(study)
    original = (study / file).read_bytes()
    for case, spoil in DAMAGE.items():
        if (case, name) == ("missing", "classifier/run_saliency_generation"):
            continue  # looks for whatever folds are there
        spoil(study / file, study / other)
        words = {"pickled": ("--trust_pickle",)}.get(case, ())
        if "weights" in " ".join(map(str, options)) and case == "pickled":
            words = ("pickled",)
        with told(case):
            refused(study, name, (Path(file).name, *words), *options)
        (study / file).write_bytes(original)
        assert not (study / "was_executed").exists(), case


LAST = {
    "VAE/train": "runs/vae/checkpoints/last.pt",
    "diffusion/train": "runs/dit/checkpoints/last.pt",
}


@pytest.mark.parametrize("name", LAST)
def test_a_damaged_last_checkpoint_is_not_trained_over(study, name):
    last = study / LAST[name]
    for spoil in (cut, lambda p: p.write_bytes(pickle.dumps(Malicious())), lambda p: torch.save({"step": 1}, p)):
        spoil(last)
        refused(study, name, ("last.pt",))


def test_a_refused_classifier_run_keeps_its_record(study):
    """A damaged last.pt, or other options: neither weights nor the record of what was trained change."""
    shutil.copytree(study / "runs/classifier/exp_1", study / "runs/classifier/new")
    refused(study, "classifier/train", ("learning_rate",), "--learning_rate", 0.5)
    cut(study / "runs/classifier/new/fold_1/checkpoints/last.pt")
    refused(study, "classifier/train", ("last.pt",))


def test_networks_that_do_not_belong_together(study):
    saved = checkpoint.load(study / DIT)
    checkpoint.save(study / DIT, saved | {"vae": "0" * 16})
    refused(study, "diffusion/save_synth", ("0" * 16, "matching pair"))
    edit(study / "latent_data/latents.json", saved["vae"], "1" * 16)
    refused(study, "VAE/generate_synthetic_samples", ("1" * 16,))
    refused(study, "diffusion/memorisation", ("another VAE",))
    refused(study, "diffusion/train", ("1" * 16,), "--sample_every", 1, "--experiment_name", "new")
    refused(study, "VAE/save_latent", ("another VAE", "--overwrite"), "--latents", "{root}/latent_data")


# ---- latents, samples, records


def spoilt_latents(path):
    """{case: what does it} for one file of save_latent.py."""
    with np.load(path) as arrays:
        kept = dict(arrays)
    small = {"mu": kept["mu"][:, 1:], "logvar": kept["logvar"][:, 1:]}
    return {
        "missing": path.unlink,
        "truncated": lambda: cut(path),
        "empty": lambda: path.write_bytes(b""),
        "entries": lambda: np.savez(path, mu=kept["mu"]),
        "shape": lambda: np.savez(path, **(kept | small)),
        "pickled": lambda: np.savez(path, **(kept | {"mu": np.array([Malicious()], object)})),
    }


def test_latents(study, monkeypatch):
    monkeypatch.chdir(study)
    shutil.rmtree(study / "runs/dit")
    for split in ("train", "val"):
        path = sorted((study / "latent_data" / split).glob("*.npz"))[0]
        original = path.read_bytes()
        for case, spoil in spoilt_latents(path).items():
            spoil()
            with told(f"{split}, {case}"):
                refused(study, "diffusion/train", (path.name, "save_latent.py"))
            path.write_bytes(original)
    assert not (study / "was_executed").exists()
    shutil.rmtree(study / "latent_data")
    refused(study, "diffusion/train", ("latent_data", "save_latent.py"))
    refused(study, "VAE/generate_synthetic_samples", ("latent_data", "save_latent.py"))


RECORDS = {
    "latent_data/latents.json": (
        ("diffusion/train", ("--experiment_name", "new")), ("diffusion/memorisation", ()),
        ("VAE/generate_synthetic_samples", ()), ("VAE/save_latent", ("--latents", "{root}/latent_data")),
    ),
    "synthetic_data/synthetic.json": (
        ("prepare_nii", ()), ("diffusion/per_slice_fid", ()), ("diffusion/memorisation", ()),
        ("diffusion/save_synth", ("--out", "{root}/synthetic_data")),
        ("classifier/train", ("--num_synth_samples", 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("content", ["{", "[]", "{}", ""])
def test_damaged_records(study, record, content):
    (study / record).write_text(content)
    for name, options in RECORDS[record]:
        with told(name):
            refused(study, name, (Path(record).name,), *options)


def test_synthetic_volumes(study):
    """Missing, of one class, damaged, or of another preparation than the network's."""
    folder = study / "synthetic_data"
    users = (("prepare_nii", ()), ("diffusion/per_slice_fid", ()), ("diffusion/memorisation", ()),
             ("classifier/train", ("--num_synth_samples", 4)))  # fmt: skip
    originals = {p: p.read_bytes() for p in folder.rglob("*.nii.gz")}
    for case, spoil in {
        "truncated": cut,
        "NaN voxel": lambda p: edited(p, one_voxel(np.nan)),
        "wrong shape": lambda p: edited(p, lambda x: x[:, :16]),
        "missing": lambda p: p.unlink(),
    }.items():
        for path in originals:
            spoil(path)
        for name, options in users:
            with told(f"{case}, {name}"):
                refused(study, name, (), *options)
        for path, content in originals.items():
            path.write_bytes(content)
    edit(folder / "synthetic.json", '"norm_scale": 0.25', '"norm_scale": 0.5')
    for name, options in (users[2], users[3]):
        refused(study, name, ("norm_scale=0.5",), *options)


# ---- label maps of real T1


def test_from_labels(study):
    people, labels = study / "people.csv", sorted((study / "labels").iterdir())
    refused(study, "from_labels", ("MUSE",))  # the phantom's codes are not MUSE's
    cases = {
        "no label map": lambda: [p.unlink() for p in labels],
        "truncated": lambda: cut(labels[0]),
        "fractions": lambda: edited(labels[0], lambda x: x + 0.5),
        "empty map": lambda: edited(labels[0], np.zeros_like),
        "no table": people.unlink,
        "empty table": lambda: people.write_text(""),
        "other columns": lambda: edit(people, "MRID", "id"),
        "other values": lambda: edit(people, ",M", ",F"),
        "unknown people": lambda: people.write_text("MRID,Sex\nnobody,F\nno one,M\n"),
        "one person twice": lambda: people.write_text(people.read_text() + people.read_text().splitlines()[1] + "\n"),
    }
    originals = {p: p.read_bytes() for p in (people, *labels)}
    for case, spoil in cases.items():
        spoil()
        with told(case):
            refused(study, "from_labels", ())
        for path, content in originals.items():
            path.write_bytes(content)
    refused(study, "from_labels", ("'F'", "number"), "--threshold", 50)
    refused(study, "from_labels", ("two different values",), "--classes", "F", "F")
    refused(study, "from_labels", ("--out", "--overwrite"), "--out", study)


# ---- options


@pytest.mark.parametrize("name", SCRIPTS)
def test_options(study, name):
    for args, words in ((("--no_such_option", 1), "--no_such_option"), (("--seed", "two"), "--seed: expected int"),
                        (("--seed",), "--seed"), (("--config", study / "nowhere.json"), "nowhere.json"),
                        (("--set", "no_such=1"), "unknown option no_such"), (("stray",), "stray"),
                        (("--precision", "fp8"), "--precision: 'fp8'")):  # fmt: skip
        refused(study, name, (words,), *args)
    if name not in ("audit", "data_split", "make_phantom", "from_labels", "prepare_nii"):
        refused(study, name, ("gpu",), "--device", "gpu")


VALUES = [
    ("audit", ("--threshold", -1), "--threshold"),
    ("audit", ("--allow", "everything"), "--allow"),
    ("data_split", ("--held_out_fraction", 2), "held_out_fraction"),
    ("data_split", ("--duplicates", "keep"), "--duplicates"),
    ("make_phantom", ("--n_train", 0), "--n_train"),
    ("make_phantom", ("--shape", 1, 1, 1), "--shape"),
    ("make_phantom", ("--shape", 33, 41), "--shape: expected 3"),
    ("from_labels", ("--shape", 1, 1, 1), "--shape"),
    ("prepare_nii", ("--per_class", 0), "--per_class"),
    ("prepare_nii", ("--per_class", 500), "500"),
    ("VAE/train", ("--preset", "large"), "--preset"),
    ("VAE/train", ("--batch_size", 0), "--batch_size"),
    ("VAE/train", ("--shape", 17, 20, 16), "--shape"),
    ("VAE/train", ("--norm_groups", 3), "--norm_groups"),
    ("VAE/train", ("--recon_loss", "l3"), "--recon_loss"),
    ("VAE/train", ("--lambda_lpips", 0.6, "--run", "{root}/runs/new"), "lpips"),
    ("VAE/infer", ("--max_files", -1), "--max_files"),
    ("VAE/infer", ("--latent", "median"), "--latent"),
    ("VAE/infer", ("--lpips_weights", "{root}/nowhere.pth"), "nowhere.pth"),
    ("VAE/infer", ("--lpips_weights", "{root}/" + VAE), "best_vae.pth"),
    ("VAE/infer", ("--regions", "{root}/nowhere"), "nowhere"),
    ("VAE/save_latent", ("--splits", "all"), "--splits"),
    ("VAE/save_latent", ("--pickles", "{root}"), "--trust_pickle"),
    ("VAE/save_latent", ("--pickles", "{root}", "--trust_pickle"), "_latent.pkl"),
    ("VAE/generate_synthetic_samples", ("--n_samples", 0), "--n_samples"),
    ("diffusion/train", ("--model_type", "DiT-H/14"), "--model_type"),
    ("diffusion/train", ("--patch_size", 2, 2), "--patch_size"),
    ("diffusion/train", ("--patch_size", 3, 3, 3, "--experiment_name", "new"), "patch"),
    ("diffusion/train", ("--label_dropout", 1), "--label_dropout"),
    ("diffusion/train", ("--num_heads", 5, "--experiment_name", "new"), "heads"),
    ("diffusion/save_synth", ("--n_per_class", 0), "--n_per_class"),
    ("diffusion/save_synth", ("--sampler", "dpmm"), "did you mean dpm"),
    ("diffusion/save_synth", ("--steps", -1), "--steps"),
    ("diffusion/save_synth", ("--steps", 5000), "5000"),
    ("diffusion/save_synth", ("--pickles", "{root}"), "--trust_pickle"),
    ("diffusion/save_synth", ("--pickles", "{root}", "--trust_pickle"), "*.pkl"),
    ("diffusion/per_slice_fid", ("--features", "vgg"), "--features"),
    ("diffusion/per_slice_fid", ("--features", "inception"), "--weights"),
    ("diffusion/per_slice_fid", ("--batch_size", 0), "--batch_size"),
    ("diffusion/memorisation", ("--features", "medicalnet"), "resnet"),
    ("classifier/train", ("--batch_size", 3), "even"),
    ("classifier/train", ("--batch_size", 64), "batch"),
    ("classifier/train", ("--folds", 1), "--folds"),
    ("classifier/train", ("--folds", 50), "50 folds"),
    ("classifier/train", ("--num_samples", 500), "500"),
    ("classifier/train", ("--num_samples", 0), "--num_samples"),
    ("classifier/train", ("--num_synth_samples", 500), "HC volumes asked for"),
    ("classifier/train", ("--model", "4d"), "--model"),
    ("classifier/run", ("--part", "3/2"), "--part"),
    ("classifier/run", ("--budgets", 500), "500"),
    ("classifier/run", ("--seeds", 1, 1), "--seeds"),
    ("classifier/generate_saliency_maps", ("--methods", "deeplift"), "deeplift"),
    ("classifier/generate_saliency_maps", ("--key_slices", 99), "--key_slices"),
    ("classifier/generate_saliency_maps", ("--target_regions", "amygdala"), "amygdala"),
    ("classifier/run_saliency_generation", ("--exp", "nothing"), "nothing"),
    ("reproduce", ("--preset", "large"), "--preset"),
]  # fmt: skip


def test_values(study):
    for name, args, words in VALUES:
        with told(f"{name} {args}"):
            refused(study, name, (words,), *args)


# ---- outputs that exist


def test_outputs_that_exist(study):
    """The same command again may continue; another one is refused with the difference, or asks for --overwrite."""
    again = {  # script: options of the second command, words
        "audit": ((), "--overwrite"),
        "data_split": ((), "--overwrite"),
        "prepare_nii": ((), "there already"),
        "diffusion/per_slice_fid": ((), "--overwrite"),
        "diffusion/memorisation": ((), "--overwrite"),
        "VAE/infer": (("--latent", "sample"), "--overwrite"),
        "VAE/generate_synthetic_samples": (("--seed", 1), "--overwrite"),
        "diffusion/save_synth": (("--steps", 3), "--overwrite"),
        "classifier/generate_saliency_maps": (("--seed", 1), "--overwrite"),
        "VAE/train": (("--vae_lr", 0.5), "vae_lr"),
        "diffusion/train": (("--lr", 0.5), "lr"),
    }
    split = ("--held_out_fraction", 0.45, "--selection_fraction", 0.45)
    for name, (options, words) in again.items():
        first = split if name == "data_split" else ()
        done = run(name, study, *first)
        assert done.status == 0, f"{name}: {done.err}"
        with told(name):
            refused(study, name, (words,), *first, *options)
    refused(study, "make_phantom", ("--overwrite",))


def test_files_of_others_are_not_replaced(study):
    """A volume, a latent or weights that no script here has written."""
    foreign = (
        ("new/HC/HC_00000.nii.gz", "diffusion/save_synth"),
        ("vae_prior/unscaled/synthetic_sample_0000.nii.gz", "VAE/generate_synthetic_samples"),
        (f"new/train/{listed(study, 'train')[0].name.removesuffix('.nii.gz')}_latent.npz", "VAE/save_latent"),
        (f"reconstructions/{listed(study, 'val')[0].name.removesuffix('.nii.gz')}_recon.nii.gz", "VAE/infer"),
        ("runs/classifier/exp_1/saliency/mine.txt", "classifier/generate_saliency_maps"),
        ("runs/classifier/new/fold_1/best_model.pth", "classifier/train"),
    )
    for file, name in foreign:
        (study / file).parent.mkdir(parents=True, exist_ok=True)
        (study / file).write_text("mine")
        refused(study, name, ())
    for stage, file in (("VAE/train", VAE), ("diffusion/train", DIT)):
        shutil.rmtree((study / file).parent / "checkpoints")
        refused(study, stage, (Path(file).name, "--restart"))


# ---- places that cannot be written

WRITERS = ["audit", "data_split", "prepare_nii", "VAE/train", "VAE/infer", "VAE/save_latent",
           "VAE/generate_synthetic_samples", "diffusion/train", "diffusion/save_synth", "diffusion/per_slice_fid",
           "diffusion/memorisation", "classifier/train", "classifier/run", "classifier/generate_saliency_maps",
           "make_phantom"]  # fmt: skip
OPTIONS = {
    "data_split": ("--held_out_fraction", 0.45, "--selection_fraction", 0.45),
    "VAE/train": ("--run", "{root}/runs/new"),
    "diffusion/train": ("--experiment_name", "new"),
    "make_phantom": ("--out", "{root}/new"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_half_written(study, name):
    """The first, second and sixth file finds no space: those before are whole, of it there is no trace."""
    before, real = files(study), os.fsync
    for room in (0, 1, 5):
        left = room

        def full(number):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(number)

        with mock.patch("os.fsync", full):
            ended = run(name, study, *OPTIONS.get(name, ()))
        if left >= 0:
            assert ended.status == 0, ended.err  # wrote fewer files
            break
        assert "disk full" in complaint(ended)
        after = files(study)
        assert {k: v for k, v in after.items() if k in before} == before
        for path in set(after) - set(before):
            assert not path.endswith(".tmp"), path
            if path.endswith((".nii", ".nii.gz")):
                nifti.load(study / path)
            elif path.endswith((".pt", ".pth")):
                checkpoint.load(study / path)
            elif path.endswith(".json"):
                json.loads(after[path])
            (study / path).unlink()
        for folder in sorted((p for p in study.rglob("*") if p.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_not_be_written(study, name):
    """The system's refusal is imitated, since the tests may run as root, whom folder permissions do not stop."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    before = files(study)
    with mock.patch("os.replace", refuse):
        line = complaint(run(name, study, *OPTIONS.get(name, ())))
    assert "ermission denied" in line
    after = files(study)
    assert {k: v for k, v in after.items() if k in before} == before
    assert not any(".tmp" in path for path in after)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("leave", [0, 20_000, 120_000])
@pytest.mark.parametrize(
    ("name", "option"),
    [("VAE/train", "--run"), ("diffusion/save_synth", "--out"), ("VAE/infer", "--out"),
     ("diffusion/per_slice_fid", "--output_dir"), ("classifier/train", "--runs"),
     ("classifier/generate_saliency_maps", "--output_dir")],
)  # fmt: skip
def test_a_really_full_disk(study, small_disk, name, option, leave):
    """Pictures, logs and event files, too."""
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(max(free - leave, 0)))
    pictures = ("--pictures", 1) if "saliency" in name else ()
    ended = run(name, study, "--cache", "none", option, small_disk / "out", *pictures) if name != \
        "diffusion/save_synth" else run(name, study, option, small_disk / "out")  # fmt: skip
    if ended.status:
        assert "disk full" in complaint(ended)
    for path in small_disk.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        if path.name.endswith(".nii.gz"):
            nifti.load(path)
        if path.suffix in (".pt", ".pth"):
            checkpoint.load(path)


def test_a_file_where_a_folder_should_be(study):
    places = {
        "VAE/train": "--run",
        "VAE/infer": "--out",
        "VAE/save_latent": "--latents",
        "data_split": "--out",
        "prepare_nii": "--out",
        "diffusion/train": "--model_dir",
        "diffusion/save_synth": "--out",
        "diffusion/per_slice_fid": "--output_dir",
        "diffusion/memorisation": "--output_dir",
        "classifier/train": "--runs",
        "classifier/run": "--runs",
        "classifier/generate_saliency_maps": "--output_dir",
    }
    (study / "in_the_way").write_text("a file")
    for name, option in places.items():
        with told(name):
            refused(study, name, ("in_the_way",), option, study / "in_the_way")


# ---- as real processes


def test_no_data_at_all_says_which_command_makes_some(tmp_path):
    done = run_script(["neuroldm3d/VAE/train.py", "--root", tmp_path / "nothing", "--device", "cpu"], cwd=tmp_path)
    line = complaint(done)
    assert "make_phantom.py" in line and "train.csv" in line and not (tmp_path / "nothing").exists()


def test_relative_paths_from_another_directory(fresh):
    path = listed(fresh, "train")[0]
    cut(path)
    before = files(fresh)
    command = ["neuroldm3d/VAE/train.py", "--root", fresh.name, *COMMON, *TINY_VAE]
    assert path.name in complaint(run_script(command, cwd=fresh.parent)) and files(fresh) == before
