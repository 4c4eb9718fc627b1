"""Core by threshold, contrast, overlap and lesions by size, on volumes whose answers can be counted by hand."""

import numpy as np
import pytest

from lapt import lesions

SHAPE = (12, 12, 6)
AFFINE = np.diag([4.0, 4.0, 5.0, 1.0])  # 0.08 ml a voxel


@pytest.fixture
def brain():
    """Mask, lesion of 2 x 3 x 1 voxels and one of a single voxel, ADC of 800 and 400 in them."""
    mask = np.zeros(SHAPE, bool)
    mask[1:11, 1:11] = True
    lesion = np.zeros(SHAPE, bool)
    lesion[2:4, 2:5, 2] = True
    lesion[9, 9, 4] = True
    adc = np.where(lesion, 400.0, 800.0).astype(np.float32) * mask
    return mask, lesion, adc


def test_sizes_come_from_the_affine():
    turned = AFFINE.copy()
    turned[:2, :2] = [[0, -4], [4, 0]]
    for affine in (AFFINE, turned):
        assert lesions.voxel_ml(affine) == pytest.approx(0.08)
        assert lesions.spacing_mm(affine) == pytest.approx((4, 4, 5))


def test_core_is_below_the_threshold_and_inside_the_mask(brain):
    mask, lesion, adc = brain
    assert np.array_equal(lesions.core_mask(adc, mask), lesion)  # the background is 0, and no core
    adc[2, 2, 2] = lesions.ADC_CORE
    assert lesions.core_mask(adc, mask).sum() == lesion.sum() - 1
    assert lesions.core_mask(adc, mask, threshold=900).sum() == mask.sum()


def test_contrast_is_taken_away_from_the_lesion(brain):
    """Tissue within 8 mm does not count: whatever stands there leaves the contrast as it is."""
    mask, lesion, adc = brain
    reference = lesions.reference_tissue(lesion, mask, (4, 4, 5))
    assert not (reference & lesion).any() and not reference[4, 4, 2] and reference[7, 7, 2] and not reference[0, 0, 0]
    adc[4, 4, 2] = 1e5
    assert lesions.contrast(adc, lesion, reference) == pytest.approx(0.5)
    assert lesions.contrast(adc, np.zeros_like(lesion), reference) is None
    full = lesions.reference_tissue(mask & ~lesion, mask, (4, 4, 5))  # nothing is far away
    assert np.array_equal(full, lesion)


def test_errors_inside_the_lesion(brain):
    mask, lesion, adc = brain
    predicted = adc + np.where(lesion, 100, 7).astype(np.float32) * mask
    predicted[9, 9, 4] -= 300  # one of seven voxels is 200 too low
    row = lesions.lesion_errors(predicted, adc, lesion, mask, (4, 4, 5))
    assert row["lesion_mae"] == pytest.approx((6 * 100 + 200) / 7)
    assert row["lesion_bias"] == pytest.approx((6 * 100 - 200) / 7)
    ours = (400 + (6 * 100 - 200) / 7) / 807
    assert row["lesion_contrast"] == pytest.approx(ours) and row["lesion_contrast_real"] == pytest.approx(0.5)
    assert row["lesion_contrast_error"] == pytest.approx(abs(ours - 0.5))
    empty = lesions.lesion_errors(predicted, adc, np.zeros_like(lesion), mask, (4, 4, 5))
    assert set(empty) == set(row) and set(empty.values()) == {None}


def test_overlap_of_lesion_bearing_and_lesion_free_cases(brain):
    _, lesion, _ = brain
    found = lesion.copy()
    found[9, 9, 4] = False
    row = lesions.overlap(found, lesion, AFFINE)
    assert row["dice"] == pytest.approx(2 * 6 / 13) and row["false_positive_ml"] is None
    assert row["volume_error_ml"] == pytest.approx(-0.08) and row["volume_abs_error_ml"] == pytest.approx(0.08)
    assert row["true_volume_ml"] == pytest.approx(0.56)
    missed = lesions.overlap(np.zeros_like(lesion), lesion, AFFINE)
    assert missed["dice"] == 0 and missed["hd95_mm"] == pytest.approx(np.linalg.norm([48, 48, 30]))  # never dropped
    invented = lesions.overlap(found, np.zeros_like(lesion), AFFINE)
    assert invented["dice"] is None and invented["hd95_mm"] is None
    assert invented["false_positive_ml"] == pytest.approx(0.48) == invented["volume_error_ml"]


def test_size_classes():
    edges = (1.0, 10.0, 70.0)
    assert lesions.size_classes(edges) == ["0-1 ml", "1-10 ml", "10-70 ml", ">=70 ml"]
    found = [lesions.size_class(ml, edges) for ml in (0.0, 0.999, 1.0, 69.9, 70.0, 1e4)]
    assert found == ["0-1 ml", "0-1 ml", "1-10 ml", "10-70 ml", ">=70 ml", ">=70 ml"]


def test_each_lesion_has_a_row_and_each_class_a_line(brain):
    mask, lesion, adc = brain
    predicted = adc + 50 * lesion
    found = lesion.copy()
    found[2, 2, 2] = found[9, 9, 4] = False
    rows = lesions.component_rows({"adc": (predicted, adc)}, lesion, mask, AFFINE, found, (0.1, 1.0))
    assert [row["ml"] for row in rows] == pytest.approx([0.48, 0.08])  # the largest first
    assert [row["size"] for row in rows] == ["0.1-1 ml", "0-0.1 ml"]
    assert [row["found"] for row in rows] == pytest.approx([5 / 6, 0])
    assert all(row["adc_mae"] == row["adc_bias"] == 50 for row in rows)
    assert all(row["adc_contrast_error"] == pytest.approx(50 / 800) for row in rows)
    table = lesions.size_table([{"case": "a", "method": "m"} | row for row in rows], (0.1, 1.0))
    assert [line["size"] for line in table] == ["0-0.1 ml", "0.1-1 ml", ">=1 ml"]
    assert [(line["lesions"], line["cases"]) for line in table] == [(1, 1), (1, 1), (0, 0)]
    assert table[1]["found"] == pytest.approx(5 / 6) and table[2]["found"] is None
    assert lesions.component_rows({}, np.zeros_like(lesion), mask, AFFINE, found) == []


def test_diagonal_neighbours_are_one_lesion():
    lesion = np.zeros(SHAPE, bool)
    lesion[1, 1, 1] = lesion[2, 2, 2] = lesion[6, 6, 1] = True
    assert [int(part.sum()) for part in lesions.components(lesion)] == [2, 1]


def test_lesion_probability_is_the_share_of_samples(brain):
    mask, lesion, adc = brain
    samples = np.stack([adc, adc, np.full(SHAPE, 800, np.float32), adc])
    probability = lesions.lesion_probability(samples, mask)
    assert probability.dtype == np.float32 and probability.shape == SHAPE
    assert np.array_equal(probability, np.where(lesion, np.float32(0.75), 0))
