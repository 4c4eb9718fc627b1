"""Real against synthetic volumes, slice position by slice position or whole: FID, KID and their relatives.

`evaluate` is what per_slice_fid.py runs. Of every slice position (112 + 136 + 112 of them) it computes the features of
three sets of equal size and class shares: real, synthetic, and other real volumes as baseline. Only the slices of a few
positions are in memory at a time. Axes are those of prepared volumes: 0 sagittal, 1 coronal, 2 axial.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import figures, runtime, training
from common.checkpoint import replacing
from common.cli import UserError
from common.fid import normal_interval
from common.runlog import git_revision, progress, write_json
from neuroldm3d import dataset
from neuroldm3d.dataset import CLASSES, Row
from neuroldm3d.diffusion import fid
from neuroldm3d.diffusion.features import Features, load_features
from neuroldm3d.preprocess import Preparation, denormalise, units

AXES = ("sagittal", "coronal", "axial")
UNKNOWN = -1  # label of volumes without a class, such as samples of the VAE prior
FOREGROUND_LEVEL = 0.05  # of the scaled range above the volume's minimum
MEASURES = ("fid", "kid", "kid_se", "precision", "recall", "density", "coverage", "nn_accuracy")


def evaluate(options, rt: runtime.Runtime) -> dict:
    """Compare, write OUTPUT_DIR and return the results (the same on every rank); see per_slice_fid.py."""
    # ---- setup
    out = Path(options.output_dir)
    if (out / "fid_results.json").exists() and not options.overwrite:
        raise UserError(f"{out} holds results already; name another --output_dir or add --overwrite")
    rt.barrier()  # every rank has looked before rank 0 writes
    for name in ("batch_size", "volume_batch_size", "positions_per_pass"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")

    # ---- data
    sets = choose_sets(options)
    prep = find_preparation(options)
    volumes = dataset.Volumes(prep, None if options.cache == "none" else options.cache)
    scale = Scaling(options, prep)
    network = load_features(options.features, options.weights, prep, rt, seed=options.seed)
    draws = resampled_subjects(sets, options)

    # ---- compare
    if network.per_slice:
        shares = foreground_shares(sets["real"], volumes, scale, rt)
        wanted = chosen_positions(prep.shape, shares, options)
        rows, width = compare_positions(sets, volumes, scale, network, wanted, draws, options, rt)
        result = slice_report(rows, prep.shape, shares, options)
    else:
        row, width = compare_volumes(sets, volumes, network, draws, options, rt)
        rows, result = [], {"overall": summary_of([row])}

    # ---- report
    n = len(sets["real"])
    warnings = [
        fid.small_sample_warning(n, width),
        "" if "baseline" in sets else "no real-vs-real baseline was asked for",
    ]
    head = {
        "n": n,
        "n_per_class": class_counts(sets["real"]),
        "features": network.record | {"width": width},
        "warnings": [w for w in warnings if w],
        "scaling": scale.text if network.per_slice else units(prep),
    }
    tail = {
        "selection": {name: [row.name for row in chosen] for name, chosen in sets.items()},
        "preparation": prep.to_dict(),
        "options": training.recorded(options),
        "git_revision": git_revision(),
    }
    result = head | result | tail
    if rt.is_main:
        write_results(out, result, rows, prep.shape)
        print(summary_text(result))
        print(f"full report: {out / 'fid_results.json'}")
    rt.barrier()
    return result


# ---- who is compared


def synthetic_rows(folder: str | Path) -> list[Row]:
    """Volumes of FOLDER/{HC,TLE}, of one of these two folders, or without a class of a folder; UserError if none."""
    folder = Path(folder)
    if folder.name in CLASSES:
        return dataset.synthetic_rows(folder.parent, CLASSES.index(folder.name))
    if any((folder / name).is_dir() for name in CLASSES):
        return dataset.synthetic_rows(folder)
    files = sorted(p for p in folder.glob("*") if p.name.endswith(dataset.EXTENSIONS))
    if not files:
        raise UserError(f"no volumes in {folder}; make some with diffusion/save_synth.py or name --synthetic_folder")
    return [Row(file, dataset.stem(file), UNKNOWN, "unknown", dataset.stem(file)) for file in files]


def choose_sets(options) -> dict[str, list[Row]]:
    """Rows "real", "synthetic" and, unless --baseline_csv none, "baseline": one size and class mix, no repeats, seeded.

    No volume of the baseline is in the real set. UserError if a set is too small to compare.
    """
    real = dataset.read_table(options.real_csv, options.label_column)
    if options.synthetic_csv:
        fake = dataset.read_table(options.synthetic_csv, options.label_column)
    else:
        folders = [f for f in (options.synthetic_folder, options.synthetic_folder_2) if f]
        fake = [row for folder in folders for row in synthetic_rows(folder)]
    pools = {"real": real, "synthetic": fake}
    if options.baseline_csv != "none":
        taken = {row.file.resolve() for row in real}
        others = dataset.read_table(options.baseline_csv, options.label_column)
        pools["baseline"] = [row for row in others if row.file.resolve() not in taken]
    if not options.match_classes:
        pools = {name: [replace(row, label=0) for row in rows] for name, rows in pools.items()}
    elif any(row.label == UNKNOWN for row in fake):
        raise UserError("the synthetic volumes lie in no folder HC or TLE, so their class is unknown; sort them, or "
                        "add --no_match_classes")  # fmt: skip
    counts = matched_counts(list(pools.values()), options.max_files)
    if sum(counts.values()) < 3:
        sizes = ", ".join(f"{class_counts(rows)} {name}" for name, rows in pools.items())
        raise UserError(f"too few volumes with the real set's classes to compare ({sizes}); make more, or add "
                        "--no_match_classes")  # fmt: skip
    seeds = [len(pools) * options.seed + k for k in range(len(pools))]  # sets in one order are not drawn alike
    return {name: dataset.select_matched(rows, counts, s) for s, (name, rows) in zip(seeds, pools.items(), strict=True)}


def matched_counts(pools: list[list[Row]], limit: int) -> dict[int, int]:
    """How many of each label to take from every pool: the first pool's shares, as many as all have, at most `limit`."""
    have = [Counter(row.label for row in pool) for pool in pools]
    total = len(pools[0])
    shares = {label: count / total for label, count in have[0].items()}
    n = min([limit or total, total, *(math.floor(h[label] / s + 1e-9) for h in have for label, s in shares.items())])
    return dataset.apportion({label: s * n for label, s in shares.items()}, n)


def class_counts(rows: list[Row]) -> dict[str, int]:
    counts = Counter(row.group if row.label == UNKNOWN else CLASSES[row.label] for row in rows)
    return dict(sorted(counts.items()))


def find_preparation(options) -> Preparation:
    """Of the synthetic volumes' record; of --vae where they have none, as real volumes in their place."""
    made_with = None if options.synthetic_csv else dataset.synthetic_preparation(Path(options.synthetic_folder))
    if made_with is not None:
        return made_with
    saved = training.read_network(Path(options.vae), "neuroldm3d vae", "VAE/train.py", "--vae", trust_pickle=False)
    return Preparation.from_dict(saved["preparation"]) if "network" in saved else Preparation(norm="zscore")


def resampled_subjects(sets: dict[str, list[Row]], options) -> dict[str, np.ndarray]:
    """Row numbers (resamples, n) of the bootstrap per set, the same at every position."""
    n = len(sets["real"])
    return {name: fid.bootstrap_draws(n, options.bootstrap, options.seed, k) for k, name in enumerate(sets)}


# ---- volumes to slices


class Scaling:
    """Prepared volumes (D, H, W) to [0, 1] as --scaling, --window and --eight_bit say."""

    def __init__(self, options, prep: Preparation):
        self.minmax, self.window, self.eight_bit, self.prep = (
            options.scaling == "minmax", options.window, options.eight_bit, prep)  # fmt: skip
        if not self.minmax and not self.window and prep.norm == "zscore":
            raise UserError("z-scored volumes have no range of their own: give --window LOW HIGH, or --scaling minmax")
        self.window = self.window or (0.0, 1.0)
        if len(self.window) != 2 or not self.window[0] < self.window[1]:
            raise UserError(f"--window {self.window}: two numbers, the lower one first")
        low, high = self.window
        self.text = "each volume's own range" if self.minmax else f"{low:g} to {high:g} {units(prep)}, clipped"
        self.text += ", 8 bit" if self.eight_bit else ""

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        if self.minmax:
            scaled = (volume - volume.min()) / max(np.ptp(volume), 1e-12)
        else:
            # Deviation (original code): one window for all, so that differences of intensity are seen.
            low, high = self.window
            scaled = ((denormalise(volume, self.prep) - low) / (high - low)).clip(0, 1)
        return (np.floor(255 * scaled) / 255 if self.eight_bit else scaled).astype(np.float32)


def foreground_shares(rows: list[Row], volumes, scale: Scaling, rt: runtime.Runtime) -> list[np.ndarray]:
    """Per axis, mean share of each slice above the volume's background; each rank reads its part of `rows`."""
    totals = [np.zeros(n) for n in volumes.prep.shape]
    for row in rt.shard(rows):
        volume = scale(volumes.load(row))
        inside = volume > volume.min() + FOREGROUND_LEVEL
        for axis, total in enumerate(totals):
            total += inside.mean(axis=tuple(a for a in range(3) if a != axis))
    parts = rt.gather(totals)
    return [sum(part[axis] for part in parts) / len(rows) for axis in range(3)]


def chosen_positions(shape, shares: list[np.ndarray], options) -> list[tuple[int, list[int]]]:
    """(axis, positions) of each pass; with --foreground_only those with enough foreground."""
    passes = []
    for axis, n in enumerate(shape):
        kept = [i for i in range(n) if not options.foreground_only or shares[axis][i] >= options.foreground_share]
        step = options.positions_per_pass
        passes += [(axis, kept[i : i + step]) for i in range(0, len(kept), step)]
    if not passes:
        raise UserError(f"no slice has {options.foreground_share:.0%} foreground; lower --foreground_share")
    return passes


def slices_of(rows: list[Row], volumes, scale: Scaling, axis: int, positions: list[int], square: bool) -> np.ndarray:
    """(positions, n, h, w) slices of the volumes in [0, 1]; `square` pads the shorter side with 0, the background."""
    slabs = [np.moveaxis(np.take(scale(volumes.load(row)), positions, axis), axis, 0) for row in rows]
    slabs = np.stack(slabs, axis=1)
    if square:
        side = max(slabs.shape[2:])
        pads = [((side - n) // 2, side - n - (side - n) // 2) for n in slabs.shape[2:]]
        slabs = np.pad(slabs, ((0, 0), (0, 0), *pads))
    return slabs


def batches(items, size: int) -> Iterator:
    return (items[i : i + size] for i in range(0, len(items), size))


# ---- comparison


def compare_sets(features: dict[str, np.ndarray], draws: dict[str, np.ndarray], seed: int) -> dict:
    """{"synthetic": measures, "baseline": measures} of feature sets against the real one."""
    real = features["real"]
    return {
        name: fid.compare_sets(real, other, seed=seed, draws=(draws["real"], draws[name]))
        for name, other in features.items()
        if name != "real"
    }


def compare_positions(sets, volumes, scale, network: Features, passes, draws, options, rt) -> tuple[list[dict], int]:
    """Rows {"axis", "position", "synthetic": {...}, "baseline": {...}} of all positions in order, and the feature size.

    Each rank takes every world_size-th pass; memory is that of one pass.
    """
    rows, width = [], 0
    mine = rt.shard(passes)
    with progress(sum(len(p) for _, p in mine), 0, "positions", enabled=rt.is_main) as bar:
        for axis, positions in mine:
            square = options.aspect == "pad"
            slabs = {s: slices_of(chosen, volumes, scale, axis, positions, square) for s, chosen in sets.items()}
            for k, position in enumerate(positions):
                features = {name: network(batches(slab[k], options.batch_size), rt) for name, slab in slabs.items()}
                width = features["real"].shape[1]
                rows.append({"axis": axis, "position": position, **compare_sets(features, draws, options.seed)})
                bar.update()
    gathered = rt.gather((rows, width))
    rows = sorted((row for part, _ in gathered for row in part), key=lambda r: (r["axis"], r["position"]))
    return rows, max(w for _, w in gathered)


def compare_volumes(sets, volumes, network: Features, draws, options, rt) -> tuple[dict, int]:
    """One row of measures over whole volumes, and the feature size; ranks share the volumes."""
    features = {}
    for name, chosen in sets.items():
        mine = rt.shard(chosen)
        loaded = (np.stack([volumes.load(row) for row in part]) for part in batches(mine, options.volume_batch_size))
        part = network(loaded, rt) if mine else np.zeros((0, 0), np.float32)
        parts = [p for p in rt.gather(part) if len(p)]
        ordered = np.empty((len(chosen), parts[0].shape[1]), np.float32)
        for rank, p in enumerate(parts):
            ordered[rank :: rt.world_size] = p
        features[name] = ordered
    return compare_sets(features, draws, options.seed), features["real"].shape[1]


# ---- report


def summary_of(rows: list[dict]) -> dict:
    """Means over positions of each measure for synthetic and baseline, FID intervals, and how far above the floor."""
    result = {"positions": len(rows)}
    for name in ("synthetic", "baseline"):
        if rows and name in rows[0]:
            means = {m: float(np.mean([row[name][m] for row in rows])) for m in MEASURES}
            found = {m: value if math.isfinite(value) else None for m, value in means.items()}  # JSON knows no NaN
            resampled = np.mean([row[name]["fid_resampled"] for row in rows], axis=0)
            result[name] = found | {"fid_ci95": normal_interval(found["fid"], resampled)}
    if "baseline" in result:
        result["fid_above_baseline"] = result["synthetic"]["fid"] - result["baseline"]["fid"]
    return result


def slice_report(rows: list[dict], shape, shares: list[np.ndarray], options) -> dict:
    """ "overall", "overall_foreground" and, per axis, the mean, spread and extremes over positions."""
    inside = [row for row in rows if shares[row["axis"]][row["position"]] >= options.foreground_share]
    result = {"overall": summary_of(rows), "overall_foreground": summary_of(inside), "axes": {}}
    for axis, name in enumerate(AXES):
        part = [row for row in rows if row["axis"] == axis]
        if not part:
            continue
        values, positions = [row["synthetic"]["fid"] for row in part], [row["position"] for row in part]
        low, high = int(np.argmin(values)), int(np.argmax(values))
        result["axes"][f"axis{axis}"] = {
            "name": name, "size": shape[axis], **summary_of(part),
            "fid_sd": float(np.std(values)), "fid_median": float(np.median(values)),
            "fid_min": values[low], "fid_min_at": positions[low],
            "fid_max": values[high], "fid_max_at": positions[high],
        }  # fmt: skip
    return result


def write_results(out: Path, result: dict, rows: list[dict], shape) -> None:
    """The files of a run: arrays per axis, figure, summary, and fid_results.json last."""
    out.mkdir(parents=True, exist_ok=True)
    for axis, n in enumerate(shape if rows else ()):
        part = [row for row in rows if row["axis"] == axis]
        full = np.full(n, np.nan)  # NaN: left out by --foreground_only
        arrays = {"positions": np.array([row["position"] for row in part], np.int64)}
        for name in (s for s in ("synthetic", "baseline") if part and s in part[0]):
            prefix = "" if name == "synthetic" else "baseline_"
            arrays |= {prefix + m: np.array([row[name][m] for row in part], np.float64) for m in MEASURES}
        arrays["values"] = arrays.pop("fid", np.zeros(0))  # the original's name
        full[arrays["positions"]] = arrays["values"]
        _save(out / f"axis{axis}_fids.npy", np.save, full)
        _save(out / f"axis{axis}_fids_by_position.npz", np.savez, **arrays)
    if rows:
        draw(out / "per_slice_fids.png", rows)
    with replacing(out / "fid_summary.txt") as file:
        file.write((summary_text(result) + "\n").encode())
    write_json(out / "fid_results.json", result)


def _save(path: Path, save, *arrays, **named) -> None:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    with replacing(path) as file:
        file.write(buffer.getvalue())


def draw(path: Path, rows: list[dict]) -> None:
    """FID of synthetic and baseline by position, one line per axis."""
    lines = {}
    for axis, name in enumerate(AXES):
        part = [row for row in rows if row["axis"] == axis]
        for which, label in (("synthetic", name), ("baseline", f"{name}, real vs real")):
            if part and which in part[0]:
                lines[label] = [row["position"] for row in part], [row[which]["fid"] for row in part]
    figures.curves(path, lines, xlabel="slice position", ylabel="FID")


def summary_text(result: dict) -> str:
    """The table a reader wants first; no FID stands without n, network, baseline and warnings."""
    features = result["features"]
    per_class = ", ".join(f"{n} {name}" for name, n in result["n_per_class"].items())
    lines = [
        f"n = {result['n']} real and {result['n']} synthetic volumes ({per_class} each)",
        f"features: {features['network']}, {features['width']} numbers, weights "
        + features.get("sha256", features.get("weights_hash", ""))[:16],
        f"scaling: {result['scaling']}",
        "",
        f"{'':22s}{'FID [95 %]':>28s}{'KID x 1000':>18s}" + "  prec. recall  dens. cover.   1-NN",
    ]
    parts = {"overall": result["overall"], "foreground": result.get("overall_foreground", {"positions": 0})}
    parts |= {axis["name"]: axis for axis in result.get("axes", {}).values()}
    for title, part in parts.items():
        for name in ("synthetic", "baseline"):
            if name in part:
                lines.append(_table_line(title if name == "synthetic" else "  real vs real", part[name]))
    lines += [f"WARNING: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def _table_line(title: str, values: dict) -> str:
    interval = values["fid_ci95"]
    shown = f"{values['fid']:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
    kid = f"{1000 * values['kid']:.3f}" + (f" ± {1000 * values['kid_se']:.3f}" if values["kid_se"] is not None else "")
    rest = "".join(f"{values[m]:7.3f}" for m in ("precision", "recall", "density", "coverage", "nn_accuracy"))
    return f"{title:22s}{shown:>28s}{kid:>18s}{rest}"
