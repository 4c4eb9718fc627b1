"""Reconstruction errors: by hand, in both units, inside the mask and by region, and over subjects."""

import csv
import json

import numpy as np
import pytest
import torch

from common.cli import UserError
from neuroldm3d.preprocess import Preparation
from neuroldm3d.VAE import evaluation
from neuroldm3d.VAE.evaluation import errors, reconstruction_metrics

SHAPE = (9, 11, 8)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    real = rng.random(SHAPE) * 4  # normalised units of scale 0.25: fractions up to 1
    return real, real + 0.1 * rng.standard_normal(SHAPE)


def test_errors_by_hand(pair):
    real, recon = pair
    found, squared = errors(real, recon, data_range=4.0), (real - recon) ** 2
    assert found["mse"] == pytest.approx(squared.mean()) and found["mae"] == pytest.approx(abs(real - recon).mean())
    assert found["psnr"] == pytest.approx(10 * np.log10(16 / squared.mean()))
    assert found["psnr_own_range"] == pytest.approx(10 * np.log10(np.ptp(real) ** 2 / squared.mean()))
    assert found["nmse"] == pytest.approx(squared.mean() / real.var())
    assert errors(real, np.full(SHAPE, real.mean()), data_range=4.0)["nmse"] == pytest.approx(1)  # as good as the mean


def test_errors_inside_a_mask_see_nothing_else(pair):
    real, recon = pair
    mask = np.zeros(SHAPE, bool)
    mask[2:5, 3:9] = True
    found = errors(real, recon, data_range=4.0, mask=mask)
    spoiled = np.where(mask, recon, 99.0)
    outside = errors(real, spoiled, data_range=4.0, mask=mask)
    inside = {name for name in found if name.endswith("_mask")}
    assert inside == {"mse_mask", "mae_mask", "psnr_mask", "psnr_own_range_mask", "nmse_mask"}
    assert all(found[name] == pytest.approx(outside[name]) for name in inside) and outside["mse"] > found["mse"]
    assert found["nmse_mask"] == pytest.approx(((real - recon)[mask] ** 2).mean() / real[mask].var())


def test_native_and_zscored_units_are_one_error_in_two_units(pair):
    """zscored is in standard deviations of the volume on disk, whatever the network's own normalisation was."""
    real, recon = pair
    sd = 0.22
    native = reconstruction_metrics(real, recon, Preparation(), source_sd=sd)
    assert native["native"]["mse"] == pytest.approx(((real - recon) ** 2).mean() * 0.25**2)
    assert native["zscored"]["mse"] == pytest.approx(native["native"]["mse"] / sd**2)
    assert native["zscored"]["mae"] == pytest.approx(native["native"]["mae"] / sd)
    for name in ("psnr", "nmse", "psnr_own_range"):
        assert native["zscored"][name] == pytest.approx(native["native"][name])
    fractions, fractions_recon = 0.25 * real, 0.25 * recon
    z, z_recon = (fractions - fractions.mean()) / sd, (fractions_recon - fractions.mean()) / sd
    zscored = reconstruction_metrics(z, z_recon, Preparation(norm="zscore"), source_sd=sd)
    for unit in ("native", "zscored"):
        assert zscored[unit] == pytest.approx(native[unit])
    assert native["native"]["psnr"] == pytest.approx(-10 * np.log10(native["native"]["mse"]))  # declared range 1


def test_regions(pair):
    real, recon = pair
    labels = np.zeros(SHAPE, int)
    labels[:2], labels[2:4], labels[4] = 1, 2, 7
    regions = {"hippocampus": (1, 7), "thalamus": (2,), "absent": (9,)}
    found = reconstruction_metrics(real, recon, Preparation(), source_sd=0.25, labels=labels, regions=regions)[
        "regions"
    ]
    assert list(found) == ["hippocampus", "thalamus"]
    inside = np.isin(labels, (1, 7))
    assert found["hippocampus"]["voxels"] == inside.sum()
    assert found["hippocampus"]["mse"] == pytest.approx(((real - recon)[inside] ** 2).mean())  # scale over sd is 1
    assert found["thalamus"]["nmse"] == pytest.approx(((real - recon)[2:4] ** 2).mean() / real[2:4].var())


def test_perfect_and_unusable_reconstructions(pair):
    real, _ = pair
    found = reconstruction_metrics(real, real, Preparation(), source_sd=0.2)["native"]
    assert found["mse"] == found["nmse"] == 0 and found["psnr"] == 100
    assert np.isnan(errors(np.ones(SHAPE), real, data_range=1.0)["nmse"])
    with pytest.raises(ValueError, match="differ in shape"):
        errors(real, real[1:], data_range=1.0)
    with pytest.raises(ValueError, match="NaN"):
        errors(real, np.full(SHAPE, np.nan), data_range=1.0)
    with pytest.raises(ValueError, match="mask is empty"):
        errors(real, real + 1, data_range=1.0, mask=np.zeros(SHAPE, bool))


def test_brain_mask_is_of_the_group_mean():
    volumes = [np.zeros(SHAPE), np.zeros(SHAPE)]
    volumes[0][2:4, 2:4, 2:4], volumes[1][2:6, 2:4, 2:4] = 1.0, 1.0
    volumes[0][8, 8, 7] = 0.15  # 7.5 % of the mean's range
    mask = evaluation.brain_mask(volumes)
    assert mask.sum() == 16 and mask[2:6, 2:4, 2:4].all()
    assert evaluation.brain_mask(iter(volumes), limit=1).sum() == 9
    with pytest.raises(UserError, match="no volumes"):
        evaluation.brain_mask([])


def test_unit_range_is_that_of_each_real_volume():
    real = torch.stack([torch.arange(8.0).view(1, 2, 2, 2), 10 * torch.arange(8.0).view(1, 2, 2, 2)])
    unit_real, unit_recon = evaluation.to_unit_range(real, real + 7)
    for k in range(2):
        assert unit_real[k].min() == -1 and unit_real[k].max() == 1
    assert unit_recon.max() == 1 and unit_recon[0].min() == 1 and unit_recon[1].min().item() == pytest.approx(-0.8)
    assert evaluation.to_unit_range(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2))[0].eq(-1).all()


def test_report_over_subjects(tmp_path, pair):
    real, recon = pair
    labels = np.ones(SHAPE, int)
    rows = []
    for k in range(4):
        regions = {"hippocampus": (1,)} if k else {}
        found = reconstruction_metrics(
            real, real + (k + 1) * (recon - real), Preparation(), source_sd=0.25, labels=labels, regions=regions
        )
        rows.append({"name": f"sub{k}", "label": k % 2} | evaluation.flatten(found))
    summary = evaluation.write_report(tmp_path, rows, {"latent": "mean"})
    with open(tmp_path / "per_subject_metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["sub0", "sub1", "sub2", "sub3"]
    assert table[0]["region_hippocampus_mse"] == "" and float(table[3]["region_hippocampus_mse"]) > 0
    assert float(table[2]["native_mse"]) == pytest.approx(9 * float(table[0]["native_mse"]))
    saved = json.loads((tmp_path / "summary_metrics.json").read_text())
    assert saved["n"] == 4 and saved["options"] == {"latent": "mean"} and saved["data_range"]["native"] == 1
    by_class = saved["metrics"]
    assert by_class["all"]["native_mse"]["n"] == 4 and by_class["HC"]["native_mse"]["n"] == 2
    assert by_class["all"]["region_hippocampus_mse"]["n"] == 3
    values = [float(row["native_mse"]) for row in table]
    assert summary["metrics"]["all"]["native_mse"]["mean"] == pytest.approx(np.mean(values))
    assert summary["metrics"]["TLE"]["native_mse"]["mean"] == pytest.approx(np.mean(values[1::2]))
