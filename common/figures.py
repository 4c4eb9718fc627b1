"""Pictures of volumes and results, written as PNG without pyplot (no global state, no display).

Volumes are numpy arrays or torch tensors (D, H, W) in RAS+ order; singleton leading axes are dropped. Planes are shown
in radiological orientation: superior and anterior up, the patient's right on the left; in the sagittal plane anterior
is on the left. Letters in the pictures say so. Voxel sizes give the true aspect. Every function returns the path.
"""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from common.checkpoint import replacing

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # plane: the axis it is perpendicular to
_DPI, _PANEL, _FONT = 200, 1.9, 8  # dots per inch, inches of the longest edge, points


def plane(volume, name, index):
    """Slice `index` of a (D, H, W) RAS+ volume as displayed: row 0 on top, column 0 on the left (see the module)."""
    return np.take(volume, index, axis=PLANES[name])[::-1, ::-1].T


def _array(volume):
    volume = np.asarray(volume.detach().cpu() if hasattr(volume, "detach") else volume)
    volume = volume.reshape([n for i, n in enumerate(volume.shape) if n > 1 or i >= volume.ndim - 3])
    if volume.ndim != 3:
        raise ValueError(f"a figure needs one (D, H, W) volume, got shape {volume.shape}")
    return volume if volume.dtype == bool else volume.astype(np.float32)


def _limits(arrays):
    """Robust shared window: 0.5 and 99.5 percentile of all values together."""
    lo, hi = np.nanpercentile(np.concatenate([a.ravel() for a in arrays]), [0.5, 99.5])
    return (lo, hi) if hi > lo else (lo, lo + 1)


def save(fig, path):
    """A matplotlib figure as PNG, written whole or not at all."""
    with replacing(path) as file:
        fig.savefig(file, format="png", dpi=_DPI, facecolor="white")
    return Path(path)


def _draw(path, groups, *, planes, spacing_mm, voxel, title):
    """Draw groups of columns that share a colour map: [{"columns": [(title, [(array, style), ...])], "bar": label}].

    One row per plane; within a column the layers are laid over each other; style None draws a mask's outline.
    """
    shape = groups[0]["columns"][0][1][0][0].shape
    shapes = {array.shape for group in groups for _, column in group["columns"] for array, _ in column}
    if len(shapes) > 1:
        raise ValueError(f"volumes of one figure must share a grid, got {sorted(shapes)}")
    voxel = [n // 2 for n in shape] if voxel is None else voxel
    edges = {name: [shape[a] * spacing_mm[a] for a in range(3) if a != PLANES[name]] for name in planes}  # mm
    inch = _PANEL / max(max(edge) for edge in edges.values())
    width, heights = max(e[0] for e in edges.values()) * inch, [e[1] * inch for e in edges.values()]
    wrap = {h: textwrap.fill(h, max(int(width / 0.075), 8)) for group in groups for h, _ in group["columns"]}
    gap, left = 0.04, 0.42
    top = gap + 0.15 * max(len(h.splitlines()) + 0.5 if h else 0 for h in wrap.values()) + (0.25 if title else 0)
    bars = [0.8 if group["bar"] else gap for group in groups]
    total = left + sum(len(group["columns"]) * (width + gap) for group in groups) + sum(bars)
    fig = Figure(figsize=(total, sum(heights) + gap * len(heights) + top))
    inches, panel_top = fig.get_size_inches(), fig.get_size_inches()[1] - top

    def text(x, y, string, size, **kwargs):
        fig.text(x / inches[0], y / inches[1], string, fontsize=size, **kwargs)

    def axes(x, y, w, h):
        return fig.add_axes((x / inches[0], y / inches[1], w / inches[0], h / inches[1]), xticks=[], yticks=[])

    text(left, inches[1] - 0.08, title, _FONT + 2, va="top", weight="bold")
    x, image = left, None
    for group, bar in zip(groups, bars, strict=True):
        for heading, column in group["columns"]:
            text(x + width / 2, panel_top + 0.07, wrap[heading], _FONT + 1, ha="center")
            y = panel_top
            for name, height in zip(planes, heights, strict=True):
                y -= height
                w = edges[name][0] * inch
                ax = axes(x + (width - w) / 2, y, w, height)
                ax.spines[:].set(color="0.7", linewidth=0.5)
                for array, style in column:
                    picture = plane(array, name, voxel[PLANES[name]])
                    if style is not None:
                        image = ax.imshow(picture, aspect="auto", interpolation="nearest", **style)
                    elif picture.any():
                        ax.contour(picture, levels=[0.5], colors="#ff3b30", linewidths=0.9)
                for at, letter, ha in zip((0.03, 0.97), "AP" if name == "sagittal" else "RL", ("left", "right"),
                                          strict=True):
                    ax.text(at, 0.5, letter, transform=ax.transAxes, color="white", fontsize=_FONT - 1, ha=ha,
                            va="center", path_effects=[withStroke(linewidth=1.5, foreground="black")])
                if x == left:
                    text(0.2, y + height / 2, f"{name}\nvoxel {voxel[PLANES[name]]}", _FONT - 1, rotation=90,
                         va="center", ha="center")
                y -= gap
            x += width + gap
        if group["bar"]:
            length = min(0.9 * sum(heights), 2.2)
            ax = axes(x + 0.04, (panel_top + y + gap - length) / 2, 0.09, length)
            fig.colorbar(image, cax=ax).set_label(group["bar"], fontsize=_FONT)
            ax.tick_params(labelsize=_FONT - 1)
        x += bar
    return save(fig, path)


def montage(path, volumes, *, window=None, planes=("axial", "coronal", "sagittal"), difference_to=None,
            difference_of=None, difference_window=None, cmap="gray", spacing_mm=(1, 1, 1), voxel=None, unit="",
            title=""):
    """Named volumes side by side, one column each and one row per plane, all in one window with one colour bar.

    `volumes` is a dict or a list of (name, volume) on one grid; `window` (lo, hi), default the 0.5 and 99.5 percentile
    of all volumes together; `voxel` the slice index per axis, default the centre. `difference_to` names a reference:
    the volumes `difference_of` (default: all others) minus it follow in their own symmetric window
    (+-`difference_window`, default the 99.5 percentile of the absolute differences). ValueError for unlike shapes.
    """
    pairs = list(volumes.items() if isinstance(volumes, dict) else volumes)
    volumes = {name: _array(v).astype(np.float32) for name, v in pairs}
    if len(volumes) < len(pairs):
        raise ValueError(f"volumes of one figure need names of their own, got {[name for name, _ in pairs]}")
    lo, hi = window or _limits(list(volumes.values()))
    style = {"cmap": cmap, "vmin": lo, "vmax": hi}
    groups = [{"columns": [(name, [(v, style)]) for name, v in volumes.items()], "bar": unit or "intensity"}]
    if difference_to is not None:
        names = [n for n in volumes if n != difference_to] if difference_of is None else difference_of
        differences = {n: volumes[n] - volumes[difference_to] for n in names}
        limit = difference_window or np.nanpercentile(np.abs(list(differences.values())), 99.5) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        columns = [(f"{n} \N{MINUS SIGN} {difference_to}", [(d, style)]) for n, d in differences.items()]
        groups.append({"columns": columns, "bar": "difference" + (f" ({unit})" if unit else "")})
    return _draw(path, groups, planes=planes, spacing_mm=spacing_mm, voxel=voxel, title=title)


def overlay(path, background, foreground, *, window=None, foreground_window=None, threshold=None, cmap="inferno",
            alpha=0.6, planes=("axial", "coronal", "sagittal"), spacing_mm=(1, 1, 1), voxel=None, unit="", title=""):
    """Foreground over a grey background: a boolean mask as an outline, a map in colour where it exceeds `threshold`.

    Default `threshold`: the lower end of `foreground_window`, itself by default the map's 0.5 and 99.5 percentile.
    """
    background, foreground = _array(background), _array(foreground)
    lo, hi = window or _limits([background])
    layers, bar = [(background, {"cmap": "gray", "vmin": lo, "vmax": hi})], None
    if foreground.dtype == bool:
        layers.append((foreground, None))
    else:
        lo, hi = foreground_window or _limits([foreground])
        shown = np.where(foreground > (lo if threshold is None else threshold), foreground, np.nan)
        layers.append((shown, {"cmap": cmap, "vmin": lo, "vmax": hi, "alpha": alpha}))
        bar = unit or "intensity"
    return _draw(path, [{"columns": [("", layers)], "bar": bar}], planes=planes, spacing_mm=spacing_mm, voxel=voxel,
                 title=title)


def curves(path, lines, *, xlabel, ylabel, title="", log_y=False, diagonal=False, points=False):
    """Lines {name: (x, y)} or {name: (x, y, lo, hi)} with a shaded band; points=True makes a scatter plot of them.

    `diagonal` makes the plot square and adds the identity line (agreement, calibration, ROC).
    """
    fig = Figure(figsize=(3.4, 3.4) if diagonal else (4.8, 3.2), layout="constrained")
    ax = fig.add_subplot()
    for name, (x, y, *band) in lines.items():
        marker = "o" if points or len(x) <= 12 else None
        line, = ax.plot(x, y, label=name, linewidth=0 if points else 1.4, marker=marker, markersize=3.5, alpha=0.85)
        if band:
            ax.fill_between(x, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    if diagonal:
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle="--")
    if log_y:
        ax.set_yscale("log")
    if len(lines) > 1:
        ax.legend(fontsize=_FONT, frameon=False)
    whole = {float(value) for x, *_ in lines.values() for value in x}
    if points and not diagonal and len(whole) <= 12 and all(value.is_integer() for value in whole):  # seeds, say
        ax.set_xticks(sorted(whole))
    ax.set_xlabel(xlabel, fontsize=_FONT + 1)
    ax.set_ylabel(ylabel, fontsize=_FONT + 1)
    ax.set_title(title, fontsize=_FONT + 2)
    ax.tick_params(labelsize=_FONT)
    ax.spines[["top", "right"]].set_visible(False)
    return save(fig, path)
