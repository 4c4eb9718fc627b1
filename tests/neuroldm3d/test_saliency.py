"""Attribution maps: their axioms, their way back to the volume's file, regions, sanity, and the scripts."""

import csv
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from common import nifti, runtime
from common.cli import UserError
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier import attribution, generate_saliency_maps, run_saliency_generation, saliency
from neuroldm3d.classifier.model import CNN3D
from tests.helpers import run_main, run_script, two_ranks
from tests.neuroldm3d.classifier_tools import (
    PREP,
    run_folder,
    trained,  # noqa: F401 - a fixture
)
from tests.neuroldm3d.classifier_tools import call as call_train

COLUMNS = ["method", "shape", "mean", "std", "min", "max", "abs_mean", "positive_ratio", "negative_ratio",
           "subject_id", "true_label", "prediction", "sample_idx"]  # fmt: skip


class Smooth(nn.Module):
    """A smooth classifier of (B, S, h, w): a softplus network on the flattened input."""

    def __init__(self, shape=(5, 6, 7)):
        super().__init__()
        torch.manual_seed(0)
        n = int(np.prod(shape))
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)


def call(module, root, *args):
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        run_main(module, "--root", root, "--device", "cpu", *args)
    return out.getvalue()


# ---- methods


@pytest.mark.parametrize("baseline", [0.0, -0.7])
def test_integrated_gradients_are_complete(baseline):
    """Fact 36: sum of the map = logit(x) - logit(baseline) within 1 % with 50 steps, on a smooth network."""
    network, x = Smooth().eval(), torch.randn(1, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    found = attribution.attribute(network, x, "integrated_gradients", baseline=baseline)
    change = network(x) - network(torch.full_like(x, baseline))
    assert found.shape == x.shape and found.sum().item() == pytest.approx(change.item(), rel=0.01)
    report = attribution.completeness(network, x, baseline, found)
    assert report["relative_error"] < 0.01 and report["logit_change"] == pytest.approx(change.item(), rel=1e-6)
    assert attribution.completeness(network, x, baseline, 2 * found)["relative_error"] == pytest.approx(1, abs=0.03)


def test_gradient_maps_equal_autograd():
    """Fact 36: Input x Gradient is x · grad exactly; the magnitude is |grad|."""
    network, x = CNN3D((3, 4), 0.5).eval(), torch.randn(1, 6, 9, 8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x)
    x = x.detach()
    assert torch.equal(attribution.attribute(network, x, "input_x_gradient"), x * gradient)
    assert torch.equal(attribution.attribute(network, x, "saliency"), gradient.abs())
    assert not x.requires_grad


@pytest.mark.parametrize("method", ["gradient_shap", "noise_tunnel_ig"])
def test_random_methods_repeat_by_seed(method):
    """Fact 36: the same seed gives the same map, another one another; the global generators are left alone."""
    network, x = Smooth().eval(), torch.randn(1, 5, 6, 7)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    maps = [attribution.attribute(network, x, method, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(maps[0], maps[1]) and not torch.allclose(maps[0], maps[2])
    assert torch.equal(torch.rand(1), before[0]) and np.random.rand() == before[1]


def test_expected_gradients_of_a_linear_network():
    """There every path gives w · (x - baseline), whatever is drawn on it."""
    layer = nn.Linear(24, 1)
    network, x = nn.Sequential(nn.Flatten(), layer), torch.randn(1, 2, 3, 4)
    w = layer.weight.detach().reshape(x.shape)
    found = attribution.attribute(network, x, "gradient_shap", baseline=0.5, seed=1)
    around = attribution.shap_baseline(x, 0.5, 1)
    assert around.std() == pytest.approx(0.1, abs=0.05) and around.mean() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(found, w * (x - around), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attribution.attribute(network, x, "integrated_gradients", baseline=0.5), w * (x - 0.5))


def test_deep_lift_is_not_offered():
    """Fact 36: it cannot work here, so it is no choice."""
    assert "deep_lift" not in attribution.METHODS
    with pytest.raises(ValueError, match="unknown method"):
        attribution.attribute(Smooth(), torch.zeros(1, 5, 6, 7), "deep_lift")


def test_statistics_of_a_small_map():
    found = attribution.statistics(np.array([[-1.0, 0.0], [2.0, 3.0]]))
    assert list(found) == COLUMNS[2:9]
    assert found == pytest.approx({"mean": 1.0, "std": np.std([-1, 0, 2, 3], ddof=1), "min": -1.0, "max": 3.0,
                                   "abs_mean": 1.5, "positive_ratio": 0.5, "negative_ratio": 0.25})  # fmt: skip


def test_a_randomised_network_shares_no_weight():
    network = CNN3D((3, 4), 0.5).train()
    network(torch.randn(2, 6, 9, 8))  # moves the running statistics
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fresh = attribution.randomised(network, 1)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    assert not torch.equal(fresh.features[0].weight, network.features[0].weight)
    assert fresh.features[1].running_mean.abs().max() == 0 and not fresh.training
    again = attribution.randomised(network, 1).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in fresh.state_dict().items())


# ---- back to the file


@pytest.mark.parametrize("shape", [(32, 40, 32), (24, 36, 20)])
def test_a_map_goes_back_where_the_input_came_from(shape):
    prep = preprocess.Preparation(shape=shape)
    volume = np.random.default_rng(0).random(shape).astype(np.float32)
    back = attribution.to_prepared(preprocess.classifier_input(volume, prep), prep)
    seen = preprocess.classifier_slices(prep)
    assert np.array_equal(back[:, seen], volume[:, seen])
    hidden = np.delete(back, np.r_[seen], axis=1)
    assert hidden.size and not hidden.any()


@pytest.mark.parametrize("axes", ["LAS", "RAS", "PIR"])
def test_a_map_lands_on_its_voxel_of_the_file(cohort, tmp_path, axes):
    """Whatever the file's axis order: its affine is kept, and a blob in the input is a blob at the same mm."""
    row = dataset.read_table(cohort / "data_csvs" / "test.csv")[0]
    volume = nifti.load(row.file)
    file = tmp_path / "volume.nii.gz"
    nifti.save(file, *nifti.reorient(volume.data, volume.affine, axes))
    row = dataset.Row(file, "volume", row.label, row.group, row.subject)
    volumes = dataset.Volumes(PREP, None)
    blob = np.zeros(attribution_shape(), np.float32)
    blob[10, 9, 20] = 1.0  # slice, axis 0, axis 2 of the classifier input
    prepared = attribution.to_prepared(blob, PREP)
    affine = volumes.affine(row)
    voxel = np.unravel_index(prepared.argmax(), prepared.shape)
    assert voxel == (9 - 2, 10 + preprocess.classifier_slices(PREP).start, 20 - 2)
    out = tmp_path / "map.nii.gz"
    attribution.save_like(out, attribution.to_file_grid(prepared, affine, file), file)
    image, source = nib.load(out), nib.load(file)
    assert image.shape == source.shape and np.array_equal(image.affine, source.affine)
    peak = np.unravel_index(np.abs(image.get_fdata()).argmax(), image.shape)
    wanted = nib.affines.apply_affine(affine, voxel)
    assert np.abs(nib.affines.apply_affine(image.affine, peak) - wanted).max() < volume.spacing_mm[0]


def attribution_shape():
    from neuroldm3d.classifier.trainer import input_shape

    return input_shape(PREP)


# ---- regions and sanity


def test_pointing_at_a_planted_region():
    labels = np.full((20, 20, 20), 3)
    labels[:3] = 0  # outside the brain
    labels[5:7, 5:7, 5:7], labels[14:16, 14:16, 14:16] = 1, 2
    found = np.zeros(labels.shape)
    found[5:7, 5:7, 5:7] = -1.0  # the sign does not matter
    found[0, 0, 0] = 99.0  # nor does what lies outside the brain
    left, right = saliency.region_rows(found, labels, {"x_left": 1, "x_right": 2}, (1, 1, 1), 0.5)
    assert left["mass_share"] == 1 and right["mass_share"] == 0
    assert left["volume_share"] == left["chance"] == pytest.approx(8 / (17 * 400))
    assert left["hit"] and not right["hit"]
    wide = saliency.region_rows(found, labels, {"x_right": 2}, (1, 1, 1), 16.0)[0]
    assert wide["hit"] and wide["chance"] > 0.5  # a larger tolerance is paid for by chance


def test_summary_counts_the_own_side_only():
    def row(group, region, hit):
        return {"group": group, "region": region, "hit": hit, "chance": 0.1, "mass_share": 0.2, "volume_share": 0.05}

    rows = [row("left", "hippocampus_left", True), row("left", "hippocampus_right", False),
            row("right", "hippocampus_right", True), row("HC", "hippocampus_left", False)]  # fmt: skip
    found = saliency.target_summary(rows, 0)
    assert (found["n"], found["pointing_accuracy"], found["chance"]) == (2, 1.0, 0.1)
    assert found["p_above_chance"] == pytest.approx(0.01) and found["mass_over_volume"]["mean"] == pytest.approx(4)
    assert saliency.target_summary([row("HC", "hippocampus_left", True)], 0) is None


def test_rows_that_the_network_has_seen_are_left_out(capsys):
    rt = runtime.Runtime(torch.device("cpu"))
    rows = [dataset.Row(None, name, 0, "HC", name) for name in "abc"]
    assert [row.name for row in saliency.unseen(rows, ["b", "z"], rt)] == ["a", "c"]
    assert "1 of 3 rows were in training or validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="every listed subject was in training or validation"):
        saliency.unseen(rows, ["a", "b", "c"], rt)
    assert saliency.unseen(rows, None, rt) == rows  # the original's files do not say


# ---- the scripts


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):  # noqa: F811
    """The trained study with maps of three test subjects, and what was printed."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("explained") / "study")
    printed = call(generate_saliency_maps, root, "--max_samples", 3, "--pictures", 1, "--sanity_samples", 2)
    return root, printed


METHODS = ("integrated_gradients", "saliency", "gradient_shap", "input_x_gradient")


def test_maps_tables_and_pictures(explained):
    """Fact 36: NIfTI with the input's affine, attribution_statistics.csv with its 13 columns, completeness printed."""
    root, printed = explained
    out, rows = run_folder(root) / "saliency", dataset.read_table(root / "data_csvs" / "test.csv")[:3]
    with open(out / "attribution_statistics.csv") as file:
        reader = csv.DictReader(file)
        table = list(reader)
    assert reader.fieldnames == COLUMNS and len(table) == 3 * len(METHODS)
    assert {(r["method"], r["subject_id"]) for r in table} == {(m, row.name) for m in METHODS for row in rows}
    for row in rows:
        for method in METHODS:
            folder = out / method / row.name
            image = nib.load(folder / f"{row.name}_{method}_attributions.nii.gz")
            source = nib.load(row.file)
            assert np.array_equal(image.affine, source.affine) and image.shape == source.shape
            data = image.get_fdata()
            assert np.isfinite(data).all() and np.abs(data).max() > 0
            assert (data >= 0).all() == (method == "saliency")
            pictures = {p.name for p in folder.glob("*.png")}
            expected = {f"{row.name}_{method}_{kind}.png" for kind in ("overlay", "summary")}
            assert pictures == (expected if row is rows[0] else set())
    assert printed.count("completeness of ") == 2 and "of integrated_gradients" in printed
    with open(out / "completeness.csv") as file:
        errors = [row for row in csv.DictReader(file) if row["method"] == "integrated_gradients"]
    report = json.loads((out / "saliency.json").read_text())
    found = [float(row["relative_error"]) for row in errors]
    assert report["completeness"]["integrated_gradients"]["median"] == pytest.approx(np.median(found))
    assert np.median(found) < 0.1  # piecewise linear, with max pools: not the smooth network of the axiom's test
    with open(out / "region_shares.csv") as file:
        shares = list(csv.DictReader(file))
    assert {row["region"] for row in shares} == {"hippocampus_left", "hippocampus_right"}
    assert set(report["sanity"]) == set(METHODS) and all(s["n"] == 2 for s in report["sanity"].values())
    assert report["subjects"] == [row.name for row in rows]
    assert str(root) not in (out / "saliency.json").read_text()


def test_group_means_are_means_of_the_subjects(explained):
    root, _ = explained
    out, rows = run_folder(root) / "saliency", dataset.read_table(root / "data_csvs" / "test.csv")[:3]
    rt = runtime.Runtime(torch.device("cpu"))
    from neuroldm3d.classifier import trainer

    network, saved = trainer.load_classifier(run_folder(root) / "fold_1" / "best_model.pth", rt)
    volumes = dataset.Volumes(PREP, None)
    for label, name in enumerate(dataset.CLASSES):
        maps = []
        for row in (r for r in rows if r.label == label):
            x = torch.from_numpy(preprocess.classifier_input(volumes.load(row), PREP))[None]
            found = attribution.attribute(network, x, "input_x_gradient")
            maps.append(attribution.to_prepared(found[0].numpy(), PREP))
        for kind, expected in (("signed", np.mean(maps, 0)), ("absolute", np.mean(np.abs(maps), 0))):
            image = nib.load(out / "input_x_gradient" / f"mean_{kind}_{name}.nii.gz")
            assert np.allclose(image.affine, volumes.affine(rows[0]), atol=1e-4)
            stored = nifti.reorient(nifti.load(image.get_filename()).data, np.diag([1.0, 1, 1, 1]), "LAS")[0]
            assert np.allclose(stored, expected, atol=1e-6)
    assert (out / "group_integrated_gradients.png").stat().st_size > 5000


def test_the_same_command_gives_the_same_maps_and_others_are_refused(explained, tmp_path):
    root = shutil.copytree(explained[0], tmp_path / "study")
    shutil.rmtree(out := run_folder(root) / "saliency")
    again = ("--max_samples", 2, "--methods", "saliency", "gradient_shap", "--pictures", 0, "--sanity_samples", 0)
    call(generate_saliency_maps, root, *again)
    files = {p: p.read_bytes() for p in out.rglob("*") if p.suffix in (".gz", ".csv")}
    call(generate_saliency_maps, root, *again)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.suffix in (".gz", ".csv")} == files
    with pytest.raises(UserError, match="holds maps of other settings .seed.: name another --output_dir"):
        call(generate_saliency_maps, root, *again, "--seed", 1)
    call(generate_saliency_maps, root, *again, "--seed", 1, "--overwrite")
    changed = {p.parts[-3] for p in files if p.name.endswith("attributions.nii.gz") and p.read_bytes() != files[p]}
    assert changed == {"gradient_shap"}  # the only random one
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds files that are not ours"):
        call(generate_saliency_maps, root, "--output_dir", tmp_path / "mine")


@pytest.mark.parametrize("options, message", [
    (("--methods", "deep_lift"), "--methods deep_lift: give some of integrated_gradients"),
    (("--key_slices", 34), "have the slices 0 to 33"),
    (("--target_regions", "hippokampus_left"), "give NAME=CODE"),
    (("--csv_path", "TRAIN"), "every listed subject was in training or validation"),
    (("--model_path", "nowhere.pth"), "no classifier at nowhere.pth"),
    (("--max_samples", -1), "must be 0 or more"),
])  # fmt: skip
def test_bad_options(trained, options, message):  # noqa: F811
    options = [trained / "data_csvs" / "train.csv" if o == "TRAIN" else o for o in options]
    with pytest.raises(UserError, match=message):
        call(generate_saliency_maps, trained, *options)
    assert not (run_folder(trained) / "saliency").exists()


def test_bad_model_from_the_shell(trained, tmp_path):  # noqa: F811
    (tmp_path / "model.pth").write_bytes(b"not a checkpoint")
    script = "neuroldm3d/classifier/generate_saliency_maps.py"
    done = run_script([script, "--root", trained, "--model_path", tmp_path / "model.pth", "--device", "cpu"])
    assert done.returncode == 2 and done.stderr.startswith("error: checkpoint") and done.stderr.count("\n") == 1


def test_without_region_maps(trained, tmp_path):  # noqa: F811
    root = shutil.copytree(trained, tmp_path / "study")
    shutil.rmtree(root / "data" / "regions")
    options = ("--max_samples", 1, "--methods", "saliency", "--sanity_samples", 0, "--pictures", 0)
    assert "regions are left out" in call(generate_saliency_maps, root, *options)
    out = run_folder(root) / "saliency"
    assert not (out / "region_shares.csv").exists()
    assert json.loads((out / "saliency.json").read_text())["pointing"] == {}


def test_a_run_of_folds_is_explained_fold_by_fold(trained, tmp_path):  # noqa: F811
    """Each network on the subjects of its own test fold, and on nobody it has seen."""
    root = shutil.copytree(trained, tmp_path / "study")
    call_train(root, "--exp", "cv", "--folds", 2, "--max_steps", 2)
    options = ("--exp", "cv", "--max_samples", 2, "--methods", "saliency", "--sanity_samples", 0, "--pictures", 0)
    call(run_saliency_generation, root, *options)
    subjects = []
    for k in (1, 2):
        report = json.loads((run_folder(root, "cv") / "saliency" / f"fold_{k}" / "saliency.json").read_text())
        with open(run_folder(root, "cv") / f"fold_{k}" / "individual_test_performance.csv") as file:
            tested = [row["name"] for row in csv.DictReader(file)]
        assert report["subjects"] == tested[:2]
        subjects += report["subjects"]
    assert len(set(subjects)) == 4
    with pytest.raises(UserError, match="no fold_K/best_model.pth in .*nowhere"):
        call(run_saliency_generation, root, "--exp", "nowhere")


@pytest.mark.slow
def test_two_ranks_explain_as_one(explained, tmp_path):
    root = shutil.copytree(explained[0], tmp_path / "study")
    script = "neuroldm3d/classifier/generate_saliency_maps.py"
    options = ["--max_samples", 3, "--pictures", 0, "--sanity_samples", 2, "--device", "cpu"]
    done = two_ranks([script, "--root", root, *options, "--output_dir", tmp_path / "two"])
    assert done.returncode == 0, done.stderr[-3000:]
    one = run_folder(root) / "saliency"
    tables = []
    for folder in (one, tmp_path / "two"):
        with open(folder / "attribution_statistics.csv") as file:
            tables.append([[row["subject_id"], row["method"], float(row["abs_mean"])] for row in csv.DictReader(file)])
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
    assert [row[2] for row in tables[0]] == pytest.approx([row[2] for row in tables[1]], rel=1e-4)
    a, b = (json.loads((folder / "saliency.json").read_text())["sanity"] for folder in (one, tmp_path / "two"))
    assert a["saliency"]["rank_correlation"] == pytest.approx(b["saliency"]["rank_correlation"], abs=1e-3)
