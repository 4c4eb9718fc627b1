"""generate.py: what each mode writes, that it can be repeated, continued and trusted."""

import json
import shutil
from functools import lru_cache

import nibabel as nib
import numpy as np
import pytest
import torch

from common import checkpoint, nifti, runtime
from common.cli import UserError
from common.training import save_network
from ldae import code_prior, data_split, dataset, evaluation, generation, manipulation, model, posterior_gap, preprocess
from ldae.scripts import generate
from tests.helpers import run_main, run_script, two_ranks
from tests.ldae import stages
from tests.ldae.conftest import SHAPE, SPACING_MM

FAST = "--device cpu --num_workers 0 --steps 5".split()
SCAN = "sub-0001_M000"
LATER = "sub-0001_M012"
PROBE = "diagnosis_AD_vs_CN"


@lru_cache(maxsize=1)
def ready(cohort):
    """The cohort with split, a model of random weights, directions and a prior over codes. Not to be changed."""
    root = shutil.copytree(cohort, cohort.with_name(f"{cohort.name}_ready"))
    rows = dataset.read_table(root / "data" / "dataset.csv")
    with runtime.start("cpu", "fp32", 0) as rt:
        split = data_split.load_or_create(root / "split.json", rows, 0.2, 0.2, 42, rt)
        ldae = model.load_ldae(stages.untrained_ldae(stages.best(root), split_hash=split.hash), rt)
        volumes = dataset.Volumes(ldae.preparation, None)
        y = torch.cat([ldae.semantic(volumes.tensor(row)[None]) for row in rows[:12]]).cpu()
    g = torch.Generator().manual_seed(2)
    shared = {"mean": y.mean(0), "std": y.std(0) + 0.05, "weight": torch.randn(16, generator=g), "encoder": ldae.hash}
    names = {"bias": 0.3, "positive": "AD", "negative": "CN"}
    manipulation.Direction(**shared, **names).save(root / "probes" / PROBE)
    names = {"bias": 74.0, "positive": "older", "negative": "younger", "kind": "regression", "target": "age"}
    shared["weight"] = torch.randn(16, generator=g)
    manipulation.Direction(**shared, **names).save(root / "probes" / "age")
    settings = {"code_dim": 16, "width": 16, "layers": 2, "dropout": 0.0}
    mlp = code_prior.CodeMLP(**settings)
    torch.nn.init.normal_(mlp.out.weight, std=0.1, generator=g)
    save_network(
        root / "runs" / "code_prior" / "checkpoints" / "best.ckpt", code_prior.KIND, mlp.state_dict(), settings,
        mean=y.mean(0), std=y.std(0), encoder=ldae.hash, schedule={"kind": "linear", "T": 100}, split=split.hash,
    )  # fmt: skip
    return root


def run(root, out, mode, *args):
    run_main(generate, mode, "--root", root, "--output_dir", out, *FAST, *args)
    return out


def volume(folder, name):
    return nifti.load(folder / f"{name}.nii.gz")


def sidecar(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def scan_path(root, scan=SCAN):
    return next(row.path for row in dataset.read_table(root / "data" / "dataset.csv") if row.scan == scan)


def outputs(folder):
    """Bytes of every output by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


# ---- what is written


def test_reconstruct_writes_volumes_that_line_up_with_their_input(cohort, tmp_path):
    """Fact 33 (files, affine, sidecar), fact 38: NIfTI on the input's grid, metrics and hashes beside it."""
    root = ready(cohort)
    out = run(root, tmp_path / "out", "reconstruct", "--scans", SCAN)
    ldae = model.load_ldae(stages.best(root), runtime.Runtime(torch.device("cpu")))
    source = nifti.load(scan_path(root))
    prepared = dataset.Volumes(ldae.preparation, None).load(dataset.read_table(root / "data" / "dataset.csv")[0])
    for kind in ("aekl", "y_only", "encoded"):
        name = f"{SCAN}_{kind}"
        stored = nib.load(out / f"{name}.nii.gz")
        assert np.array_equal(stored.affine, nib.load(scan_path(root)).affine) and stored.shape == source.shape
        record = sidecar(out, name)
        assert (record["mode"], record["scan"], record["steps"], record["seed"]) == ("reconstruct", SCAN, 5, 0)
        assert record["model"] == ldae.hash and record["split"] == ldae.split_hash
        assert record["shape"] == list(SHAPE) and np.allclose(record["affine"], source.affine)
        plan = preprocess.plan(source, ldae.preparation)  # how this scan was prepared: its range and its crop
        assert record["prepared"]["high"] == pytest.approx(plan.high) and record["prepared"]["start"] == [0, 0, 0]
        assert record["preparation"] == ldae.preparation.to_dict() and record["input_hash"]
        assert set(record["metrics"]) <= set(record["definitions"]) and "window 11" in record["definitions"]["ssim"]
        assert (out / f"{name}.png").stat().st_size > 1000
    assert {"z_mean", "z_std", "z_kurtosis", "z_max_abs"} == set(sidecar(out, f"{SCAN}_encoded")["z_T"])
    on_model = run(root, tmp_path / "model", "reconstruct", "--scans", SCAN, "--grid", "model", "--kinds", "aekl")
    x_hat = volume(on_model, f"{SCAN}_aekl").data
    expected = ldae.decompress(ldae.compress(torch.from_numpy(prepared)[None, None]))[0, 0].numpy()
    assert np.abs(x_hat - expected).max() < 1e-5
    recorded = sidecar(on_model, f"{SCAN}_aekl")
    assert recorded["metrics"]["mse"] == pytest.approx(float(((expected - prepared) ** 2).mean()), rel=1e-4)
    native = preprocess.to_native(expected, ldae.preparation, source)  # in the units of the file
    assert np.abs(volume(out, f"{SCAN}_aekl").data - native.data).max() < 1e-5 * native.data.max()


def test_plain_files_of_another_grid_and_orientation(cohort, tmp_path):
    """A LAS file, no table: the output lies where the input lies, on its grid."""
    root = ready(cohort)
    source = nifti.resample(nifti.load(scan_path(root)), 10.0)
    nifti.save(tmp_path / "right.nii.gz", source.data, source.affine)
    nifti.save(tmp_path / "left.nii.gz", *nifti.reorient(source.data, source.affine, "LAS"))
    out = run(root, tmp_path / "out", "reconstruct", "--input", tmp_path / "right.nii.gz", tmp_path / "left.nii.gz")
    right, left = volume(out, "right_encoded"), volume(out, "left_encoded")
    assert right.shape == source.shape and np.allclose(right.affine, source.affine)
    assert np.abs(right.data - left.data).max() < 1e-3 * np.abs(right.data).max()
    assert sidecar(out, "left_encoded")["input"] == "left.nii.gz"


def test_variations_differ_and_a_seed_repeats_them(cohort, tmp_path):
    """Fact 34: k volumes, pairwise different; same seed, same bytes, whatever the batch and the number."""
    root = ready(cohort)
    first = outputs(run(root, tmp_path / "a", "vary", "--scans", SCAN, "--n", 3))
    again = outputs(run(root, tmp_path / "b", "vary", "--scans", SCAN, "--n", 2, "--batch_size", 1))
    other = outputs(run(root, tmp_path / "c", "vary", "--scans", SCAN, "--n", 2, "--seed", 1))
    assert len(first) == 3 and len(set(first.values())) == 3
    assert again == {name: first[name] for name in again} and len(again) == 2
    assert not set(other.values()) & set(first.values())
    run(root, tmp_path / "b", "vary", "--scans", SCAN, "--n", 3, "--batch_size", 1)  # a larger number adds to it
    assert outputs(tmp_path / "b") == first


@pytest.mark.parametrize(("mix", "noise_path"), [("codes", "slerp"), ("codes", "lerp"), ("gradients", "slerp")])
def test_interpolation_ends_are_reconstructions(cohort, tmp_path, mix, noise_path):
    """Facts 18 and 19: alpha 0 and 1 through the whole pipeline equal plain reconstruction."""
    root, model_grid = ready(cohort), ("--grid", "model")
    plain = run(root, tmp_path / "plain", "reconstruct", "--scans", SCAN, LATER, "--kinds", "encoded", *model_grid)
    args = "--scans", SCAN, LATER, "--alphas", 0, 0.5, 1, "--mix", mix, "--noise_path", noise_path, *model_grid
    out = run(root, tmp_path / "out", "interpolate", *args)
    stem = f"{SCAN}_to_{LATER}"
    ends = volume(out, f"{stem}_0").data, volume(out, f"{stem}_1").data
    for end, scan in zip(ends, (SCAN, LATER), strict=True):
        assert np.abs(end - volume(plain, f"{scan}_encoded").data).max() <= 1e-4
    middle = volume(out, f"{stem}_0.5").data
    assert all(np.abs(middle - end).max() > 1e-3 for end in ends)
    assert sidecar(out, f"{stem}_0.5")["alpha"] == 0.5


def test_interpolation_between_sessions_of_a_subject(cohort, tmp_path):
    root = ready(cohort)
    out = run(root, tmp_path / "out", "interpolate", "--subject", "sub-0001", "--alphas", 0.5)
    assert sidecar(out, f"{SCAN}_to_{LATER}_0.5")["second_scan"] == LATER
    with pytest.raises(UserError, match="sessions 0, 6, 12"):
        run(root, tmp_path / "x", "interpolate", "--subject", "sub-0001", "--sessions", 0, 18)


def test_manipulation_doses_and_probabilities(cohort, tmp_path):
    """Facts 20 and 33: an edit of 0 is plain reconstruction, probabilities rise with five doses, targets are met."""
    root, model_grid = ready(cohort), ("--grid", "model")
    plain = run(root, tmp_path / "plain", "reconstruct", "--scans", SCAN, "--kinds", "encoded", *model_grid)
    doses = (-4, -2, 0, 2, 4)
    args = ("--scans", SCAN, "--direction", f"probes/{PROBE}", "--amounts", *doses, "--target_probability", 0.9,
            "--labels", root / "data" / "labels", "--label_names", root / "data" / "phantom.json")  # fmt: skip
    out = run(root, tmp_path / "out", "manipulate", *args, *model_grid)
    stem = f"{SCAN}_{PROBE}"
    reference = volume(plain, f"{SCAN}_encoded").data
    for name in ("unedited", "+0_logit"):
        assert np.abs(volume(out, f"{stem}_{name}").data - reference).max() <= 1e-4
    records = [sidecar(out, f"{stem}_{dose:+d}_logit") for dose in doses]
    probabilities = [record["edit"]["prediction"] for record in records]
    assert all(a < b for a, b in zip(probabilities, probabilities[1:], strict=False))
    odds = [np.log(p / (1 - p)) for p in probabilities]
    assert np.allclose(np.diff(odds), 2, atol=1e-3)  # a dose is a change of log-odds
    assert all(record["positive"] == "AD" and record["unit"] == "logit" for record in records)
    assert {"prediction_reencoded", "ventricle_ml", "l1_outside"} <= records[0]["edit"].keys()
    assert sidecar(out, f"{stem}_to_0.9")["edit"]["prediction"] == pytest.approx(0.9, abs=1e-4)
    report = sidecar(out, f"{stem}_report")
    assert len(report["edits"]) == 6 and report["original"]["regions_ml"] and (out / f"{stem}_report.png").exists()
    assert np.abs(volume(out, f"{stem}_+4_logit").data - reference).max() > 1e-3
    run(root, out, "manipulate", *args[:4], "--amounts", 1, *model_grid, "--overwrite")  # nothing of the old remains
    assert {path.name for path in out.glob("*.json")} == {"generate.json"} | {
        f"{stem}_{name}.json" for name in ("unedited", "+1_logit", "report")}  # fmt: skip
    years = run(root, tmp_path / "age", "manipulate", "--scans", SCAN, "--direction", root / "probes" / "age.npz",
                "--amounts", -5, 5, "--target_age", 80)  # fmt: skip
    ages = [sidecar(years, f"{SCAN}_age_{name}")["edit"]["prediction"] for name in ("-5_years", "+5_years", "to_80")]
    assert ages[1] - ages[0] == pytest.approx(10, abs=1e-3) and ages[2] == pytest.approx(80, abs=1e-3)


def test_an_edit_can_leave_another_prediction_where_it_is(cohort, tmp_path):
    """--keep: the code moves along a path that changes the diagnosis as asked and the predicted age not at all."""
    root = ready(cohort)
    words = "--scans", SCAN, "--direction", f"probes/{PROBE}", "--amounts", 3
    plain = run(root, tmp_path / "plain", "manipulate", *words)
    out = run(root, tmp_path / "out", "manipulate", *words, "--keep", "probes/age")
    name = f"{PROBE}_orthogonal_to_age"
    found, other = sidecar(out, f"{SCAN}_{name}_+3_logit"), sidecar(plain, f"{SCAN}_{PROBE}_+3_logit")
    assert found["direction"] == name and found["edit"]["prediction"] == pytest.approx(other["edit"]["prediction"])
    assert found["edit"]["l1"] != pytest.approx(other["edit"]["l1"], rel=1e-3)  # another way there
    probe, age = (manipulation.Direction.load(root / "probes" / kind) for kind in (PROBE, "age"))
    y = torch.zeros(1, 16)
    kept = probe.without(age).edit(y, 3.0)
    assert age.score(kept) == pytest.approx(age.score(y).item(), abs=1e-3)
    assert age.score(probe.edit(y, 3.0)) != pytest.approx(age.score(y).item(), abs=1e-2)
    with pytest.raises(UserError, match="no direction .*none"):
        run(root, tmp_path / "x", "manipulate", *words, "--keep", "probes/none")


def test_synthetic_scans(cohort, tmp_path):
    root = ready(cohort)
    out = run(root, tmp_path / "a", "synthesize", "--n", 2, "--sampler", "dpmpp_2m")
    first = outputs(out)
    assert len(set(first.values())) == 2
    assert np.allclose(volume(out, "synthetic_00000").affine @ [*(np.array(SHAPE) - 1) / 2, 1], [0, 0, 0, 1])
    run(root, out, "synthesize", "--n", 3, "--sampler", "dpmpp_2m")
    more = outputs(out)
    assert len(more) == 3 and first.items() <= more.items()
    like = run(root, tmp_path / "b", "synthesize", "--n", 1, "--like", scan_path(root))
    assert np.allclose(volume(like, "synthetic_00000").affine, nifti.load(scan_path(root)).affine)
    fine = nifti.resample(nifti.load(scan_path(root)), 4.0)  # another grid in the same place
    nifti.save(tmp_path / "fine.nii.gz", fine.data, fine.affine)
    like = run(root, tmp_path / "c", "synthesize", "--n", 1, "--like", tmp_path / "fine.nii.gz")
    made = volume(like, "synthetic_00000")
    assert np.allclose(made.spacing_mm, SPACING_MM) and made.shape == SHAPE  # a head of its own size

    def middle(volume):
        return volume.affine @ [*((np.array(volume.shape) - 1) / 2), 1]

    assert np.abs(middle(made) - middle(fine)).max() <= SPACING_MM / 2
    with pytest.raises(UserError, match="no file missing.nii.gz; correct --like"):
        run(root, tmp_path / "d", "synthesize", "--like", "missing.nii.gz")


# ---- continuing, refusing


def test_outputs_are_continued_and_never_silently_replaced(cohort, tmp_path):
    root, out = ready(cohort), tmp_path / "out"
    args = "reconstruct", "--scans", SCAN, "--kinds", "aekl", "encoded"
    run(root, out, *args)
    before = outputs(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*_aekl*")}
    (out / f"{SCAN}_encoded.json").unlink()
    (out / f"{SCAN}_encoded.nii.gz").write_bytes(b"cut off by a kill")
    run(root, out, *args)
    assert outputs(out) == before and times == {path.name: path.stat().st_mtime_ns for path in out.glob("*_aekl*")}
    with pytest.raises(UserError, match=r"other settings \(seed 0 -> 3\)"):
        run(root, out, *args, "--seed", 3)
    assert outputs(out) == before
    run(root, out, "reconstruct", "--scans", LATER, "--kinds", "y_only", "--seed", 3, "--overwrite")
    assert list(outputs(out)) == [f"{LATER}_y_only.nii.gz"]
    shutil.copy(out / f"{LATER}_y_only.nii.gz", tmp_path / f"{LATER}_y_only.nii.gz")
    with pytest.raises(UserError, match="was not written by generate.py"):
        run(root, tmp_path, "reconstruct", "--scans", LATER)


def test_another_scan_of_the_same_name_is_not_taken_for_the_first(cohort, tmp_path):
    """Outputs are named after their inputs: another file of that name is refused, and replaces with --overwrite."""
    root, out = ready(cohort), tmp_path / "out"
    for name, scan in (("a", SCAN), ("b", "sub-0005_M000")):
        (tmp_path / name).mkdir()
        shutil.copy(scan_path(root, scan), tmp_path / name / "t1.nii.gz")
    a, b = (tmp_path / name / "t1.nii.gz" for name in "ab")
    for mode, kinds in (("reconstruct", ["--kinds", "aekl"]), ("vary", ["--n", 1])):
        run(root, out / mode, mode, "--input", a, *kinds)
        first = outputs(out / mode)
        with pytest.raises(UserError, match=r"was made of another scan than .*b/t1.nii.gz; name another --output_dir"):
            run(root, out / mode, mode, "--input", b, *kinds)
        assert outputs(out / mode) == first
        run(root, out / mode, mode, "--input", b, *kinds, "--overwrite")
        fresh = outputs(run(root, out / f"fresh {mode}", mode, "--input", b, *kinds))
        assert outputs(out / mode) == fresh and fresh != first
    shutil.copy(a, tmp_path / "c.nii.gz")
    ends = "--alphas", 0.5, "--input", a, tmp_path / "c.nii.gz"
    run(root, out / "i", "interpolate", *ends)
    shutil.copy(b, tmp_path / "c.nii.gz")  # the second end is another scan now
    with pytest.raises(UserError, match="was made of another scan"):
        run(root, out / "i", "interpolate", *ends)
    assert sidecar(out / "i", "t1_to_c_0.5")["second_input_hash"] == checkpoint.file_hash(a)


def test_the_same_whatever_the_number_of_scans(cohort, tmp_path):
    """Fixed noise belongs to the scan: its y-only picture does not depend on company or order."""
    root = ready(cohort)
    alone = outputs(run(root, tmp_path / "a", "reconstruct", "--scans", LATER, "--kinds", "y_only"))
    both = outputs(run(root, tmp_path / "b", "reconstruct", "--scans", SCAN, LATER, "--kinds", "y_only"))
    assert alone.items() <= both.items() and len(set(both.values())) == 2


def test_an_exact_inversion_is_an_option(cohort, tmp_path):
    """With passes the encoded reconstruction is the autoencoder's, in five steps; outputs say so, and it is refused
    where it cannot be."""
    root, words = ready(cohort), ("--scans", SCAN, "--kinds", "aekl", "encoded", "--grid", "model")
    plain = run(root, tmp_path / "plain", "reconstruct", *words)
    exact = run(root, tmp_path / "exact", "reconstruct", *words, "--inversion_passes", 12)
    lost = [np.abs(volume(out, f"{SCAN}_encoded").data - volume(out, f"{SCAN}_aekl").data).max()
            for out in (plain, exact)]  # fmt: skip
    assert lost[1] < 0.05 * lost[0]
    assert sidecar(exact, f"{SCAN}_encoded")["sampling"]["inversion_passes"] == 12
    with pytest.raises(UserError, match="not with a model that clamps"):
        run(root, tmp_path / "x", "reconstruct", *words, "--inversion_passes", 1, "--preset", "upstream")


def test_upstream_sampling_is_an_option(cohort, tmp_path):
    root = ready(cohort)
    out = run(root, tmp_path / "out", "reconstruct", "--scans", SCAN, "--preset", "upstream", "--kinds", "encoded")
    record = sidecar(out, f"{SCAN}_encoded")
    assert record["sampling"] == posterior_gap.UPSTREAM and {"ssim_window3", "ssim_window4"} <= record["metrics"].keys()
    assert "original's window of 3" in record["definitions"]["ssim_window3"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["reconstruct", "--scans", "nobody"], "no scan nobody"),
        (["reconstruct", "--input", "missing.nii.gz"], "no file missing.nii.gz"),
        (["reconstruct", "--steps", 1001], "choose 1 to 1000"),
        (["reconstruct", "--model_path", "missing.ckpt"], "no representation at missing.ckpt"),
        (["vary", "--split", "missing.json"], "missing.json"),
        (["manipulate", "--direction", "probes/none"], "no direction"),
        (["manipulate", "--direction", "probes/age", "--unit", "logit"], "does not fit the direction age"),
        (["manipulate", "--direction", "probes/age", "--target_probability", 0.5], "give --target_age"),
        (["synthesize", "--code_prior", "missing.ckpt"], "train_code_prior.py"),
        (["interpolate", "--subject", "nobody"], "no subject nobody"),
    ],
)
def test_bad_input_is_named(cohort, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(ready(cohort), tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_belong_together(cohort, tmp_path):
    """A NaN volume, a direction of another model, another split, two inputs of one name."""
    root = ready(cohort)
    source = nifti.load(scan_path(root))
    source.data[3, 3, 3] = np.nan
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(nib.Nifti1Image(source.data, source.affine).to_bytes())
    bad = bad.rename(tmp_path / "bad.nii")
    with pytest.raises(UserError, match="bad.nii"):
        run(root, tmp_path / "out", "reconstruct", "--input", bad)
    with pytest.raises(UserError, match="two inputs are called"):
        run(root, tmp_path / "out", "reconstruct", "--input", scan_path(root), scan_path(root))
    another = stages.untrained_ldae(tmp_path / "another.ckpt", seed=5, split_hash="f" * 16)
    with pytest.raises(UserError, match="the model was trained with"):
        run(root, tmp_path / "out", "reconstruct", "--model_path", another)
    with pytest.raises(UserError, match="this model is"):
        args = "--scans", SCAN, "--direction", f"probes/{PROBE}", "--model_path", another
        run(root, tmp_path / "out", "manipulate", *args)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paint"], "the first word is one of reconstruct, vary"),
        (["vary", "--n", "0"], "give at least one variation"),
        (["interpolate", "--scans", "a"], "two --scans"),
        (["interpolate"], "one of the three"),
        (["manipulate"], "name a probe"),
        (["reconstruct", "--input", "a.nii", "--scans", "b"], "not both"),
        (["reconstruct", "--steps", "0"], "must be at least 1"),
        (["synthesize", "--scans", "a"], "unknown argument --scans"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        generate.parse(argv)
    assert message in f"{error.value} {capsys.readouterr().err}"


# ---- as a user runs it


def test_help_needs_no_torch(tmp_path):
    """Fact 38: --help of the command and of every mode, from anywhere."""
    shown = run_script(["ldae/scripts/generate.py", "--help"], cwd=tmp_path)
    assert shown.returncode == 0 and all(mode in shown.stdout for mode in generate.MODES)
    for mode in generate.MODES:
        shown = help_without_torch(generate, mode)
        assert shown.returncode == 0, shown.stderr
        assert "--steps" in shown.stdout and "default: 100" in shown.stdout


def help_without_torch(script, *args):
    """--help of a script in a process that must not import torch."""
    path, words = script.__file__, [*args, "--help"]
    lines = ["import runpy, sys", f"sys.argv = {[path, *words]!r}", "try:",
             f"    runpy.run_path({path!r}, run_name='__main__')", "except SystemExit as end:",
             "    assert not end.code", "assert 'torch' not in sys.modules"]  # fmt: skip
    return run_script(["-c", "\n".join(lines)])


@pytest.mark.slow
def test_the_script_and_two_ranks_write_the_same(cohort, tmp_path):
    """Fact 38: a real run from another folder; ranks share the scans."""
    root = ready(cohort)
    words = ["ldae/scripts/generate.py", "reconstruct", "--root", root, "--part", "test", "--max_scans", 3, *FAST]
    words += ["--kinds", "aekl", "y_only"]
    one = run_script([*words, "--output_dir", tmp_path / "one"], cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = two_ranks([*words, "--output_dir", tmp_path / "two"], cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert len(outputs(tmp_path / "one")) == 6 and outputs(tmp_path / "one") == outputs(tmp_path / "two")
    failed = run_script([*words, "--output_dir", tmp_path / "x", "--scans", "nobody"], cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("error: no scan nobody")
    assert "Traceback" not in failed.stderr


def test_volumes_do_not_depend_on_the_batch(cohort):
    """On a CPU volumes are decoded one by one, so that a batch cannot round them differently."""
    root = ready(cohort)
    ldae = model.load_ldae(stages.best(root), runtime.Runtime(torch.device("cpu")))
    z_T, y = ldae.noise(["a", "b", "c"], 0), torch.zeros(1, 16)
    alone = [next(generation.decode(ldae, z[None], y, 3)) for z in z_T]
    together = list(generation.decode(ldae, z_T, y, 3, batch=3))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert evaluation.sampler_options(ldae) == {"spacing": "trailing", "final": "clean", "clip": None}
    assert generation.centred_affine(ldae.preparation)[0, 0] == SPACING_MM
