"""How well two codes give a scan back: image metrics with pinned definitions, and the reconstruction table.

The table (spec, fact 36) compares, at several numbers of steps, what each code knows, with controls: deterministic
inversion undoes itself whatever the network, so "encoded z_T" proves nothing alone; it counts beside an untrained
network and beside the code of somebody else. Every scan is compared with the prepared scan, never with a decoded one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import metrics, runtime, tables, training
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import write_json
from ldae import posterior_gap

DATA_RANGE = 1.0  # of prepared volumes
WINDOW, SIGMA = 11, 1.5  # voxels, of SSIM
UPSTREAM_WINDOWS = (3, 4)  # the original's: 3 in its tests since September 2025, 4 before and in its interpolation
HEAD_LEVEL = 0.02  # a prepared voxel above it belongs to the head; the background is 0
UNAVAILABLE = "not available offline"  # in place of LPIPS, whose weights are given by path

# Deviation (original code): what a number means is written beside it, because the original changed its SSIM window
# after publication; metrics are also taken inside the head, which is less than half of a volume.
DEFINITIONS = {
    "ssim": f"3D SSIM, Gaussian window {WINDOW} voxels, sigma {SIGMA}, K 0.01/0.03, range 1, valid borders, population "
            "covariance, mean over the volume",
    "ssim_masked": f"the same SSIM map (window {WINDOW}), mean inside the head",
    "mse": "mean squared error over the volume, outputs not clipped",
    "mse_masked": "mean squared error inside the head",
    "psnr": "10 log10(1 / mse) in dB, at most 100",
    "psnr_masked": "10 log10(1 / mse_masked) in dB, at most 100",
    "lpips": "LPIPS on slices of three axes",
    "ssim_window3": "as ssim with the original's window of 3 voxels (its tests since September 2025)",
    "ssim_window4": "as ssim with the original's window of 4 voxels (its tests before, and its interpolation)",
    "ms_ssim_window3": "multi-scale SSIM, 5 scales, window 3 (the original's)",
    "latent_rmse": "RMSE between the latent and the scan's posterior mean, in units of scaled latents (SD 1)",
    "z_mean": "mean of z_T", "z_std": "standard deviation of z_T (unit Gaussian: 1)",
    "z_kurtosis": "excess kurtosis of z_T (Gaussian: 0)", "z_max_abs": "largest magnitude in z_T",
    "head": f"voxels of the prepared scan above {HEAD_LEVEL}",
}  # fmt: skip

# ---- one pair of volumes --------------------------------------------------------------------------------------------


def head_mask(x) -> np.ndarray:
    """(D, H, W) bool: voxels of a prepared scan that belong to the head."""
    return np.asarray(x) > HEAD_LEVEL


def image_metrics(pred, target, *, upstream: bool = False, lpips=None) -> dict[str, float]:
    """Metrics of a prediction against a prepared scan, both (D, H, W), named as in DEFINITIONS.

    The head is the target's. upstream: also the original's windows. lpips: function of two volumes, or None. Raises
    ValueError for shapes that differ, values that are not finite, a target without a head, an axis below 11 voxels.
    """
    mask = head_mask(target)
    found = {
        "ssim": metrics.ssim(pred, target, data_range=DATA_RANGE, window_size=WINDOW),
        "ssim_masked": metrics.ssim(pred, target, data_range=DATA_RANGE, window_size=WINDOW, mask=mask),
    }
    for suffix, where in (("", None), ("_masked", mask)):
        found[f"mse{suffix}"] = metrics.nrmse(pred, target, data_range=DATA_RANGE, mask=where) ** 2
        found[f"psnr{suffix}"] = metrics.psnr(pred, target, data_range=DATA_RANGE, mask=where)
    if upstream:
        found |= {f"ssim_window{size}": windowed_ssim(pred, target, size) for size in UPSTREAM_WINDOWS}
        if min(np.shape(target)) >= 3 * 2**4:
            found["ms_ssim_window3"] = metrics.ms_ssim(pred, target, data_range=DATA_RANGE, window_size=3)
    if lpips is not None:
        found["lpips"] = lpips(pred, target)
    return found


def windowed_ssim(pred, target, size: int) -> float:
    """`metrics.ssim` of two (D, H, W) volumes with a Gaussian window of any size; an even one lies between voxels."""
    distance = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    taps = torch.exp(-0.5 * (distance / SIGMA) ** 2)
    taps = taps / taps.sum()

    def smooth(x):
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = size
            x = F.conv3d(x, taps.reshape(shape))
        return x

    p, t = (torch.as_tensor(np.asarray(x, np.float64))[None, None] for x in (pred, target))
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    mu_p, mu_t = smooth(p), smooth(t)
    var = smooth(p * p) - mu_p**2 + smooth(t * t) - mu_t**2
    cov = smooth(p * t) - mu_p * mu_t
    return ((2 * mu_p * mu_t + c1) * (2 * cov + c2) / ((mu_p**2 + mu_t**2 + c1) * (var + c2))).mean().item()


def noise_statistics(z_T: torch.Tensor) -> dict[str, float]:
    """z_mean, z_std, z_kurtosis, z_max_abs of one z_T (C, d, h, w)."""
    return {f"z_{name}": value for name, value in posterior_gap.gaussian_statistics(z_T).items()}


def definitions(names: Iterable[str]) -> dict[str, str]:
    """The definitions of these metrics and of the head, for a result file."""
    return {name: DEFINITIONS[name] for name in (*names, "head") if name in DEFINITIONS}


# ---- the reconstruction table ---------------------------------------------------------------------------------------

AEKL = "aekl"
ROWS = {
    "encoded": "y + encoded z_T",
    "drawn": "the same of a posterior draw",
    "y_only": "y only, fixed noise",
    "prior": "prior only, encoded z_T (LDDIM)",
    "untrained": "untrained network, encoded z_T",
    "shuffled": "another subject's y, own z_T",
    "shuffled_y_only": "another subject's y, fixed noise",
}
LABELS = {AEKL: "autoencoder alone"} | ROWS


def partners(subjects: list[str]) -> list[int]:
    """For every scan the index of a scan of another subject; -1 where there is only one subject.

    Subjects in order of appearance are paired with the next one, the last with the first; a subject's k-th scan with
    the partner's k-th (counted round).
    """
    scans = {}
    for index, subject in enumerate(subjects):
        scans.setdefault(subject, []).append(index)
    order = list(scans)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    found = [-1] * len(subjects)
    for subject, own in scans.items():
        theirs = scans[following[subject]]
        for k, index in enumerate(own):
            found[index] = theirs[k % len(theirs)] if following[subject] != subject else -1
    return found


@torch.no_grad()
def reconstruct(
    model, z_0, y, y_other, noise, steps: int, rows: Iterable[str], sampler: str = "ddim", z_drawn=None
) -> dict:
    """{row: (z_0_hat, z_T or None)} of a batch for these rows of the table.

    model: `model.LDAE`; z_0 (B, C, d, h, w), y and y_other (B, code_dim). noise: the fixed z_T of the rows without an
    own one; z_drawn: a draw of the posterior whose mean is z_0, for the row of that name. The prior was trained on
    draws, so theirs is the z_T that should be Gaussian: where the posterior is wider than people differ, a mean is not
    a typical latent. z_T is given where it was encoded. The sampler ("ddim" or "dpmpp_2m") starts from fresh noise;
    encoded codes go back the way they came, by DDIM.
    """
    found, z_T = {}, None
    if {"encoded", "shuffled"} & set(rows):
        z_T = model.invert(z_0, y, steps)
    for row in rows:
        if row == "encoded":
            found[row] = model.decode(z_T, y, steps), z_T
        elif row == "drawn":
            drawn_z_T = model.invert(z_drawn, y, steps)
            found[row] = model.decode(drawn_z_T, y, steps), drawn_z_T
        elif row == "y_only":
            found[row] = model.decode(noise, y, steps, sampler), None
        elif row == "prior":
            prior_z_T = model.invert(z_0, None, steps)
            found[row] = model.decode(prior_z_T, None, steps), prior_z_T
        elif row == "untrained":
            found[row] = untrained_round_trip(model, z_0, steps)
        elif row == "shuffled":
            found[row] = model.decode(z_T, y_other, steps), None
        elif row == "shuffled_y_only":
            found[row] = model.decode(noise, y_other, steps, sampler), None
        else:
            raise ValueError(f"no row {row!r} in the table: {', '.join(ROWS)}")
    return found


def untrained_round_trip(model, z_0, steps: int):
    """(z_0_hat, z_T) of the network before training, whose last layers are 0 so that it predicts 0 everywhere."""
    options = sampler_options(model)
    zero = torch.zeros_like(z_0)
    z_T = posterior_gap.invert(lambda z_t, t: zero, z_0, model.schedule, steps, **options)
    return posterior_gap.sample(lambda z_t, t: zero, z_T, model.schedule, steps, **options), z_T


def sampler_options(model) -> dict:
    """The options of posterior_gap.invert and sample that this model samples with."""
    return {"spacing": model.spacing, "final": model.final, "clip": model.clip}


def summarise(rows: list[dict], seed: int) -> list[dict]:
    """One entry per row and number of steps: {"row", "label", "steps", metric: {n, mean, sd, min, max, ci95}}.

    rows: one per scan with "scan", "subject", "row", "steps" (None for the autoencoder) and metrics; the intervals draw
    subjects. A metric that a row does not have is left out.
    """
    groups, table = {}, []
    for row in rows:
        groups.setdefault((row["row"], row["steps"]), []).append(row)
    order = list(LABELS)
    for (name, steps), members in sorted(groups.items(), key=lambda g: (g[0][1] or 0, order.index(g[0][0]))):
        entry = {"row": name, "label": LABELS[name], "steps": steps}
        for metric in (key for key in members[0] if key in DEFINITIONS):
            values = [row[metric] for row in members if metric in row]
            entry[metric] = metrics.summary(values, seed=seed, groups=[row["subject"] for row in members])
        table.append(entry)
    return table


def control_warnings(table: list[dict]) -> list[str]:
    """What the controls say against the table: trained like untrained, own code like another subject's."""
    found, by = [], {(entry["row"], entry["steps"]): entry for entry in table}
    for (name, steps), entry in by.items():
        untrained, shuffled = by.get(("untrained", steps)), by.get(("shuffled_y_only", steps))
        if name == "encoded" and untrained:
            close = all(np.isclose(entry[k]["mean"], untrained[k]["mean"], rtol=0.02, atol=1e-6)
                        for k in ("latent_rmse", "z_std"))  # fmt: skip
            values = f"RMSE {entry['latent_rmse']['mean']:.2g}, SD of z_T {entry['z_std']['mean']:.2g}"
            if close:
                found.append(f"{steps} steps: the round trip equals that of an untrained network ({values})")
        if name == "y_only" and shuffled and entry["mse_masked"]["mean"] >= shuffled["mse_masked"]["mean"]:
            found.append(f"{steps} steps: a scan's own code reconstructs it no better than another subject's")
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


class Records:
    """Measurements on disk while an evaluation runs, OUT/parts/<key>.json, so that it can continue; `done`: the keys.

    settings: all that the measurements depend on, plain values. UserError if OUT holds some of other settings, unless
    `overwrite`, which removes them.
    """

    def __init__(self, out: Path, settings: dict, overwrite: bool, rt: runtime.Runtime):
        self.folder, self.rt = out / "parts", rt
        path, settings = out / "evaluation.json", json.loads(json.dumps(settings, default=str))
        old = settings
        if path.is_file():
            old = training.read_record(path, (), "delete the folder or name another --output_dir")
        changed = sorted(key for key in {*old, *settings} if old.get(key) != settings.get(key))
        if changed and not overwrite:
            raise UserError(f"{out} holds results of other settings ({', '.join(changed)}); name another --output_dir "
                            "or add --overwrite")  # fmt: skip
        rt.barrier()  # every rank has judged the folder before rank 0 changes it
        if rt.is_main:
            for part in self.folder.glob("*.json") if changed else ():
                part.unlink()
            write_json(path, settings)
        rt.barrier()
        self.done = {part.stem for part in self.folder.glob("*.json")}
        rt.barrier()  # every rank has seen the same parts before any is added

    def add(self, key: str, entries: list[dict]) -> None:
        write_json(self.folder / f"{key}.json", entries)

    def collect(self, keys: Iterable[str]) -> list[dict]:
        """The entries of all `keys` in this order, of all ranks."""
        self.rt.barrier()
        return [entry for key in keys for entry in json.loads((self.folder / f"{key}.json").read_text())]


def write_text(path: Path, text: str) -> None:
    """Text file, written atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def mean_and_sd(entry: dict | str | None, digits: int = 4) -> str:
    """Mean ± SD [lo, hi] of a `metrics.summary`; a text stays what it is, nothing is an en dash."""
    if entry is None or isinstance(entry, str):
        return entry or "–"
    spread = "" if np.isnan(entry["sd"]) else f" ± {entry['sd']:.{digits}f}"
    lo, hi = entry["ci95"]
    return f"{entry['mean']:.{digits}f}{spread}" + ("" if np.isnan(lo) else f" [{lo:.{digits}f}, {hi:.{digits}f}]")


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def table_markdown(result: dict) -> str:
    """The reconstruction table of `summarise` as Markdown, with definitions, hashes and warnings below."""
    columns = {"ssim": f"SSIM (window {WINDOW})", "ssim_masked": "SSIM in head", "mse": "MSE",
               "mse_masked": "MSE in head", "psnr": "PSNR [dB]", "lpips": "LPIPS",
               "latent_rmse": "latent RMSE", "z_mean": "z_T mean", "z_std": "z_T SD", "z_kurtosis": "z_T kurtosis",
               "z_max_abs": "z_T max"}  # fmt: skip
    extra = [name for name in DEFINITIONS if "window" in name and any(name in entry for entry in result["table"])]
    columns |= {name: name for name in extra}
    digits = {"psnr": 2, "mse": 5, "mse_masked": 5, "z_std": 3, "z_mean": 3, "z_kurtosis": 2, "z_max_abs": 2}
    body = []
    for entry in result["table"]:
        cells = [mean_and_sd(entry.get(name, UNAVAILABLE if name == "lpips" else None), digits.get(name, 4))
                 for name in columns]  # fmt: skip
        body.append([entry["label"], str(entry["steps"] or "–"), *cells])
    text = f"# Reconstruction of {result['n']} scans of {result['n_subjects']} subjects ({result['part']})\n\n"
    text += markdown_table(["reconstruction", "steps", *columns.values()], body)
    text += "\nMean ± SD [95 % interval of the mean, drawn by subject], against the prepared scan.\n\n"
    text += "".join(f"- {name}: {meaning}\n" for name, meaning in result["definitions"].items())
    return text + "".join(f"\nWarning: {warning}\n" for warning in result["warnings"])


def table_text(result: dict) -> list[str]:
    """The means of the reconstruction table, line by line, for a terminal."""
    columns = {"ssim": ("SSIM", ".4f"), "ssim_masked": ("in head", ".4f"), "mse_masked": ("MSE in head", ".5f"),
               "psnr": ("PSNR", ".2f"), "latent_rmse": ("latent RMSE", ".4f"), "z_std": ("z_T SD", ".3f")}  # fmt: skip
    lines = [f"{'reconstruction':36}{'steps':>6}" + "".join(f"{head:>13}" for head, _ in columns.values())]
    for entry in result["table"]:
        cells = [format(entry[name]["mean"], form) if name in entry else "–" for name, (_, form) in columns.items()]
        lines.append(f"{entry['label']:36}{entry['steps'] or '–':>6}" + "".join(f"{cell:>13}" for cell in cells))
    lines.append(f"means of {result['n']} scans of {result['n_subjects']} subjects; SSIM window {WINDOW}")
    return lines + [f"warning: {warning}" for warning in result["warnings"]]


def write_table(folder: Path, rows: list[dict], about: dict, seed: int) -> dict:
    """reconstruction_{per_scan.csv,table.csv,table.json,table.md} in `folder`; returns what the JSON holds."""
    table = summarise(rows, seed)
    names = dict.fromkeys(key for entry in table for key in entry if key in DEFINITIONS)
    result = about | {
        "n": len({row["scan"] for row in rows}), "n_subjects": len({row["subject"] for row in rows}),
        "definitions": definitions((*names, "lpips")), "warnings": control_warnings(table), "table": table,
    }  # fmt: skip
    if "lpips" not in names:
        result["definitions"]["lpips"] = UNAVAILABLE
    tables.write_csv(folder / "reconstruction_per_scan.csv", rows)
    tables.write_csv(folder / "reconstruction_table.csv", [flat(entry, "lpips" in names) for entry in table])
    write_text(folder / "reconstruction_table.md", table_markdown(result))
    write_json(folder / "reconstruction_table.json", result)
    return result


def flat(entry: dict, has_lpips: bool) -> dict:
    """A table entry as one row of numbers: <metric>_mean, _sd, _lo, _hi."""
    row = {key: entry[key] for key in ("row", "label", "steps")} | {"n": entry["mse"]["n"]}
    for name, value in entry.items():
        if isinstance(value, dict):
            lo, hi = value["ci95"]
            row |= {f"{name}_mean": value["mean"], f"{name}_sd": value["sd"], f"{name}_lo": lo, f"{name}_hi": hi}
    return row if has_lpips else row | {"lpips_mean": UNAVAILABLE}
