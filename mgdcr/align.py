"""Bring short-axis slices and long-axis views into one place: displacements found along their intersection lines.

Every slice was taken in another breath-hold. Where a slice and a view cross, both show the same tissue, up to a gain
and an offset of the view: the displacements sought make the two profiles along the line agree. A slice moves in its
plane; a view moves across, along and off its plane, and turns in it. A weak pull towards zero settles what no line can
tell (everything moved together).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage, optimize

from mgdcr.geometry import Cine, Grid, frame_at, paired_frame
from mgdcr.intensity import robust_gain_offset

STEP_MM = 1.0  # between points of a line
MIN_LINE = 8  # points; shorter lines say nothing
SEARCH_MM = (6.0, 1.5)  # reach and step of the first, coarse search over the place of a view
PULL = 0.02  # weight of 1 mm (or 1 degree) against the mean profile difference, in units of the SAX contrast
IGNORE_MM = 0.25  # smaller displacements of a slice are within the error: its pixels stay as acquired
FRAMES = 3  # of a cine that take part, evenly spread
NUDGE = 0.1  # mm or degrees, of finite differences
UNKNOWNS = 4  # of a view: mm across, along and off its plane, degrees in it


@dataclass
class Line:
    """Where slice `number` and view `view` cross: world points (P, 3)."""

    number: int
    view: int
    points: np.ndarray


@dataclass
class Alignment:
    """slice_shifts_mm (Z, 2): true place of a slice minus that of its header, along w and h. view_poses (V, 4): of a
    view along columns, rows and normal in mm, and its turn in degrees. report: agreement before and after by view."""

    slice_shifts_mm: np.ndarray
    view_poses: np.ndarray
    report: dict = field(default_factory=dict)

    def view_grid(self, number: int, grid: Grid) -> Grid:
        """The true grid of view `number`: no pixel is resampled."""
        return posed(grid, self.view_poses[number])

    def corrected(self, data: np.ndarray, grid: Grid) -> np.ndarray:
        """The stack or cine (..., Z, H, W) with its slices moved to their true places (cubic, edges repeated).

        Slices displaced by less than IGNORE_MM come back unchanged.
        """
        out = np.array(data, dtype=np.float32)
        for number, shift in enumerate(self.slice_shifts_mm):
            if np.abs(shift).max() < IGNORE_MM:
                continue
            pixels = shift[1] / grid.spacing_mm[1], shift[0] / grid.spacing_mm[0]
            for index in np.ndindex(out.shape[:-3]):
                low, high = out[index][number].min(), out[index][number].max()
                moved = ndimage.shift(out[index][number], pixels, order=3, mode="nearest")
                out[index][number] = np.clip(moved, low, high)  # cubic splines overshoot at edges
        return out


def posed(grid: Grid, pose: np.ndarray) -> Grid:
    """A view's grid moved by pose (across, along, off the plane in mm, degrees about the middle)."""
    turn = _turn(grid.normal, np.deg2rad(pose[3]))
    affine = grid.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = grid.centre_mm + turn @ (grid.affine[:3, 3] - grid.centre_mm)
    return Grid(affine, grid.shape).moved(_basis(grid) @ pose[:3])


def _basis(grid: Grid) -> np.ndarray:
    """Unit vectors (3, 3) across, along and off a plane, in the columns."""
    return np.stack([grid.axes[:, 0], grid.axes[:, 1], grid.normal], axis=1)


def _turn(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix about a unit vector (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


# ---- lines ----------------------------------------------------------------------------------------------------------


def slice_grid(grid: Grid, number: int) -> Grid:
    """The grid of one slice of a stack."""
    affine = grid.affine.copy()
    affine[:3, 3] = grid.world([0, 0, number])
    return Grid(affine, (1, *grid.shape[1:]))


def intersection(sax: Grid, number: int, lax: Grid, step_mm: float = STEP_MM) -> np.ndarray:
    """World points (P, 3) on the line where a slice and a view cross, inside both images; (0, 3) if they do not."""
    plane = slice_grid(sax, number)
    direction = np.cross(plane.normal, lax.normal)
    length = np.linalg.norm(direction)
    if length < 1e-3:  # parallel
        return np.zeros((0, 3))
    direction /= length
    normals = np.stack([plane.normal, lax.normal, direction])
    through = np.array([plane.normal @ plane.centre_mm, lax.normal @ lax.centre_mm, direction @ plane.centre_mm])
    start = np.linalg.solve(normals, through)
    reach = np.linalg.norm(np.array(plane.shape[:0:-1]) * plane.spacing_mm[:2])
    points = start + np.arange(-reach, reach + step_mm, step_mm)[:, None] * direction
    return points[_inside(points, plane) & _inside(points, lax)]


def _inside(points: np.ndarray, grid: Grid) -> np.ndarray:
    voxels = grid.voxels(points)[:, :2]
    return ((voxels >= 0) & (voxels <= np.array(grid.shape[:0:-1]) - 1)).all(axis=1)


def lines_of(sax: Grid, views: list[Grid]) -> list[Line]:
    """All lines long enough to be compared."""
    lines = [Line(i, v, intersection(sax, i, view)) for v, view in enumerate(views) for i in range(sax.shape[0])]
    return [line for line in lines if len(line.points) >= MIN_LINE]


# ---- agreement ------------------------------------------------------------------------------------------------------


class Profiles:
    """Profiles of frames of a study along its lines, as functions of the displacements (flat: slices, then views)."""

    def __init__(self, frames: list[np.ndarray], sax: Grid, views: list[list[np.ndarray]], grids: list[Grid]):
        """frames: stacks (Z, H, W); views: by view the images (H, W) of the same phases."""
        self.frames, self.sax, self.grids = frames, sax, grids
        self.lines = lines_of(sax, grids)
        self.contrast = float(np.std(np.stack(frames))) or 1.0
        # Views in about the units of the slices, whatever their files have: the gain that is sought is near 1.
        self.units = [self.contrast / (float(np.std(np.stack(images))) or 1.0) for images in views]
        self.views = [[unit * image for image in images] for unit, images in zip(self.units, views, strict=True)]
        self.points, self.number = {}, {}  # by view: (P, 3) and the slice of each
        for view in sorted({line.view for line in self.lines}):
            mine = [line for line in self.lines if line.view == view]
            self.points[view] = np.concatenate([line.points for line in mine])
            self.number[view] = np.concatenate([np.full(len(line.points), line.number) for line in mine])

    def split(self, unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Displacements of slices (Z, 2) and poses of views (V, 4)."""
        n = 2 * self.sax.shape[0]
        return unknowns[:n].reshape(-1, 2), unknowns[n:].reshape(-1, UNKNOWNS)

    def pair(self, unknowns: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """SAX and LAX profiles (frames * P,) of all lines of a view."""
        shifts, poses = self.split(unknowns)
        moved = posed(self.grids[view], poses[view])
        points = self.points[view] + self._off(moved, self.points[view])
        places = self.sax.voxels(points - shifts[self.number[view]] @ self.sax.axes[:, :2].T)
        places[:, 2] = self.number[view]
        columns, rows = moved.voxels(points)[:, :2].T
        sax, lax = [], []
        for stack, image in zip(self.frames, self.views[view], strict=True):
            sax.append(ndimage.map_coordinates(stack, places[:, ::-1].T, order=1, mode="nearest"))
            lax.append(ndimage.map_coordinates(image, [rows, columns], order=1, mode="nearest"))
        return np.concatenate(sax), np.concatenate(lax)

    def _off(self, view: Grid, points: np.ndarray) -> np.ndarray:
        """How far the line has moved within its slice, with the view off its plane (P, 3)."""
        within = view.normal - (view.normal @ self.sax.normal) * self.sax.normal
        away = (view.centre_mm - points) @ view.normal
        return away[:, None] * within / (within @ within)

    def residuals(self, unknowns: np.ndarray, views=None, fits: dict | None = None) -> np.ndarray:
        """Differences along the lines after the best gain and offset of each view, in units of the SAX contrast.

        fits: gain and offset by view to use instead.
        """
        out = []
        for view in self.points if views is None else views:
            sax, lax = self.pair(unknowns, view)
            gain, offset = robust_gain_offset(lax, sax) if fits is None else fits[view]
            out.append((gain * lax + offset - sax) / self.contrast)
        return np.concatenate(out) if out else np.zeros(0)

    def jacobian(self, unknowns: np.ndarray) -> np.ndarray:
        """Derivatives (residuals, unknowns) by finite differences, gains and offsets held: at their best they count 0.

        A point depends on its own slice and view alone, so one unknown of every slice, or of every view, moves at once.
        """
        fits = {view: robust_gain_offset(lax, sax) for view in self.points for sax, lax in [self.pair(unknowns, view)]}
        here, n = self.residuals(unknowns, fits=fits), 2 * self.sax.shape[0]
        slices = np.concatenate([np.tile(self.number[view], len(self.frames)) for view in self.points])
        views = np.repeat(list(self.points), [len(self.frames) * len(self.points[view]) for view in self.points])
        out, rows = np.zeros((len(here), len(unknowns))), np.arange(len(here))
        for first, last, width, owner in ((0, n, 2, slices), (n, len(unknowns), UNKNOWNS, views)):
            for place in range(width):
                moved = unknowns.copy()
                moved[first + place : last : width] += NUDGE
                out[rows, first + place + width * owner] = (self.residuals(moved, fits=fits) - here) / NUDGE
        return out

    def report(self, unknowns: np.ndarray, names: list[str]) -> dict:
        """By view: lines, mean absolute difference (acquired units, after gain and offset) and NCC, gain, offset."""
        rows = {}
        for view, name in enumerate(names):
            if view not in self.points:
                rows[name] = {"lines": 0, "difference": None, "ncc": None, "gain": 1.0, "offset": 0.0}
                continue
            sax, lax = self.pair(unknowns, view)
            gain, offset = robust_gain_offset(lax, sax)
            lines = sum(line.view == view for line in self.lines)
            rows[name] = {"lines": lines, "difference": float(np.abs(gain * lax + offset - sax).mean()),
                          "ncc": ncc(sax, lax), "gain": gain * self.units[view], "offset": offset}  # fmt: skip
        return rows


def ncc(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation coefficient of two profiles; 0 where one is flat."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 1e-12 else 0.0


# ---- search ---------------------------------------------------------------------------------------------------------


def align(sax: Cine, views: dict[str, Cine], *, move_slices: bool = True, move_views: bool = True) -> Alignment:
    """Displacements of slices and views of a study, and the agreement before and after; frames paired by phase.

    Without a view that crosses the stack nothing moves. Intensities may differ between views by gain and offset.
    """
    numbers = sorted({round(n) % sax.frames for n in np.linspace(0, sax.frames / 2, min(FRAMES, sax.frames))})
    paired = [
        [frame_at(view, paired_frame(n, sax.frames, view.frames))[0].reshape(view.grid.shape[1:]) for n in numbers]
        for view in views.values()
    ]
    grids, names = [view.grid for view in views.values()], list(views)
    profiles = Profiles([sax.data[n] for n in numbers], sax.grid, paired, grids)
    zero = np.zeros(2 * sax.grid.shape[0] + UNKNOWNS * len(views))
    unknowns = zero
    if profiles.lines and (move_slices or move_views):
        unknowns = _coarse(profiles, zero) if move_views else zero
        unknowns = _fine(profiles, unknowns, move_slices, move_views)
        if np.abs(profiles.residuals(unknowns)).mean() >= np.abs(profiles.residuals(zero)).mean():
            unknowns = zero  # nothing gained: the headers are believed
    unknowns = _centred(profiles, unknowns)
    shifts, poses = profiles.split(unknowns)
    report = {"frames": numbers, "before": profiles.report(zero, names), "after": profiles.report(unknowns, names),
              "slice_shifts_mm": shifts.tolist(),
              "view_poses": dict(zip(names, poses.tolist(), strict=True))}  # fmt: skip
    return Alignment(shifts, poses, report)


def _coarse(profiles: Profiles, unknowns: np.ndarray) -> np.ndarray:
    """The best place of each view by itself, across and along, on a coarse lattice."""
    reach, step = SEARCH_MM
    places = np.arange(-reach, reach + step / 2, step)
    out = unknowns.copy()
    for view in profiles.points:
        at = 2 * profiles.sax.shape[0] + UNKNOWNS * view

        def cost(place, view=view, at=at):
            trial = unknowns.copy()
            trial[at : at + 2] = place
            return np.abs(profiles.residuals(trial, {view})).mean() + PULL * 0.1 * np.abs(place).sum()

        out[at : at + 2] = min(((a, b) for a in places for b in places), key=cost)
    return out


def _fine(profiles: Profiles, unknowns: np.ndarray, move_slices: bool, move_views: bool) -> np.ndarray:
    """Robust least squares over all displacements together."""
    n = 2 * profiles.sax.shape[0]
    free = np.concatenate([np.full(n, move_slices), np.full(len(unknowns) - n, move_views)])
    lined = {("slice", line.number) for line in profiles.lines} | {("view", line.view) for line in profiles.lines}
    for number in range(profiles.sax.shape[0]):
        free[2 * number : 2 * number + 2] &= ("slice", number) in lined
    for view in range(len(profiles.grids)):
        free[n + UNKNOWNS * view : n + UNKNOWNS * (view + 1)] &= ("view", view) in lined
    if not free.any():
        return unknowns

    points = sum(map(len, profiles.points.values())) * len(profiles.frames)
    pull = PULL * np.sqrt(points / np.count_nonzero(free))

    def placed(chosen):
        trial = unknowns.copy()
        trial[free] = chosen
        return trial

    def cost(chosen):
        return np.concatenate([profiles.residuals(placed(chosen)), pull * chosen])

    def slope(chosen):
        return np.concatenate([profiles.jacobian(placed(chosen))[:, free], pull * np.eye(len(chosen))])

    limits = np.array([8.0] * n + [8.0, 8.0, 4.0, 6.0] * len(profiles.grids))[free]  # mm, degrees of the turn
    found = optimize.least_squares(cost, unknowns[free], slope, bounds=(-limits, limits), loss="soft_l1", f_scale=0.3,
                                   max_nfev=25)  # fmt: skip
    return placed(found.x)


def _centred(profiles: Profiles, unknowns: np.ndarray) -> np.ndarray:
    """The same agreement with slices that do not move on average: what all share, the views take over."""
    shifts, poses = (part.copy() for part in profiles.split(unknowns))
    crossed = sorted({line.number for line in profiles.lines})
    if not crossed or not shifts.any():
        return unknowns
    mean = shifts[crossed].mean(axis=0)
    shifts[crossed] -= mean
    for view in profiles.points:
        poses[view, :3] -= _basis(profiles.grids[view]).T @ profiles.sax.axes[:, :2] @ mean
    return np.concatenate([shifts.ravel(), poses.ravel()])


# ---- picture --------------------------------------------------------------------------------------------------------


def save_picture(path: str | Path, sax: Cine, views: dict[str, Cine], alignment: Alignment) -> Path:
    """PNG: by view the SAX stack resliced onto it and the view itself, before and after, in stripes."""
    from matplotlib.figure import Figure

    from common import figures

    fig = Figure(figsize=(3.2 * max(len(views), 1), 6.0), layout="constrained")
    axes = fig.subplots(2, max(len(views), 1), squeeze=False)
    corrected = alignment.corrected(sax.data[0], sax.grid)
    for number, (name, view) in enumerate(views.items()):
        for row, (stack, grid) in enumerate(
            ((sax.data[0], view.grid), (corrected, alignment.view_grid(number, view.grid)))
        ):
            axes[row, number].imshow(stripes(stack, sax.grid, view.data[0, 0], grid), cmap="gray", vmin=0, vmax=1)
            stage = "after" if row else "before"
            value = alignment.report[stage][name]["ncc"]
            axes[row, number].set_title(f"{name} {stage}" + ("" if value is None else f", NCC {value:.3f}"), fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    return figures.save(fig, path)


def stripes(stack: np.ndarray, sax: Grid, image: np.ndarray, lax: Grid, width: int = 8) -> np.ndarray:
    """A view (H, W) in [0, 1] whose every other stripe of columns shows the linearly resliced SAX stack instead."""
    rows, columns = np.indices(image.shape)
    points = lax.world(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).reshape(-1, 3))
    z, y, x = sax.voxels(points).T[::-1]
    resliced = ndimage.map_coordinates(stack, [z, y, x], order=1, cval=np.nan).reshape(image.shape)
    seen = np.isfinite(resliced)
    if seen.any():  # in about the units of the slices first, as `Profiles`
        image = image * (resliced[seen].std() / (image[seen].std() or 1.0))
    gain, offset = robust_gain_offset(image[seen], resliced[seen]) if seen.any() else (1.0, 0.0)
    shown = np.where(((columns // width) % 2 == 0) & seen, resliced, gain * image + offset)
    low, high = np.nanpercentile(shown, [1, 99])
    return np.clip((shown - low) / max(high - low, 1e-12), 0, 1)
