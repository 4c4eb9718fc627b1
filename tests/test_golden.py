"""The reference cases as tests, and tests of their runner: it must be able to fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import golden

FOLDER = Path(golden.__file__).parent
ROOT = FOLDER.parents[1]


HEAVY = ("aae_full", "disc_full", "vae_full")  # few parameters, large volumes
REQUIRED = {"il_cldm": 30, "neuroldm3d": 38, "ldae": 27, "lapt": 27, "mgdcr": 21}


def cases():
    for path in golden.find_cases([FOLDER]):
        case = json.loads(path.read_text())
        heavy = (case["n_params"] or 0) > 5e6 or path.stem in HEAVY or path.stem.startswith("stage1")
        yield pytest.param(path, id=f"{path.parent.name}-{path.stem}", marks=[pytest.mark.slow] if heavy else [])


@pytest.mark.parametrize("path", list(cases()))
def test_case(path):
    result = golden.run_case(path)
    assert result.status == "pass", result


@pytest.mark.parametrize("paper", REQUIRED)
def test_every_required_case_is_here(paper):
    """Nobody drops a case by accident."""
    required = [p for p in golden.find_cases([FOLDER / paper]) if json.loads(p.read_text())["required"]]
    assert len(required) == REQUIRED[paper]


def copy_case(folder, name, change=None, change_outputs=None):
    folder.mkdir(parents=True, exist_ok=True)
    case = json.loads((FOLDER / f"il_cldm/{name}.json").read_text())
    if change:
        change(case)
    (folder / f"{name}.json").write_text(json.dumps(case))
    with np.load(FOLDER / f"il_cldm/{name}.npz") as arrays:
        arrays = dict(arrays)
    if change_outputs:
        change_outputs(arrays)
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.json"


def test_wrong_value_fails(tmp_path):
    def spoil(arrays):
        arrays["out"][0, 0, 0, 0, 0] += 1e-4

    result = golden.run_case(copy_case(tmp_path / "il_cldm", "block_attention", change_outputs=spoil))
    assert result.status == "FAIL" and result.difference == pytest.approx(1e-4, rel=0.1) and result.tolerance == 4e-5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_value_fails(tmp_path, value):
    def spoil(arrays):
        arrays["out"][0] = value

    assert golden.run_case(copy_case(tmp_path / "il_cldm", "block_attention", change_outputs=spoil)).status == "FAIL"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.update(module="Transformer"), "Transformer"),
        (lambda case: case["config"].update(window=3), "window"),
        (lambda case: case["keys"].pop("out.bias"), "out.bias"),
        (lambda case: case.update(n_params=1), "parameters"),
        (lambda case: case["outputs"].update(weights=[1]), "weights"),
        (lambda case: case["inputs"].update(x={"seed": "x", "shape": [2, 32, 3, 4, 6]}), "shape"),
        (lambda case: case["inputs"]["x"].update(power=2.0), "power"),
    ],
)
def test_unknown_or_other_structure_fails(tmp_path, change, message):
    result = golden.run_case(copy_case(tmp_path / "il_cldm", "block_attention", change))
    assert result.status == "FAIL" and message in result.note


def test_operations_on_inputs():
    """Shift, threshold and zeroed samples or slices, in this order."""
    spec = {"seed": "a", "shape": [3, 4, 5], "scale": 2.0}
    plain = golden.draw(spec)
    assert np.array_equal(golden.draw(spec | {"shift": 1.5}), plain + 1.5)
    mask = golden.draw(spec | {"shift": 1.5, "above": 1.0, "zero_samples": [1], "zero_last_axis": [0, 4]})
    expected = (plain + 1.5 > 1.0).float()
    expected[1], expected[..., [0, 4]] = 0, 0
    assert 0 < mask.sum() < mask.numel() and np.array_equal(mask, expected)


def test_operations_in_words():
    """They are the paper's: applied in the order of the inputs, to families too, and unknown where it has none."""
    specs = {"a": {"seed": "a", "shape": [3]}, "b": {"seed": "b/<k>", "shape": [3], "scale": 0.1, "then": "plus a"}}

    def then(words, drawn, inputs):
        assert words == "plus a"
        return drawn + inputs["a"]

    drawn = golden.draw_inputs(specs, then)
    assert np.array_equal(drawn["b"](k=2), drawn["a"] + golden.fill.tensor("b/2", [3], 0.1))
    with pytest.raises(golden.CaseError, match="then"):
        golden.draw({"seed": "c", "shape": [3], "then": "plus a"})


def test_a_comparison_can_be_restricted_to_where_it_means_something(tmp_path):
    def spoil(arrays):
        arrays["out"][0, 0, 0, 0, 0] += 1.0
        arrays["certain"] = np.ones_like(arrays["out"])
        arrays["certain"][0, 0, 0, 0, 0] = 0.1

    def restrict(least):
        return lambda case: case.update(compare_only_where={"out": ["certain", least]})

    for least, status in ((0.5, "pass"), (0.05, "FAIL")):
        path = copy_case(tmp_path / str(least) / "il_cldm", "block_attention", restrict(least), spoil)
        assert golden.run_case(path).status == status


def test_unknown_optional_case_fails_too(tmp_path):
    change = dict(module="sort (function)", required=False)
    path = copy_case(tmp_path / "il_cldm", "block_match_size", lambda case: case.update(change))
    assert golden.run_case(path).status == "FAIL"


def test_deliberate_difference_counts_only_where_it_is_not_required(tmp_path):
    change = dict(module="crop, random_translation (functions)", required=False)
    path = copy_case(tmp_path / "il_cldm", "block_match_size", lambda case: case.update(change))
    result = golden.run_case(path)
    assert result.status == "not reproduced" and "first release" in result.note
    copy_case(tmp_path / "il_cldm", "block_match_size", lambda case: case.update(change | {"required": True}))
    assert golden.run_case(path).status == "FAIL"


def test_paper_comes_from_the_folder_the_key_or_the_module(tmp_path):
    for folder, change in (("il_cldm", {}), ("cases", {"paper": "il_cldm"}), ("others", {})):
        path = copy_case(tmp_path / folder, "block_residual_ae", lambda case, change=change: case.update(change))
        assert golden.run_case(path).status == "pass", folder


def test_relative_tolerance_ignores_only_rounding_noise():
    expected = np.array([100.0, 1e-3, 1e-6])
    assert golden.compare(np.array([100.5, 1.005e-3, 9e-6]), expected, 0.0, 0.01)[0] < 1
    assert golden.compare(np.array([100.0, 1.02e-3, 1e-6]), expected, 1.0, 0.01)[0] > 1


def test_relative_part_adds_to_the_absolute_tolerance():
    expected = np.array([100.0, 0.0, np.nan])
    assert golden.compare(np.array([100.09, 1e-3, np.nan]), expected, 1e-3, None, 1e-3)[0] <= 1
    assert golden.compare(np.array([100.2, 0.0, np.nan]), expected, 1e-3, None, 1e-3)[0] > 1
    assert golden.compare(np.array([100.0, 0.0, 0.0]), expected, 1e-3, None, 1e-3)[0] > 1


def test_small_results_that_are_no_arrays():
    expected = {"a": [1, 2.0], "b": {"6": None, "7": True}, "c": "AD"}
    assert golden.mismatch({"a": (1, 2.0 + 1e-9), "b": {6: None, 7: True}, "c": "AD"}, expected, 1e-6) == ""
    for key, value in (("a", [1, 2.1]), ("a", [1]), ("a", 3), ("b", {6: None}), ("b", {6: 0, 7: True}), ("c", "CN")):
        got = {"a": [1, 2.0], "b": {6: None, 7: True}, "c": "AD"} | {key: value}
        assert golden.mismatch(got, expected, 1e-6).startswith(f"[{key}]"), (key, value)


def test_command_line(tmp_path):
    good, bad = tmp_path / "good/il_cldm", tmp_path / "bad/il_cldm"
    copy_case(good, "block_residual_ae")
    shutil.copytree(good, bad)
    copy_case(bad, "time_embedding", change_outputs=lambda arrays: arrays["emb_32"].fill(0))

    def run(*args):
        command = [sys.executable, "-m", "tests.golden", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(tmp_path / "good")
    assert done.returncode == 0 and "block_residual_ae" in done.stdout and "1 cases, 0 failed" in done.stdout
    done = run(tmp_path / "good", tmp_path / "bad")
    assert done.returncode == 1 and "3 cases, 1 failed" in done.stdout
    assert [line.split()[3] for line in done.stdout.splitlines() if line.startswith("time_embedding")] == ["FAIL"]
    done = run(tmp_path / "absent")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error:")
