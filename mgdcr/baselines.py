"""What the inverse optimisation is compared with, and starts its images from: dense volumes from the acquired slices.

    nearest, linear, cubic, lanczos    interpolation along the slices alone
    lax_residual                       plus what the long-axis views say it misses, spread about the heart's axis
    diffae, unconditional              decoded codes between the slices, without any optimisation

Stacks are (Z, H, W), volumes (N, H, W) float32 with N = f(Z-1)+1; slice f*i of an interpolation is acquired slice i.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from scipy.interpolate import CubicSpline, griddata

from common.cli import UserError
from mgdcr.objective import View, contrast, seeds

INTERPOLATIONS = ("nearest", "linear", "cubic", "lanczos")
LANCZOS_LOBES = 3
REACH_MM = 25.0  # along the arc from the nearest half plane, where a residual counts half
SMOOTH_PX = 0.5  # Gaussian on the residual of a view, in dense slices and in pixels: noise, not anatomy
FLAT = 0.2  # a view whose normal has so little in-plane part lies along the slices and says nothing between them
NEAR_SLICE = 0.75  # dense slices; so close to an acquired slice, a view shows what that slice shows
MIDDLE = 0.25  # share of a gap; further from both acquired slices, a view shows what they do not


# ---- along the slices -----------------------------------------------------------------------------------------------


def interpolate(stack: np.ndarray, factor: int, kind: str = "linear") -> np.ndarray:
    """Dense volume of a stack by one of INTERPOLATIONS; fewer than three slices have no cubic and get linear."""
    return _at(stack, np.arange(factor * (len(stack) - 1) + 1) / factor, kind)


def _at(stack: np.ndarray, positions: np.ndarray, kind: str) -> np.ndarray:
    """Slices of `stack` at fractional `positions`; float32."""
    n = len(stack)
    if kind not in INTERPOLATIONS:
        raise UserError(f"interpolation {kind!r}: choose {', '.join(INTERPOLATIONS)}")
    if kind == "cubic" and n > 2:
        return CubicSpline(np.arange(n), stack, axis=0)(positions).astype(np.float32)
    rows = np.arange(n)[None]
    if kind == "nearest":
        weights = (np.clip(np.floor(positions + 0.5), 0, n - 1)[:, None] == rows).astype(np.float64)
    elif kind == "lanczos":
        weights = _lanczos(positions, n)
    else:
        weights = np.clip(1 - np.abs(positions[:, None] - rows), 0, None)
    return np.einsum("kz,zhw->khw", weights, stack).astype(np.float32)


def _lanczos(positions: np.ndarray, n: int) -> np.ndarray:
    """Weights (K, n) of the windowed sinc; beyond the ends the last slice is repeated."""
    taps = np.arange(1 - LANCZOS_LOBES, LANCZOS_LOBES + 1)
    index = np.floor(positions).astype(int)[:, None] + taps
    distance = positions[:, None] - index
    inside = np.abs(distance) < LANCZOS_LOBES
    values = np.where(inside, np.sinc(distance) * np.sinc(distance / LANCZOS_LOBES), 0)
    values /= values.sum(1, keepdims=True)
    weights = np.zeros((len(positions), n))
    np.add.at(weights, (np.arange(len(positions))[:, None], np.clip(index, 0, n - 1)), values)
    return weights


def left_out(stack: np.ndarray, kind: str) -> np.ndarray:
    """Inner slices (Z - 2, H, W) of a stack, each interpolated from all others; float32."""
    places = np.arange(len(stack), dtype=np.float64)
    out = []
    for i in range(1, len(stack) - 1):
        others = np.delete(stack, i, axis=0)
        if kind == "cubic" and len(others) > 2:
            out.append(CubicSpline(np.delete(places, i), others, axis=0)(i))
        elif kind == "nearest":
            out.append(others[i])
        else:
            out.append((others[i - 1].astype(np.float64) + others[i]) / 2)
    return np.stack(out).astype(np.float32)


def better_interpolation(*stacks: np.ndarray) -> str:
    """ "linear" or "cubic", whichever predicts inner acquired slices better from the others: no truth needed.

    Of several stacks, the phases of a heart, one answer for all.
    """
    if min(map(len, stacks)) < 5:
        return "linear"

    def error(kind: str) -> float:
        return sum(np.square(left_out(stack, kind) - stack[1:-1]).mean() for stack in stacks)

    return min(("linear", "cubic"), key=error)


# ---- residual of the long-axis views --------------------------------------------------------------------------------


def view_contrast(volume: torch.Tensor, view: View, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and offset from `volume` to a view, taken where the view crosses acquired slices, which need no guessing."""
    prediction = view.sampler.sample(volume)
    position = view.sampler.coordinates[:, 0]
    near = (position - (position / factor).round() * factor).abs() < NEAR_SLICE
    weights = view.weights * near
    return contrast(prediction, view.values, weights if (weights > 0).sum() >= 64 else view.weights)


def trust(volume: torch.Tensor, view: View, factor: int) -> float:
    """How far a view is to be believed, 0 to 1, on an interpolation (N, H, W): 1 - (error / residual)^2, mean squares.

    Next to the acquired slices view and interpolation show the same tissue. What they differ by there is error: noise,
    misalignment, another contrast. Where it is as large as the residual between the slices, that says nothing.
    """
    gain, offset = view_contrast(volume, view, factor)
    residual = ((view.values - offset) / gain - view.sampler.sample(volume)).square()
    position = view.sampler.coordinates[:, 0]
    away = (position - (position / factor).round() * factor).abs()
    near, between = (residual[(view.weights > 0) & part] for part in (away < NEAR_SLICE, away >= MIDDLE * factor))
    if min(len(near), len(between)) < 64 or between.mean() <= 0:
        return 1.0
    return float((1 - (near.mean() / between.mean()).square()).clamp(0, 1))


def lax_residual(
    volume: np.ndarray, views: list[View], factor: int, spacing_mm: tuple[float, float], reach_mm: float = REACH_MM
) -> np.ndarray:
    """`volume` (N, H, W) plus the difference to the views, spread over every slice; acquired slices stay as they are.

    The planes cut a slice in lines that meet near the heart's axis. A voxel takes the residual at its own distance
    from there on the two neighbouring half lines, linearly in the angle, the less the further (arc length) they are.
    Residuals count by the weights of the views. spacing_mm is the in-plane voxel size (rows, columns).
    """
    dense = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))
    planes = []
    for view in views:
        gain, offset = view_contrast(dense, view, factor)
        residual = (view.values - offset) / gain - view.sampler.sample(dense)
        plane = _Plane.fit(view, view.weights * residual, volume.shape, spacing_mm)
        if plane is not None:
            planes.append(plane)
    out = np.array(volume, dtype=np.float32)
    if planes:
        for k in range(len(out)):
            if k % factor:
                out[k] += _spread(planes, k, out.shape[1:], spacing_mm, reach_mm)
    return out


class _Plane:
    """A view's plane in (slice, row mm, column mm) and its residual on a grid of slices and mm along the slice."""

    def __init__(self, normal, centre, residual, start, step):
        self.normal, self.centre, self.residual, self.start, self.step = normal, centre, residual, start, step
        self.across = normal[1:] / np.linalg.norm(normal[1:])
        self.along = np.array([-self.across[1], self.across[0]])

    @classmethod
    def fit(cls, view: View, residual: torch.Tensor, shape, spacing_mm):
        """None for a view without usable pixels, or one that lies along the slices."""
        used = (view.weights > 0).cpu().numpy()
        if used.sum() < 3:
            return None
        points = view.sampler.coordinates.cpu().numpy().astype(np.float64)[used] * [1.0, *spacing_mm]
        centre = points.mean(0)
        normal = np.linalg.svd(points - centre, full_matrices=False)[2][-1]
        if np.linalg.norm(normal[1:]) < FLAT:
            return None
        plane = cls(normal, centre, None, 0.0, min(spacing_mm))
        along = (points[:, 1:] - centre[1:]) @ plane.along
        plane.start = along.min()
        columns = plane.start + plane.step * np.arange(math.ceil(np.ptp(along) / plane.step) + 1)
        grid = np.meshgrid(np.arange(shape[0]), columns, indexing="ij")
        values = residual.detach().cpu().numpy()[used]
        scale = plane.step  # so that the triangles of the scattered pixels are not slivers
        image = griddata((points[:, 0], along / scale), values, (grid[0], grid[1] / scale), "linear", fill_value=0.0)
        plane.residual = ndimage.gaussian_filter(image, SMOOTH_PX)
        return plane

    def point(self, k: int) -> np.ndarray:
        """A point (row, column) mm of the line in slice k."""
        shift = -self.normal[0] * (k - self.centre[0]) / np.linalg.norm(self.normal[1:])
        return self.centre[1:] + shift * self.across

    def at(self, k: int, along: np.ndarray) -> np.ndarray:
        """Residual in slice k at mm `along` the line from the point nearest the centre; 0 outside the view."""
        row = self.residual[k]
        return np.interp((along - self.start) / self.step, np.arange(len(row)), row, left=0.0, right=0.0)


def _axis(planes: list[_Plane], k: int, middle: np.ndarray) -> np.ndarray:
    """The point of slice k nearest to all lines; along a single line, the one nearest the middle."""
    outer = [np.outer(plane.across, plane.across) for plane in planes]
    weak = 1e-6 * np.eye(2)
    right = sum(o @ plane.point(k) for o, plane in zip(outer, planes, strict=True)) + weak @ middle
    return np.linalg.solve(sum(outer) + weak, right)


def _spread(planes: list[_Plane], k: int, shape, spacing_mm, reach_mm: float) -> np.ndarray:
    """The planes' residuals over slice k, (H, W)."""
    axes = [np.arange(n) * step for n, step in zip(shape, spacing_mm, strict=True)]
    axis = _axis(planes, k, np.array([a.mean() for a in axes]))
    rows, columns = axes[0][:, None] - axis[0], axes[1][None] - axis[1]
    radius, angle = np.hypot(rows, columns), np.arctan2(columns, rows)
    halves = []  # (angle, residual at the radius of every voxel)
    for plane in planes:
        foot = (axis - plane.centre[1:]) @ plane.along
        for sign in (1, -1):
            direction = math.atan2(sign * plane.along[1], sign * plane.along[0])
            halves.append((direction, plane.at(k, foot + sign * radius)))
    halves.sort(key=lambda half: half[0])
    out = np.zeros(shape)
    for i, (start, value) in enumerate(halves):
        end, value_next = halves[(i + 1) % len(halves)]
        width = (end - start) % (2 * math.pi) or 2 * math.pi
        past = (angle - start) % (2 * math.pi)
        share = past / width
        arc = radius * np.minimum(past, width - past)
        near = 1 / (1 + (arc / reach_mm) ** 4)
        out = np.where(past < width, near * ((1 - share) * value + share * value_next), out)
    return out.astype(np.float32)


# ---- the priors alone -----------------------------------------------------------------------------------------------


def prior_interpolation(prior, frame, schedule: str = "even") -> np.ndarray:
    """Decoded codes between the slices of an inverse.Frame, (N, H, W) in [0, 1], linear outside the prior's window.

    `prior` is an inverse.Prior or an inverse.UnconditionalPrior.
    """
    sax = torch.from_numpy(np.ascontiguousarray(frame.sax, dtype=np.float32)).clamp(0, 1)
    with torch.no_grad():
        codes = prior.encode(frame.window.cut(sax) if frame.window else sax)
        volume = prior.decode(*seeds(*codes, frame.factor, schedule)).clamp(0, 1).cpu()
    if frame.window:
        volume = frame.window.paste(volume, torch.from_numpy(interpolate(frame.sax, frame.factor, "linear")))
    return volume.numpy()
