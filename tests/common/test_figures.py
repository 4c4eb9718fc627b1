"""Orientation, windows and aspect of the pictures, read back from the PNG files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from common import figures


def pixels(path):
    return np.round(imread(path)[..., :3] * 255).astype(int)


@pytest.mark.parametrize("name,axis", [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_plane_is_shown_superior_and_anterior_up_with_the_right_side_on_the_left(name, axis):
    shape = (5, 6, 7)
    volume = np.arange(np.prod(shape)).reshape(shape)
    picture = figures.plane(volume, name, 3)
    columns, rows = (a for a in range(3) if a != axis)
    assert picture.shape == (shape[rows], shape[columns])
    start, end = [3, 3, 3], [3, 3, 3]  # highest index of both in-plane axes (R/A, A/S) is the top left corner
    start[columns], start[rows], end[columns], end[rows] = shape[columns] - 1, shape[rows] - 1, 0, 0
    assert picture[0, 0] == volume[tuple(start)] and picture[-1, -1] == volume[tuple(end)]


@pytest.mark.parametrize("name", ["sagittal", "coronal", "axial"])
def test_bright_corner_lands_at_the_top_left_of_the_png(tmp_path, name):
    volume = np.zeros((20, 20, 20), np.float32)
    axis = figures.PLANES[name]
    corner = [slice(14, 20)] * 3
    corner[axis] = slice(None)
    volume[tuple(corner)] = 1
    path = figures.montage(tmp_path / "a.png", {"": volume}, planes=(name,), window=(0, 1), cmap="plasma")
    image = pixels(path)
    low, high = ((np.abs(image - c) <= 1).all(axis=-1) for c in ((13, 8, 135), (240, 249, 33)))
    panel = np.nonzero(low[:, : image.shape[1] * 3 // 4])  # the colour bar lies to the right
    spot = np.nonzero(high[:, : image.shape[1] * 3 // 4])
    assert abs(spot[0].min() - panel[0].min()) <= 2 and spot[0].max() < np.mean([panel[0].min(), panel[0].max()])
    assert abs(spot[1].min() - panel[1].min()) <= 2 and spot[1].max() < np.mean([panel[1].min(), panel[1].max()])


def test_equal_values_are_equally_grey_in_every_panel(tmp_path):
    a = np.full((16, 16, 16), 0.25, np.float32)
    b = a.copy()
    a[:4] = 1.0  # b alone would be given another window
    one = pixels(figures.montage(tmp_path / "one.png", {"a": a}, planes=("axial",), window=(0, 1)))
    both = tmp_path / "new folder" / "both.png"
    both = pixels(figures.montage(both, [("a", a), ("b", b)], planes=("axial",), window=(0, 1)))
    grey = (64, 64, 64)
    count = [(image == grey).all(axis=-1).sum() for image in (one, both)]
    assert count[0] > 10_000 and count[1] / count[0] == pytest.approx(1 + 4 / 3, rel=0.03)
    a[8:12] = b[8:12] = 0.5  # a third of the shared window 0.25 to 1, the top of b's own
    auto = pixels(figures.montage(tmp_path / "auto.png", {"a": a, "b": b}, planes=("axial",)))
    grey = (np.abs(auto - 85) <= 1).all(axis=-1).nonzero()[1]
    middle = np.nonzero((auto == 0).all(axis=-1))[1].mean()
    assert (grey < middle).sum() / (grey > middle).sum() == pytest.approx(1, rel=0.1)


def test_aspect_follows_the_voxel_size(tmp_path):
    volume = torch.zeros(1, 20, 20, 5)  # 40 x 40 x 40 mm
    volume[:, 8:12, :, 2:3] = 1
    path = figures.montage(tmp_path / "a.png", {"x": volume}, planes=("coronal",), window=(0, 1), spacing_mm=(2, 2, 8),
                           cmap="plasma")
    spot = np.nonzero((np.abs(pixels(path)[:, :400] - (240, 249, 33)) <= 1).all(axis=-1))
    height, width = np.ptp(spot[0]) + 1, np.ptp(spot[1]) + 1
    assert width > 50 and height / width == pytest.approx(1.0, abs=0.05)  # 8 mm by 4 x 2 mm


def test_difference_has_its_own_symmetric_window(tmp_path):
    reference = np.full((16, 16, 16), 10.0, np.float32)
    pred = reference.copy()
    pred[10:] += 0.5
    pred[:6] -= 0.5
    image = pixels(figures.montage(tmp_path / "d.png", {"mri": reference + 2, "true": reference, "pred": pred},
                                   planes=("axial",), difference_to="true", difference_of=["pred"], unit="SUVR"))
    red, blue = ((np.abs(image - c) <= 1).all(axis=-1) for c in ((103, 0, 31), (5, 48, 97)))  # ends of RdBu_r
    white = (np.abs(image - 247) <= 2).all(axis=-1).sum()  # no difference is the middle of the map
    assert red.sum() > 5_000 and white / red.sum() == pytest.approx(4 / 6, rel=0.1)
    assert red.sum() / blue.sum() == pytest.approx(1, rel=0.1)
    assert np.nonzero(red)[1].mean() < np.nonzero(blue)[1].mean()  # raised where x is high: the patient's right
    same = figures.montage(tmp_path / "same.png", {"a": reference, "b": reference}, difference_to="a")
    assert same.stat().st_size > 1_000  # no difference at all still draws


def test_overlay_outlines_masks_and_colours_maps(tmp_path):
    background = np.linspace(0, 1, 20**3, dtype=np.float32).reshape(20, 20, 20)
    mask = np.zeros(background.shape, bool)
    mask[5:15, 5:15, 5:15] = True

    def coloured(path):
        image = pixels(path)
        return (np.ptp(image, axis=-1) > 60).sum()

    plain = coloured(figures.montage(tmp_path / "p.png", {"": background}))
    outline = coloured(figures.overlay(tmp_path / "o.png", background, mask))
    filled = coloured(figures.overlay(tmp_path / "f.png", background, mask * 0.6, foreground_window=(0, 1)))
    assert plain == 0 and outline > 1_000 and filled > 5 * outline
    assert coloured(figures.overlay(tmp_path / "e.png", background, np.zeros_like(mask))) == 0


def test_curves_are_written(tmp_path):
    x = np.arange(1, 30)
    path = figures.curves(tmp_path / "c.png", {"train": (x, 1 / x), "val": (x, 2 / x, 1 / x, 3 / x)}, xlabel="step",
                          ylabel="loss", log_y=True)
    blue, orange = ((np.abs(pixels(path) - c) <= 45).all(axis=-1).sum() for c in ((31, 119, 180), (255, 127, 14)))
    assert blue > 300 and orange > 300
    path = figures.curves(tmp_path / "s.png", {"a": (x, x)}, xlabel="x", ylabel="y", diagonal=True, points=True)
    assert pixels(path).shape[0] == pixels(path).shape[1]


def test_volumes_on_other_grids_are_refused(tmp_path):
    with pytest.raises(ValueError, match="share a grid"):
        figures.montage(tmp_path / "x.png", {"a": np.zeros((8, 8, 8)), "b": np.zeros((8, 8, 9))})
    with pytest.raises(ValueError, match="one \\(D, H, W\\) volume"):
        figures.montage(tmp_path / "x.png", {"a": np.zeros((2, 8, 8, 8))})
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_never_imported():
    code = "import sys; import common.figures; raise SystemExit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=environment).returncode == 0


def test_names_that_occur_twice_are_refused(tmp_path):
    """A dict would keep one of them only, under the wrong volume."""
    x = np.zeros((8, 8, 8), np.float32)
    with pytest.raises(ValueError, match="names of their own"):
        figures.montage(tmp_path / "a.png", [("AD", x), ("decoded", x), ("CN", x), ("decoded", x)])
