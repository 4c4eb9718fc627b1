"""reproduce.py to its end on a study too small to show anything: every claim gets its row; what its numbers mean."""

import csv
import json

import numpy as np
import pytest

from lapt import reproduce
from tests.helpers import run_script

STEPS = ("vqgan_steps", "ldm_steps", "extra_steps", "guide_steps", "ldm3d_steps", "extra_steps_3d", "sample_steps")


@pytest.mark.slow
def test_reproduce_writes_every_claim(tmp_path):
    sizes = "--n_cases 10 --shape 16 16 8 --seeds 1 2 --ablation_seeds 1 --jobs 1 --num_workers 1".split()
    steps = [word for name in STEPS for word in (f"--{name}", "2")]
    command = [
        "lapt/reproduce.py",
        "--preset",
        "smoke",
        *sizes,
        *steps,
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    done = run_script(command, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name.split()[0] for name in results["claims"]] == ["a1", "a2", "b1", "b2", "b3", "b4", "c", "d", "e", "f"]
    for name, row in results["claims"].items():
        assert row["ours"] and row["paper"] and name in done.stdout
        assert row["passed"] is None if "a report" in name else isinstance(row["passed"], bool), name
    with open(tmp_path / "out" / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    arms = {f"{arm}_1" for arm in (*reproduce.ARMS, *reproduce.ARMS_3D)} | {"plain_2", "lapt_2"}
    assert {row["method"] for row in rows} == arms | {"ldm", "ldm3d", "autoencoder", "real"}
    # the arms of a seed differ in their objective alone
    configs = {arm: json.loads((tmp_path / "out" / "runs" / arm / "config.json").read_text()) for arm in arms}
    differs = {key for key in configs["plain_1"] if configs["plain_1"][key] != configs["lapt_1"][key]}
    assert differs == {"name", "w_img", "w_les"}
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) >= 4


def table(**columns):
    return {name: np.array(values, float) for name, values in columns.items()}


def test_contrast_is_paired_by_seed_and_leaves_patients_without_lesion_out():
    tables = {"plain_1": table(lesion_mae=[4, 6, np.nan]), "lapt_1": table(lesion_mae=[3, 4, np.nan]),
              "plain_2": table(lesion_mae=[4, 4, np.nan]), "lapt_2": table(lesion_mae=[5, 4, np.nan]),
              "ldm": table(lesion_mae=[10, 10, np.nan])}  # fmt: skip
    options = reproduce.Options(seeds=(1, 2), ablation_seeds=(1,))
    found = reproduce.contrast(options, tables, "lapt", "plain", "lesion_mae", (1, 2))
    assert found["per_seed"] == [-1.5, 0.5] and found["mean"] == -0.5 and found["n"] == 2
    assert found["n_lower"] == 1  # of the two patients with a lesion; the other's seeds cancel
    assert found["reference"] == 4.5 and found["ours"] == 4 and found["relative"] == pytest.approx(-0.5 / 4.5)
    start = reproduce.contrast(options, tables, "lapt", "ldm", "lesion_mae", (1, 2))
    assert start["per_seed"] == [-6.5, -5.5] and start["reference"] == 10


@pytest.mark.parametrize("lesion,dice,brain,passed", [(-1, 0.1, 0.01, (True, True, True)),
                                                      (1, -0.1, 0.03, (False, False, False))])  # fmt: skip
def test_benefit_is_judged_by_the_sign_and_the_margin(lesion, dice, brain, passed):
    apart = dict(adc_lesion_mae=[200, 200], dwi_lesion_mae=[30, 30])
    plain = table(**apart, lesion_mae=[10, 10], dice=[0.5, 0.5], dice_guide=[0.5, 0.5], auc=[0.9, 0.9], mae=[4, 4])
    ours = table(
        adc_lesion_mae=[200 + 20 * lesion] * 2,
        dwi_lesion_mae=[30, 30],
        lesion_mae=[10 + lesion] * 2,
        dice=[0.5 + dice] * 2,
        dice_guide=[0.5] * 2,
        auc=[0.9] * 2,
        mae=[4 * (1 + brain)] * 2,
    )
    tables = {"ldm": plain} | {f"{arm}_{s}": x for s in (1, 2, 3) for arm, x in (("plain", plain), ("lapt", ours))}
    results = reproduce.claim_benefit(reproduce.Options(seeds=(1, 2, 3), ablation_seeds=(1,)), tables)
    assert tuple(row["passed"] for row in results.values()) == (*passed, None)
    first = next(iter(results.values()))  # ADC and DWI in their own units beside their mean
    assert first["values"]["adc"]["mean"] == 20 * lesion and first["values"]["dwi"]["mean"] == 0
    assert f"ADC 200.0 -> {200 + 20 * lesion:.1f}" in first["ours"]


def test_auc_is_the_chance_of_a_higher_score():
    score, mask = np.array([3.0, 2.0, 1.0, 0.0, 9.0]), np.array([True] * 4 + [False])
    assert reproduce.auc(score, np.array([True, False, True, False, True]), mask) == 0.75
    assert np.isnan(reproduce.auc(score, np.zeros(5, bool), mask))


def test_ablation_seeds_must_be_among_the_seeds():
    with pytest.raises(reproduce.UserError, match="ablation_seeds"):
        reproduce.Options(seeds=(1, 2), ablation_seeds=(3,))
