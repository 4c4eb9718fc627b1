"""common.phantom: determinism, diffeomorphism, what each factor does and leaves alone, grids, PET truth, MUSE table."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common import phantom
from common.phantom import CORTEX, LABELS, STRUCTURES, Factors

GRID = (32, 36, 32)
TARGET, REFERENCE = (phantom.codes(LABELS, names) for names in (phantom.TARGET, phantom.REFERENCE))


def test_same_arguments_same_bytes_and_other_seed_other_head():
    factors = Factors(age=70, amyloid_load=0.5)

    def everything(seed):
        phantom._head.cache_clear()
        np.random.seed(int(seed))  # noqa: NPY002  the global generators must not matter
        torch.manual_seed(seed)
        brain = phantom.anatomy(5, GRID, factors)
        images = brain.labels(), phantom.t1_image(brain, 5), phantom.pet_image(brain, 5)
        return b"".join(a.tobytes() for a in images), brain.truth

    first, second = everything(1), everything(2)
    assert first == second
    other = phantom.anatomy(6, GRID, factors)
    assert abs(other.truth["brain_ml"] - first[1]["brain_ml"]) > 1
    assert phantom.t1_image(other, 5).tobytes() != phantom.t1_image(other, 6).tobytes()


@pytest.mark.parametrize(
    "factors",
    [Factors(), Factors(ventricle_scale=5, hippocampus_left=0.5, hippocampus_right=1.2), Factors(ventricle_scale=0.6)],
)
def test_deformation_never_folds(factors):
    for seed in range(4):
        assert phantom.anatomy(seed, (16, 16, 16), factors).truth["jacobian_min"] > 0


def test_exponential_is_inverted_by_the_opposite_field_and_jacobian_matches_a_known_map():
    rng = np.random.default_rng(0)
    velocity = phantom._smooth_noise(rng, 3, 40.0, 3.0)
    forth, back = phantom.exponential(velocity), phantom.exponential(-velocity)
    points = phantom._control_points()
    there = points + forth.movedim(0, -1)
    again = there + phantom._sample(back, there, phantom.CONTROL_ORIGIN, phantom.CONTROL_MM).movedim(0, -1)
    inner = (slice(8, -8),) * 3
    assert forth[(slice(None), *inner)].abs().max() > 4
    assert (again - points)[inner].norm(dim=-1).max() < 0.3  # mm, an order below the voxel
    stretched = points * torch.tensor([1.1, 0.9, 1.2])
    np.testing.assert_allclose(phantom.jacobian(stretched), 1.1 * 0.9 * 1.2, rtol=1e-4)


def test_ventricle_volume_follows_its_factor_and_little_else():
    truth = {s: phantom.anatomy(2, GRID, Factors(ventricle_scale=s)).truth for s in (0.7, 1.0, 1.5, 2.5, 4.0)}
    volumes = [t["ventricle_ml"] for t in truth.values()]
    assert all(a < b for a, b in zip(volumes, volumes[1:], strict=False))
    for scale, t in truth.items():
        assert t["ventricle_ml"] / truth[1.0]["ventricle_ml"] == pytest.approx(scale, rel=0.12)
        assert t["brain_ml"] == pytest.approx(truth[1.0]["brain_ml"], rel=0.01)
    assert 6 < truth[1.0]["ventricle_ml"] < 30


def test_hippocampus_factor_acts_on_its_side_only():
    base = phantom.anatomy(2, GRID).truth
    for side, other in (("left", "right"), ("right", "left")):
        small = phantom.anatomy(2, GRID, Factors(**{f"hippocampus_{side}": 0.6})).truth
        assert small[f"hippocampus_{side}_ml"] / base[f"hippocampus_{side}_ml"] == pytest.approx(0.6, abs=0.08)
        assert small[f"hippocampus_{other}_ml"] == pytest.approx(base[f"hippocampus_{other}_ml"], rel=0.01)
    labels, affine = phantom.anatomy(2, (64, 72, 64)).labels(), phantom.grid_affine((64, 72, 64))
    for name, sign in (("left", -1), ("right", 1)):
        for structure, y, z in (("hippocampus", -22, -13), ("ventricle", -15, 15)):
            centre = affine[:3, :3] @ np.argwhere(labels == LABELS[f"{structure}_{name}"]).mean(0) + affine[:3, 3]
            assert (
                centre[0] * sign > 8 and abs(centre[1] - y) < 12 and abs(centre[2] - z) < 12
            )  # RAS+: left is negative x


def test_atrophy_turns_cortex_into_fluid():
    truth = [phantom.anatomy(2, GRID, Factors(atrophy=a)).truth for a in (0, 0.3, 0.6, 1.0)]
    assert all(
        b["cortex_ml"] < 0.985 * a["cortex_ml"] and b["csf_ml"] > a["csf_ml"]
        for a, b in zip(truth, truth[1:], strict=False)
    )
    assert truth[-1]["brain_ml"] == pytest.approx(truth[0]["brain_ml"], rel=1e-3)
    assert truth[-1]["white_matter_ml"] == pytest.approx(truth[0]["white_matter_ml"], rel=0.02)
    assert truth[-1]["ventricle_ml"] == pytest.approx(truth[0]["ventricle_ml"], rel=1e-6)


def test_volumes_are_those_of_a_person():
    volumes = [phantom.anatomy(seed, (28, 32, 28)).truth for seed in range(4)]
    for t in volumes:
        assert 1200 < t["brain_ml"] < 2000 and 350 < t["white_matter_ml"] < 750 and 450 < t["cortex_ml"] < 950
        assert 1.3 < t["hippocampus_left_ml"] < 5 and 80 < t["cerebellum_grey_ml"] < 220


@pytest.mark.parametrize("shape", [(16, 16, 16), (28, 32, 28), (33, 41, 27), (64, 40, 48), (112, 128, 112)])
def test_any_grid_shows_the_same_head(shape):
    brain = phantom.anatomy(3, shape, Factors(ventricle_scale=2))
    reference = phantom.anatomy(3, (56, 64, 56), Factors(ventricle_scale=2)).truth
    labels, tissues = brain.labels(), np.stack([brain.tissue_map(n) for n in phantom.TISSUES])
    assert labels.shape == tuple(shape) and tissues.shape == (3, *shape) and tissues.dtype == np.float32
    assert tissues.min() >= 0 and tissues.sum(0).max() <= 1 + 1e-5
    assert np.ptp(brain.spacing_mm) == 0 and brain.spacing_mm[0] == pytest.approx(max(np.divide(phantom.FOV_MM, shape)))
    assert tissues.sum() * np.prod(brain.spacing_mm) / 1000 == pytest.approx(reference["brain_ml"], rel=0.01)
    for name in ("ventricle_ml", "cortex_ml", "csf_ml", "white_matter_ml"):
        assert brain.truth[name] == pytest.approx(reference[name], rel=0.03)


def test_heads_fit_the_field_of_view():
    for seed in range(6):
        edge = phantom.anatomy(seed, (56, 64, 56)).tissue.sum(0)
        assert all(np.take(edge, (0, -1), axis).max() == 0 for axis in range(3))


def test_coarse_tissue_is_the_average_of_fine_tissue():
    fine, coarse = (phantom.anatomy(3, s).tissue_map("grey") for s in ((112, 128, 112), (28, 32, 28)))
    average = fine.reshape(28, 4, 32, 4, 28, 4).mean((1, 3, 5))
    assert np.abs(average - coarse).max() < 0.2 and np.abs(average - coarse)[average > 0].mean() < 0.02
    nearest = fine[2::4, 2::4, 2::4]
    assert np.abs(nearest - coarse)[average > 0].mean() > 5 * np.abs(average - coarse)[average > 0].mean()


def test_labels_agree_with_tissues_and_affine_centres_the_head():
    brain = phantom.anatomy(4, (56, 64, 56))
    labels = brain.labels()
    grey = np.isin(labels, [LABELS[n] for n in (*CORTEX, "cerebellum_grey")])
    assert (
        brain.tissue_map("grey")[grey].mean()
        > 0.7
        > 0.15
        > brain.tissue_map("grey")[labels == LABELS["white_matter"]].mean()
    )
    assert brain.tissue_map("csf")[np.isin(labels, [2, 3])].mean() > 0.7
    assert set(np.unique(labels)) == set(LABELS.values())
    parts = {name: brain.render(phantom.LABEL_OF == code) for name, code in LABELS.items() if code}
    np.testing.assert_allclose(
        sum(parts.values()),
        brain.tissue.sum(0) if brain.k == (1, 1, 1) else phantom.block_mean(brain.tissue.sum(0), brain.k),
        atol=1e-5,
    )
    for name, part in parts.items():
        assert part.sum(dtype=np.float64) * np.prod(brain.spacing_mm) / 1000 == pytest.approx(
            brain.truth[f"{name}_ml"], rel=1e-3
        )
    centre = brain.affine @ [*(np.array(labels.shape) - 1) / 2, 1]
    np.testing.assert_allclose(centre[:3], phantom.CENTRE_MM)


def test_a_session_is_the_same_head_with_other_factors():
    young, old = (
        phantom.anatomy(7, GRID, Factors(age=a, atrophy=b, ventricle_scale=c))
        for a, b, c in ((60, 0.1, 1), (75, 0.5, 2))
    )
    stranger = phantom.anatomy(8, GRID, Factors(age=60, atrophy=0.1))
    first, second, third = (phantom.t1_image(b, 0) for b in (young, old, stranger))
    assert np.abs(first - second).mean() < 0.6 * np.abs(first - third).mean()


def test_t1_contrast():
    brain = phantom.anatomy(1, (56, 64, 56), Factors(age=80))
    t1, labels = phantom.t1_image(brain, 1), brain.labels()
    csf, grey, white = (t1[np.isin(labels, c)].mean() for c in ((2, 3), [LABELS[n] for n in CORTEX], [4]))
    assert 0.1 < csf < 0.45 < grey < 0.72 < white < 1.0
    assert (
        t1.dtype == np.float32
        and np.isfinite(t1).all()
        and (t1[phantom.block_mean(brain.tissue.sum(0), brain.k) == 0] == 0).all()
    )


def test_pet_recovers_the_load():
    loads, measured, truth = (0.0, 0.25, 0.5, 0.75, 1.0), [], []
    for load in loads:
        brain = phantom.anatomy(1, (56, 64, 56), Factors(amyloid_load=load))
        pet, labels = phantom.pet_image(brain, 1), brain.labels()
        measured.append(phantom.composite_suvr(pet, labels, TARGET, REFERENCE))
        truth.append(brain.truth["composite_suvr"])
    assert np.all(np.diff(truth) > 0.15) and np.all(np.diff(measured) > 0.1)
    assert np.corrcoef(truth, measured)[0, 1] > 0.999
    assert np.abs(np.subtract(truth, measured)).max() < 0.35  # partial volume pulls high cortical uptake down
    assert pet[np.isin(labels, REFERENCE)].mean() == pytest.approx(1.0, abs=0.15)
    gains = {n: STRUCTURES[n][2:] for n in phantom.TARGET}
    assert min(b for b, _ in gains.values()) < truth[0] < max(b for b, _ in gains.values())
    sharp = phantom.pet_image(brain, 1, noise=0, heterogeneity=0, fwhm_mm=0)
    exact = brain.render(phantom.LABEL_OF == LABELS["precuneus"]) > 0.98
    np.testing.assert_allclose(sharp[exact], sum(STRUCTURES["precuneus"][2:]), rtol=0.02)


def test_muse_table_has_each_code_once_and_covers_the_composite():
    codes = phantom.codes(phantom.MUSE, phantom.MUSE)
    assert len(codes) == len(set(codes)) and set(phantom.MUSE) == set(LABELS) - {"background"}
    cortex = phantom.codes(phantom.MUSE, CORTEX)
    assert (
        min(cortex) == 100
        and max(cortex) == 207
        and len(cortex) == 98
        and {c + 1 for c in cortex if c % 2 == 0} <= set(cortex)
    )


def test_pet_from_labels_is_deterministic_and_monotone():
    labels = phantom.anatomy(1, (56, 64, 56)).labels()
    pets = [
        phantom.pet_from_labels(labels, LABELS_AS_GROUPS, load, (3, 3, 3), np.random.default_rng(0))
        for load in (0, 0.5, 1)
    ]
    suvr = [phantom.composite_suvr(p, labels, TARGET, REFERENCE) for p in pets]
    assert np.all(np.diff(suvr) > 0.2)
    again = phantom.pet_from_labels(labels, LABELS_AS_GROUPS, 1, (3, 3, 3), np.random.default_rng(0))
    assert again.tobytes() == pets[-1].tobytes() and np.isnan(phantom.composite_suvr(again, labels, [999], REFERENCE))


LABELS_AS_GROUPS = {name: (code,) for name, code in LABELS.items() if code}


@pytest.mark.skipif("REAL_DATA_DIR" not in os.environ, reason="REAL_DATA_DIR is not set")
def test_muse_table_on_real_label_maps():
    import nibabel as nib

    files = sorted(Path(os.environ["REAL_DATA_DIR"]).glob("brain_t1/ixi_2mm_dlmuse/*.nii.gz"))[:3]
    assert files
    known = set(phantom.codes(phantom.MUSE, phantom.MUSE))
    for file in files:
        image = nib.as_closest_canonical(nib.load(file))
        labels = np.asarray(image.dataobj).astype(np.int32)
        assert set(np.unique(labels)) - {0} <= known
        centre = {n: np.argwhere(np.isin(labels, c)).mean(0) for n, c in phantom.MUSE.items()}
        assert (
            centre["hippocampus_left"][0] < centre["hippocampus_right"][0]
            and centre["ventricle_left"][0] < centre["ventricle_right"][0]
        )
        assert centre["occipital"][1] < centre["precuneus"][1] < centre["parietal"][1] + 8 < centre["frontal"][1]
        assert centre["cerebellum_grey"][2] < centre["temporal"][2] < centre["parietal"][2]
        suvr = []
        for load in (0.1, 0.9):
            pet = phantom.pet_from_labels(labels, phantom.MUSE, load, (2, 2, 2), np.random.default_rng(0))
            suvr.append(
                phantom.composite_suvr(
                    pet,
                    labels,
                    phantom.codes(phantom.MUSE, phantom.TARGET),
                    phantom.codes(phantom.MUSE, phantom.REFERENCE),
                )
            )
        assert suvr[0] < 1.35 < 1.5 < suvr[1]
