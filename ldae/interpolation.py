"""Between two scans: LERP on the semantic code, SLERP on the stochastic one, and the longitudinal test of it.

The test (paper, section on interpolation): of a subject with three or more sessions every session between two others
is predicted from those two, alpha being the fraction of the months that have passed. The command is
ldae/scripts/interpolation_evaluation.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import figures, metrics, tables
from common.runlog import write_json
from ldae import evaluation

MIN_SESSIONS = 3  # of a subject: two ends and one session between them
NEARLY_PARALLEL = 1e-3  # sine of the angle below which float32 cannot tell the arc from the chord

# ---- mixing codes ---------------------------------------------------------------------------------------------------


def lerp(a: torch.Tensor, b: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """(1 - alpha) a + alpha b of (B, ...) tensors; alpha a number or (B,). Exactly a at 0 and b at 1."""
    alpha = _per_sample(alpha, a)
    return (1 - alpha) * a + alpha * b


def slerp(a: torch.Tensor, b: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of (B, ...) tensors, each sample along its own arc; alpha a number or (B,).

    Weights sin((1 - alpha) w) / sin w and sin(alpha w) / sin w with w the angle between the flattened samples (Shoemake
    1985). Where there is no arc (equal, opposite or zero samples) it is LERP. Exactly a at 0 and b at 1.
    """
    # Deviation (original code): one angle per sample, not one for the batch; no NaN for equal or opposite samples.
    alpha = _per_sample(alpha, a)
    norms = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    cosine = (a * b).flatten(1).sum(dim=1) / norms.clamp(min=torch.finfo(a.dtype).tiny)
    omega = _per_sample(cosine.clamp(-1, 1).acos(), a)
    sine = omega.sin()
    arc = (sine > NEARLY_PARALLEL) & (_per_sample(norms, a) > 0)
    sine = torch.where(arc, sine, torch.ones_like(sine))
    weight_a = torch.where(arc, ((1 - alpha) * omega).sin() / sine, 1 - alpha)
    weight_b = torch.where(arc, (alpha * omega).sin() / sine, alpha)
    return weight_a * a + weight_b * b


def _per_sample(value, like: torch.Tensor) -> torch.Tensor:
    """A number or (B,) as (1 or B, 1, ...), to multiply `like` (B, ...)."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


MIX = {"slerp": slerp, "lerp": lerp}


def mix_codes(first, second, alpha: float | torch.Tensor, noise_path: str = "slerp"):
    """(y, z_T) between two pairs of codes (y (B, code_dim), z_T (B, C, d, h, w)): LERP on y, `noise_path` on z_T."""
    (y_a, z_a), (y_b, z_b) = first, second
    return lerp(y_a, y_b, alpha), MIX[noise_path](z_a, z_b, alpha)


# ---- the longitudinal protocol --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Triple:
    """A session to predict from an earlier and a later one of the same subject; sessions in months."""

    subject: str
    start: int
    end: int
    target: int

    @property
    def alpha(self) -> float:
        return (self.target - self.start) / (self.end - self.start)

    @property
    def time_gap(self) -> int:
        """Months between the two ends."""
        return self.end - self.start

    @property
    def prediction_gap(self) -> int:
        """Months from the target to the nearer end."""
        return min(self.target - self.start, self.end - self.target)

    @property
    def position(self) -> float:
        """Relative position in tenths, rounded half to even."""
        return round(self.alpha, 1)

    @property
    def nearest(self) -> int:
        """The nearer end; the earlier one of two equally near."""
        return self.start if self.target - self.start <= self.end - self.target else self.end

    def to_dict(self) -> dict:
        return {
            "subject": self.subject, "start": self.start, "end": self.end, "target": self.target, "alpha": self.alpha,
            "time_gap": self.time_gap, "prediction_gap": self.prediction_gap, "position": self.position,
        }  # fmt: skip


def triples(sessions: Mapping[str, Iterable[int]], min_sessions: int = MIN_SESSIONS) -> list[Triple]:
    """Every (start, end, target) of subjects with `min_sessions` or more, by subject, start, end and target.

    sessions: subject -> months, in any order.
    """
    found = []
    for subject, months in sessions.items():
        months = sorted(set(months))
        if len(months) < min_sessions:
            continue
        for i, start in enumerate(months):
            for j in range(i + 2, len(months)):
                found += [Triple(subject, start, months[j], target) for target in months[i + 1 : j]]
    return found


def session_table(rows: Iterable) -> tuple[dict[str, dict[int, object]], list[str]]:
    """({subject: {month: row}}, problems) of table rows (with .subject, .session, .scan), months rising.

    A row without a month, or with a month that the subject has already, is left out and named in `problems`.
    """
    table, problems = {}, []
    for row in rows:
        months = table.setdefault(row.subject, {})
        if row.session is None:
            problems.append(f"{row.scan}: no session month in the table or its path")
        elif row.session in months:
            problems.append(f"{row.scan}: subject {row.subject} already has a scan of month {row.session}")
        else:
            months[row.session] = row
    return {subject: dict(sorted(months.items())) for subject, months in table.items()}, problems


# ---- tables ---------------------------------------------------------------------------------------------------------

LABELS = {
    "time_gap": "months between the ends",
    "prediction_gap": "months to the nearer end",
    "position": "relative position",
}
GROUPINGS = tuple(LABELS)


def grouped(rows: list[dict], key: str, names: Iterable[str]) -> dict[str, dict]:
    """{value of `key`: {<name>_mean, _std (n - 1; None for one row), _min, _max, _count}} in rising order of `key`."""
    table = {}
    for value in sorted({row[key] for row in rows}):
        part = table[str(value)] = {}
        for name in names:
            x = np.array([row[name] for row in rows if row[key] == value], dtype=np.float64)
            part |= {f"{name}_mean": float(x.mean()), f"{name}_std": float(x.std(ddof=1)) if x.size > 1 else None,
                     f"{name}_min": float(x.min()), f"{name}_max": float(x.max()), f"{name}_count": x.size}  # fmt: skip
    return table


def paired_differences(rows: list[dict], method: str, names: Iterable[str], seed: int) -> dict[str, dict]:
    """{other method: {name: mean of (method - other), ci95, n, n_subjects}} over the triples that both predicted.

    rows: one per triple and method, with the keys of `Triple.to_dict`, "method" and `names`. The interval draws
    subjects, so that a subject with many triples does not narrow it.
    """
    keys = ("subject", "start", "end", "target")
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[tuple(row[key] for key in keys)] = row
    ours, table = by_method.get(method, {}), {}
    for other in (name for name in by_method if name != method):
        pairs = [(ours[at], row) for at, row in by_method[other].items() if at in ours]
        subjects = [a["subject"] for a, _ in pairs]
        for name in names if pairs else ():
            differences = np.array([a[name] - b[name] for a, b in pairs], dtype=np.float64)
            table.setdefault(other, {})[name] = {
                "mean": float(differences.mean()), "n": len(pairs), "n_subjects": len(set(subjects)),
                "ci95": metrics.bootstrap_interval(differences, seed=seed, groups=subjects),
            }  # fmt: skip
    return table


# ---- report ---------------------------------------------------------------------------------------------------------

METHODS = {
    "ldae": "LDAE: LERP on y, SLERP on z_T",
    "ldae_change": "the nearer scan and LDAE's change from it",  # what the autoencoder blurs stays in
    "copy_nearest": "the nearer scan",
    "voxel_blend": "voxels blended",
    "latent_blend": "autoencoder latents blended",
    "aekl_nearest": "the nearer scan through the autoencoder",
    "aekl_target": "the target itself through the autoencoder (bound)",
    "ldae_vs_aekl": "LDAE against the autoencoder's decode of the target (the original's reference)",
}
FIGURES = {"ssim": "SSIM", "ssim_masked": "SSIM in head", "mse": "MSE"}


def write_report(folder: Path, rows: list[dict], about: dict, seed: int) -> dict:
    """CSVs, interpolation.{json,md} and figures of scored predictions in `folder`; returns what the JSON holds.

    rows: one per triple and method, as for `paired_differences`, with "scan".
    """
    names = [name for name in rows[0] if name in evaluation.DEFINITIONS]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    parts = {method: [row for row in rows if row["method"] == method] for method in methods}
    overall = {}
    for method, part in parts.items():
        who = [row["subject"] for row in part]
        overall[method] = {n: metrics.summary([row[n] for row in part], seed=seed, groups=who) for n in names}
    scored = [row for row in rows if row["method"] != "ldae_vs_aekl"]  # against another reference: not to be paired
    result = about | {
        "n_predictions": len(parts["ldae"]), "n_subjects": len({row["subject"] for row in rows}),
        "methods": {method: METHODS[method] for method in methods}, "definitions": evaluation.definitions(names),
        "overall": overall, "ldae_minus": paired_differences(scored, "ldae", names, seed),
        "ldae_change_minus": paired_differences(scored, "ldae_change", names, seed),
        "grouped": {key: {method: grouped(part, key, names) for method, part in parts.items()} for key in GROUPINGS},
    }  # fmt: skip
    tables.write_csv(folder / "interpolation_results.csv", rows)
    for key, by_method in result["grouped"].items():
        lines = [{"method": method, key: value, **entry} for method, table in by_method.items()
                 for value, entry in table.items()]  # fmt: skip
        tables.write_csv(folder / f"by_{key}.csv", lines)
        for name, label in FIGURES.items():
            lines = {method: ([float(v) for v in table], [entry[f"{name}_mean"] for entry in table.values()])
                     for method, table in by_method.items()}  # fmt: skip
            figures.curves(folder / f"{name}_by_{key}.png", lines, xlabel=LABELS[key], ylabel=label)
    evaluation.write_text(folder / "interpolation.md", report_markdown(result))
    write_json(folder / "interpolation.json", result)
    return result


def report_text(result: dict) -> list[str]:
    """Means by method, and LDAE's paired differences of SSIM, line by line, for a terminal."""
    lines = [f"{'prediction':82}{'SSIM':>9}{'in head':>9}{'MSE':>10}{'PSNR':>8}   LDAE minus it, SSIM in head"]
    for method, entry in result["overall"].items():
        paired = result["ldae_minus"].get(method, {}).get("ssim_masked")
        shown = f"   {paired['mean']:+.4f} [{paired['ci95'][0]:+.4f}, {paired['ci95'][1]:+.4f}]" if paired else ""
        ssim, masked, mse, psnr = (entry[name]["mean"] for name in ("ssim", "ssim_masked", "mse", "psnr"))
        lines.append(f"{METHODS[method]:82}{ssim:9.4f}{masked:9.4f}{mse:10.5f}{psnr:8.2f}{shown}")
    return [*lines, f"means of {result['n_predictions']} sessions of {result['n_subjects']} subjects, against the scan"]


def report_markdown(result: dict) -> str:
    """The overall table, paired differences, and the table by time gap, as Markdown."""
    names = [name for name in result["definitions"] if name != "head"]
    digits = {name: 5 if "mse" in name else 2 if "psnr" in name else 4 for name in names}
    text = f"# {result['n_predictions']} predicted sessions of {result['n_subjects']} subjects\n\n"
    body = [[METHODS[method], *(evaluation.mean_and_sd(entry[name], digits[name]) for name in names)]
            for method, entry in result["overall"].items()]  # fmt: skip
    text += evaluation.markdown_table(["prediction", *names], body)
    text += "\nMean ± SD [95 % interval of the mean, drawn by subject], against the scan of the session.\n\n"
    body = []
    for method, entry in result["ldae_minus"].items():
        cells = [f"{entry[n]['mean']:+.{digits[n]}f} [{entry[n]['ci95'][0]:+.{digits[n]}f}, "
                 f"{entry[n]['ci95'][1]:+.{digits[n]}f}]" for n in names]  # fmt: skip
        body.append([METHODS[method], *cells])
    text += evaluation.markdown_table(["LDAE minus", *names], body) + "\n"
    for key, by_method in result["grouped"].items():
        body = [[METHODS[method], value, str(entry["mse_count"]),
                 *(f"{entry[f'{n}_mean']:.{digits[n]}f}" for n in names)]
                for method, table in by_method.items() for value, entry in table.items()]  # fmt: skip
        text += evaluation.markdown_table(["prediction", LABELS[key], "n", *names], body) + "\n"
    text += "".join(f"- {name}: {meaning}\n" for name, meaning in result["definitions"].items())
    return text + "".join(f"- left out: {problem}\n" for problem in result.get("left_out", []))
