"""Two volumes side by side, and their difference: a picture (PNG) and a page with a slice slider (HTML).

    python ldae/scripts/compare.py original.nii.gz reconstruction.nii.gz              # compare.png, compare.html
    python ldae/scripts/compare.py T1_M000.nii.gz T1_M012.nii.gz --out change --names baseline "12 months" --resample

The page is one file that any browser opens without a network: slices in three planes, the values under the pointer, the
difference in colour. Both volumes must be on one grid (shape and affine, to 0.01 mm), or --resample puts the second
onto the first's. Any orientation is shown in RAS+ order, the patient's right on the left.
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

SAME_MM = 0.01


@dataclass
class Options(CommonOptions):
    original: str = option("", "first volume (or the first word of the command line)")
    second: str = option("", "second volume (or the second word)")
    out: str = option("compare", "output files without ending: OUT.png and OUT.html")
    names: tuple[str, ...] = option(("original", "second"), "titles of the two")
    window: tuple[float, ...] = option((), "shown range of values; default: 0.5 and 99.5 percentile of both")
    difference_window: float = option(0.0, "shown differences: up to this; default: 99.5 percentile of their size")
    resample: bool = option(False, "put the second volume onto the grid of the first")
    overwrite: bool = option(False, "replace OUT.png and OUT.html")


def with_names(words: list[str]) -> list[str]:
    """The command line with up to two leading file names as options."""
    named = []
    for name in ("--original", "--second"):
        if words and not words[0].startswith("-"):
            named += [name, words[0]]
            words = words[1:]
    return named + words


def load_pair(options: Options):
    """Both volumes on one grid; UserError if they are not and --resample is not given."""
    from common import nifti

    first, second = nifti.load(options.original), nifti.load(options.second)
    apart_mm = np.inf
    if first.shape == second.shape:
        corners = np.array(np.meshgrid(*([0, n - 1] for n in first.shape))).reshape(3, -1)
        difference = first.affine - second.affine
        apart_mm = np.abs(difference[:3, :3] @ corners + difference[:3, 3:]).max()
    if apart_mm <= SAME_MM:
        return first, second
    if not options.resample:
        what = f"shapes {first.shape} and {second.shape}"
        if first.shape == second.shape:
            what = f"affines {apart_mm:.3g} mm apart"
        raise UserError(f"{options.original} and {options.second} are on different grids ({what}); compare volumes of "
                        "one grid, or add --resample")  # fmt: skip
    return first, nifti.resample_to(second, first.shape, first.affine)


def measures(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Mean absolute, root mean square and largest difference, correlation (NaN for a constant volume)."""
    difference = second.astype(np.float64) - first
    spread = first.std() * second.std()
    correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1] if spread > 0 else np.nan
    return {"MAE": np.abs(difference).mean(), "RMSE": np.sqrt((difference**2).mean()),
            "largest difference": np.abs(difference).max(), "correlation": correlation}  # fmt: skip


# ---- the page


def sprite(volume: np.ndarray, low: float, high: float) -> str:
    """Grey PNG (data URI) of a (D, H, W) volume as bytes in C order, rows of W: low is 0, high is 255."""
    from PIL import Image

    scaled = np.rint((np.clip(volume, low, high) - low) / (high - low) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(scaled.reshape(-1, volume.shape[2])).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def tiled(volume: np.ndarray, low: float, high: float) -> list[str]:
    """Sprites of at most 16,000 rows each, which every browser can draw."""
    slabs = max(1, 16_000 // volume.shape[1])
    return [sprite(volume[i : i + slabs], low, high) for i in range(0, volume.shape[0], slabs)]


def page(first, second, names, window, limit, facts: dict[str, float]) -> str:
    """The HTML text; first, second: volumes of one grid."""
    difference = second.data.astype(np.float32) - first.data
    panels = [{"name": names[0], "low": window[0], "high": window[1], "tiles": tiled(first.data, *window)},
              {"name": names[1], "low": window[0], "high": window[1], "tiles": tiled(second.data, *window)},
              {"name": f"{names[1]} \N{MINUS SIGN} {names[0]}", "low": -limit, "high": limit, "signed": True,
               "tiles": tiled(difference, -limit, limit)}]  # fmt: skip
    data = {"shape": first.shape, "spacing": first.spacing_mm, "affine": first.affine.tolist(), "panels": panels}
    text = json.dumps(data).replace("</", "<\\/")
    title = html.escape(f"{names[0]} and {names[1]}")
    numbers = html.escape(" \N{MIDDLE DOT} ".join(f"{name} {value:.4g}" for name, value in facts.items()))
    return PAGE.replace("%TITLE%", title).replace("%NUMBERS%", numbers).replace("%DATA%", text)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>%TITLE%</title>
<style>
body { font: 14px sans-serif; margin: 1.2em; background: #111; color: #ddd }
figure { display: inline-block; margin: 0 1em 0 0 } figcaption { margin-bottom: .3em }
canvas { background: #000; width: 30vw; image-rendering: pixelated; display: block }
input[type=range] { width: 40vw } #at { white-space: pre; min-height: 1.3em }
</style>
<h3>%TITLE%</h3><p>%NUMBERS%</p>
<p><label>plane <select id="plane"><option value="2">axial<option value="1">coronal<option value="0">sagittal</select>
</label> <label>slice <input type="range" id="slice" min="0"></label> <span id="index"></span></p>
<div id="panels"></div><p id="at"></p>
<p>Superior and anterior are up, the patient's right is on the left (sagittal: anterior on the left).</p>
<script>
const data = %DATA%;
const [D, H, W] = data.shape, find = id => document.getElementById(id);
const across = [1, 0, 0], down = [2, 2, 1];  // axes of a picture by plane; both are shown reversed

async function bytes(panel) {  // (D, H, W) in C order
  const out = new Uint8Array(D * H * W);
  let at = 0;
  for (const tile of panel.tiles) {
    const image = new Image();
    image.src = tile;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.width, image.height];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, image.width, image.height).data;
    for (let i = 0; i < rgba.length; i += 4) out[at++] = rgba[i];
  }
  return out;
}

function colour(panel, value) {  // red where the second is higher, blue where it is lower
  if (!panel.signed) return [value, value, value];
  const part = (value - 127.5) / 127.5, fade = 255 * (1 - Math.abs(part));
  return part > 0 ? [255, fade, fade] : [fade, fade, 255];
}

function voxel(x, y) {  // of a picture's pixel
  const p = +find("plane").value, v = [0, 0, 0];
  v[p] = +find("slice").value;
  v[across[p]] = data.shape[across[p]] - 1 - x;
  v[down[p]] = data.shape[down[p]] - 1 - y;
  return v;
}

const offset = v => (v[0] * H + v[1]) * W + v[2];

function draw() {
  const p = +find("plane").value, width = data.shape[across[p]], height = data.shape[down[p]];
  find("slice").max = data.shape[p] - 1;
  find("index").textContent = find("slice").value;
  for (const panel of data.panels) {
    const canvas = panel.canvas, context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [width, height];
    canvas.style.aspectRatio = `${width * data.spacing[across[p]]} / ${height * data.spacing[down[p]]}`;
    const picture = context.createImageData(width, height);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++)
      picture.data.set([...colour(panel, panel.bytes[offset(voxel(x, y))]), 255], 4 * (y * width + x));
    context.putImageData(picture, 0, 0);
  }
}

function point(event) {
  const canvas = event.target, v = voxel(
    Math.min(Math.floor(event.offsetX / canvas.clientWidth * canvas.width), canvas.width - 1),
    Math.min(Math.floor(event.offsetY / canvas.clientHeight * canvas.height), canvas.height - 1));
  const mm = data.affine.slice(0, 3).map(row => (row[0] * v[0] + row[1] * v[1] + row[2] * v[2] + row[3]).toFixed(1));
  const shown = data.panels.map(p => {
    const value = p.low + panelByte(p, v) / 255 * (p.high - p.low);
    return `${p.name} ${value.toPrecision(3)}`;
  });
  find("at").textContent = `voxel ${v.join(" ")}   mm ${mm.join(" ")}   ${shown.join("   ")}`;
}

const panelByte = (panel, v) => panel.bytes[offset(v)];

(async () => {
  for (const panel of data.panels) {
    panel.bytes = await bytes(panel);
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    panel.canvas = document.createElement("canvas");
    caption.textContent = `${panel.name}  [${panel.low.toPrecision(3)}, ${panel.high.toPrecision(3)}]`;
    figure.append(caption, panel.canvas);
    find("panels").append(figure);
    panel.canvas.addEventListener("mousemove", point);
  }
  find("plane").onchange = () => {
    const n = data.shape[+find("plane").value];
    find("slice").max = n - 1;
    find("slice").value = Math.floor(n / 2);
    draw();
  };
  find("slice").oninput = draw;
  find("plane").onchange();
})();
</script></html>
"""


def check(options: Options) -> None:
    if not options.original or not options.second:
        raise UserError("two volumes are needed: compare.py FIRST.nii.gz SECOND.nii.gz")
    if len(options.names) != 2 or len(options.window) not in (0, 2):
        raise UserError("--names takes two titles, --window two values")
    if options.window and not options.window[0] < options.window[1]:
        raise UserError(f"--window {options.window}: the lower value comes first")
    if options.difference_window < 0:
        raise UserError(f"--difference_window {options.difference_window}: give 0 for the percentile, or more")
    for ending in (".png", ".html"):
        if Path(options.out + ending).exists() and not options.overwrite:
            raise UserError(f"{options.out}{ending} is there already; name another --out, or add --overwrite")


def main() -> None:
    options = cli.parse(Options, with_names(sys.argv[1:]), description=__doc__)
    check(options)
    from common import figures
    from common.checkpoint import replacing

    first, second = load_pair(options)
    both = np.concatenate([first.data.ravel(), second.data.ravel()])
    window = tuple(options.window) or tuple(float(v) for v in np.percentile(both, [0.5, 99.5]))
    if not window[0] < window[1]:
        window = (window[0], window[0] + 1)
    difference = np.abs(second.data - first.data)
    limit = options.difference_window or float(np.percentile(difference, 99.5)) or float(difference.max()) or 1.0
    facts = measures(first.data, second.data)
    names = options.names if options.names[0] != options.names[1] else (options.names[0], options.names[1] + " (2)")
    figures.montage(options.out + ".png", dict(zip(names, (first.data, second.data), strict=True)), window=window,
                    difference_to=names[0], difference_window=limit, spacing_mm=first.spacing_mm)  # fmt: skip
    with replacing(options.out + ".html") as file:
        file.write(page(first, second, names, window, limit, facts).encode())
    print(", ".join(f"{name} {value:.4g}" for name, value in facts.items()))
    print(f"picture {options.out}.png, page {options.out}.html")


if __name__ == "__main__":
    cli.run(main)
