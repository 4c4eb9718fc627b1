"""Attribution maps of test subjects: files in the space of their volumes, tables, group means, regions, sanity.

`generate` is the run (entry scripts: generate_saliency_maps.py, run_saliency_generation.py); the methods are in
attribution.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage, stats
from torch import Tensor, nn

from common import figures, nifti, runtime, tables, training
from common.cli import UserError, to_dict
from common.metrics import bootstrap_interval
from common.runlog import git_revision, progress, write_json
from neuroldm3d import dataset, preprocess, regions
from neuroldm3d.classifier import attribution, composition, metrics, trainer
from neuroldm3d.classifier.config import RunSaliencyOptions, SaliencyOptions
from neuroldm3d.dataset import CLASSES, Row
from neuroldm3d.preprocess import Preparation

COLUMNS = ("method", "shape", *attribution.STATISTICS, "subject_id", "true_label", "prediction", "sample_idx")
TABLES = {"attribution_statistics": "statistics", "completeness": "completeness", "region_shares": "regions"}
SANE_CORRELATION = 0.5  # maps of a network without training must agree less than this with those of the trained one


# ---- regions --------------------------------------------------------------------------------------------------------


def region_rows(prepared, labels, codes: dict[str, int], spacing_mm, tolerance_mm: float) -> list[dict]:
    """Per region: share of the map's absolute mass, of the brain's voxels, whether the peak points there, and chance.

    prepared: map; labels: region codes, > 0 is brain, both on one grid. The peak is that of the absolute map smoothed
    by one voxel, inside the brain; it points at a region within `tolerance_mm` of it; chance: share of brain voxels
    that would.
    """
    brain = labels > 0
    mass = np.abs(prepared) * brain
    smooth = np.where(brain, ndimage.gaussian_filter(np.abs(prepared), 1.0), -1.0)
    peak = np.unravel_index(np.argmax(smooth), smooth.shape)
    rows = []
    for name, code in codes.items():
        inside = labels == code
        if not inside.any():
            continue
        near = ndimage.distance_transform_edt(~inside, sampling=spacing_mm) <= tolerance_mm
        rows.append({"region": name, "mass_share": float(mass[inside].sum() / max(mass.sum(), 1e-30)),
                     "volume_share": float(inside.sum() / brain.sum()), "hit": bool(near[peak]),
                     "chance": float((near & brain).sum() / brain.sum())})  # fmt: skip
    return rows


def target_summary(rows: list[dict], seed: int) -> dict | None:
    """Pointing accuracy against chance and relative mass over TLE subjects in the region of their own side.

    rows: region rows with `group` and `region`; a region belongs to the side that its name ends with.
    """
    own = [row for row in rows if row["group"] in ("left", "right") and row["region"].endswith(row["group"])]
    if not own:
        return None
    hits, chance = sum(row["hit"] for row in own), float(np.mean([row["chance"] for row in own]))
    ratio = [row["mass_share"] / row["volume_share"] for row in own]
    return {
        "n": len(own),
        "regions": sorted({row["region"] for row in own}),
        "pointing_accuracy": hits / len(own),
        "pointing_ci95": metrics.wilson(hits, len(own)),
        "chance": chance,
        "p_above_chance": float(stats.binomtest(hits, len(own), chance, alternative="greater").pvalue),
        "mass_over_volume": {"mean": float(np.mean(ratio)), "ci95": list(bootstrap_interval(ratio, seed=seed))},
    }


# ---- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Running sums of signed and absolute maps on the prepared grid, per method and class."""

    maps: dict[tuple[str, int, str], np.ndarray] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, method: str, label: int, prepared: np.ndarray) -> None:
        for kind, part in (("signed", prepared), ("absolute", np.abs(prepared))):
            key = (method, label, kind)
            self.maps[key] = self.maps.get(key, 0) + part.astype(np.float64)


def generate(options: SaliencyOptions, rows: list[Row], model_path: Path, out: Path, rt: runtime.Runtime) -> dict:
    """Maps, overlays and tables of `rows` that the network has not seen, below `out`; returns saliency.json's content.

    options: those of generate_saliency_maps.py. UserError if no row is left, or `out` holds maps of other settings.
    """
    # ---- setup
    check(options)
    network, saved = trainer.load_classifier(model_path, rt, trust_pickle=options.trust_pickle)
    prep = Preparation.from_dict(saved["preparation"])
    volumes = dataset.Volumes(prep, None if options.cache == "none" else options.cache)
    rows = unseen(rows, saved["seen"], rt)[: options.max_samples or None]
    if max(options.key_slices, default=0) >= (n := trainer.input_shape(prep)[0]):
        raise UserError(f"--key_slices {options.key_slices}: classifier inputs have the slices 0 to {n - 1}")
    codes = region_codes(options, rows, rt)
    claim_folder(out, record(options, rows, saved), options.overwrite, rt)
    study = Study(network, volumes, saved["pad"], options, codes, out)

    # ---- loop over subjects: each rank takes its share
    mine, found, sums = rt.shard(list(enumerate(rows))), [], Sums()
    with progress(len(mine), 0, "saliency", enabled=rt.is_main) as bar:
        for number, row in mine:
            found.append(explain(study, number, row, sums))
            bar.update()
    sane = sanity(study, rows[: options.sanity_samples], rt) if options.sanity_samples else None

    # ---- report
    found = sorted((part for shard in rt.gather(found) for part in shard), key=lambda part: part["number"])
    sums = merge(rt.gather(sums))
    if rt.is_main:
        write_tables(out, found)
        write_group_maps(study, sums, rows)
        report = record(options, rows, saved) | summarise(found, options) | {"sanity": sane}
        report["git_revision"] = git_revision()
        write_json(out / "saliency.json", trainer.json_ready(report))
        print_report(report, out, rt)
    rt.barrier()
    return json.loads((out / "saliency.json").read_text())


def explain_run(options: RunSaliencyOptions, rt: runtime.Runtime) -> list[dict]:
    """`generate` for every fold of a run of train.py, each network on the test subjects of its own fold."""
    folder = Path(options.runs) / options.exp
    folds = sorted(folder.glob("fold_*/best_model.pth"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not folds:
        raise UserError(f"no fold_K/best_model.pth in {folder}: train with classifier/train.py, or name a run's --exp")
    rows = {}
    for split in composition.SPLITS:
        table = Path(options.csv_path).with_name(f"{split}.csv")
        rows |= {row.name: row for row in dataset.read_table(table, options.label_column)} if table.is_file() else {}
    reports = []
    for path in folds:
        tested = [row["name"] for row in trainer.read_predictions(path.with_name("individual_test_performance.csv"))]
        if lost := [name for name in tested if name not in rows]:
            raise UserError(f"{lost[0]}, a test subject of {path.parent}, is in no table beside {options.csv_path}")
        chosen = [rows[name] for name in tested]
        reports.append(generate(options, chosen, path, Path(options.output_dir) / path.parent.name, rt))
    return reports


@dataclass(frozen=True)
class Study:
    """What every subject's explanation needs."""

    network: nn.Module
    volumes: dataset.Volumes
    pad: str
    options: SaliencyOptions
    codes: dict[str, int]
    out: Path

    def input(self, row: Row) -> Tensor:
        """Classifier input (1, S, h, w) on the network's device."""
        x = preprocess.classifier_input(self.volumes.load(row), self.volumes.prep, pad=self.pad)
        return torch.from_numpy(x)[None].to(next(self.network.parameters()).device)

    def baseline(self, x: Tensor) -> float:
        return float(x.min()) if self.options.baseline == "background" else 0.0

    def file(self, row: Row, method: str, ending: str) -> Path:
        return self.out / method / row.name / f"{row.name}_{method}_{ending}"

    def regions_of(self, row: Row, prepared: np.ndarray) -> list[dict]:
        """Shares of a map (D, H, W) in the target regions of a subject."""
        path = regions.region_path(self.options.regions, row.name)
        labels = regions.prepared_labels(path, self.volumes.prep)
        return region_rows(prepared, labels.data, self.codes, labels.spacing_mm, self.options.tolerance_mm)

    def seed(self, row: Row) -> int:
        """Of a subject's random methods, whatever its company."""
        return runtime.generator(self.options.seed, row.name).initial_seed()


def explain(study: Study, number: int, row: Row, sums: Sums) -> dict:
    """Every map of a subject: files, and {"number", "statistics", "completeness", "regions"} for the tables."""
    options, x = study.options, study.input(row)
    with torch.no_grad():
        probability = torch.sigmoid(study.network(x)).item()
    volume, baseline = nifti.load(row.file), study.baseline(x)
    found = {"number": number, "statistics": [], "completeness": [], "regions": []}
    sums.counts[row.label] = sums.counts.get(row.label, 0) + 1
    for method in options.methods:
        a = attribution.attribute(study.network, x, method, baseline=baseline, seed=study.seed(row))
        values = (method, "x".join(map(str, a.shape[1:])), *attribution.statistics(a).values())
        values += (row.name, row.label, probability, number)
        found["statistics"].append(dict(zip(COLUMNS, values, strict=True)))
        if method in attribution.COMPLETE:
            shap = method == "gradient_shap"
            start = attribution.shap_baseline(x, baseline, study.seed(row)) if shap else baseline
            complete = attribution.completeness(study.network, x, start, a)
            found["completeness"].append({"subject_id": row.name, "method": method, **complete})
        a = a[0].cpu().numpy()
        prepared = attribution.to_prepared(a, study.volumes.prep)
        sums.add(method, row.label, prepared)
        if study.codes:
            found["regions"] += [{"subject_id": row.name, "group": row.group, "method": method, **r}
                                 for r in study.regions_of(row, prepared)]  # fmt: skip
        on_file = attribution.to_file_grid(prepared, study.volumes.affine(row), row.file)
        attribution.save_like(study.file(row, method, "attributions.nii.gz"), on_file, row.file)
        if options.pictures < 0 or number < options.pictures:
            title = f"P(TLE) {probability:.2f}, truth {CLASSES[row.label]}"
            draw_overlay(study.file(row, method, "overlay.png"), volume, on_file.data, f"|{method}|; {title}", row.name)
            title = f"{row.name}: {title}; {method}, each slice in its own range"
            draw_slices(study.file(row, method, "summary.png"), x[0].cpu().numpy(), a, options.key_slices, title)
    return found


def draw_overlay(path: Path, volume: nifti.Volume, found: np.ndarray, unit: str, title: str) -> None:
    """The map's size (D, H, W) laid over the volume, cut through its peak."""
    size = np.abs(found)
    top = float(np.quantile(size, 0.999)) or 1.0
    figures.overlay(path, volume.data, size, foreground_window=(0.0, top), threshold=0.25 * top,
                    voxel=[int(i) for i in np.unravel_index(size.argmax(), size.shape)], spacing_mm=volume.spacing_mm,
                    unit=unit, title=title)  # fmt: skip


def draw_slices(path: Path, x: np.ndarray, signed: np.ndarray, key_slices, title: str) -> None:
    """Coronal slices of a classifier input (S, h, w) above their signed map; the patient's right is on the left."""
    chosen = key_slices or tuple(int(share * len(x)) for share in np.linspace(0.2, 0.8, 7))
    fig = Figure(figsize=(1.5 * len(chosen), 3.4), layout="constrained")
    axes = fig.subplots(2, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        limit = float(np.abs(signed[index]).max()) or 1.0
        for ax, data, style in (
            (axes[0][column], x[index], {"cmap": "gray"}),
            (axes[1][column], signed[index], {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
        ):
            ax.imshow(data.T[::-1], interpolation="nearest", **style)  # superior on top
            ax.set_axis_off()
        axes[0][column].set_title(f"slice {index}", fontsize=7)
    fig.suptitle(title, fontsize=8)
    figures.save(fig, path)


def sanity(study: Study, rows: list[Row], rt: runtime.Runtime) -> dict:
    """Rank correlation inside the head between maps of the trained and of a randomised network.

    With region maps also the mass of the randomised network's maps in the region of the own side (TLE).
    """
    fresh = attribution.randomised(study.network, study.options.seed)
    parts = []
    for row in rt.shard(rows):
        x = study.input(row)
        head = (x > x.min())[0].cpu().numpy()
        settings = dict(baseline=study.baseline(x), seed=study.seed(row))
        for method in study.options.methods:
            maps = [attribution.attribute(net, x, method, **settings) for net in (study.network, fresh)]
            a, b = (found[0].cpu().numpy() for found in maps)
            trained, random = a[head], b[head]
            shared = study.regions_of(row, attribution.to_prepared(b, study.volumes.prep)) if study.codes else []
            parts.append({"method": method, "signed": float(stats.spearmanr(trained, random).statistic),
                          "absolute": float(stats.spearmanr(abs(trained), abs(random)).statistic),
                          "regions": [{"group": row.group, **r} for r in shared]})  # fmt: skip
    found = [part for shard in rt.gather(parts) for part in shard]
    result = {}
    for method in study.options.methods:
        mine = [part for part in found if part["method"] == method]
        signed, absolute = (float(np.mean([part[key] for part in mine])) for key in ("signed", "absolute"))
        target = target_summary([r for part in mine for r in part["regions"]], study.options.seed)
        result[method] = {"rank_correlation": signed, "rank_correlation_absolute": absolute, "n": len(mine),
                          "depends_on_weights": signed < SANE_CORRELATION,
                          "mass_over_volume": target and target["mass_over_volume"]["mean"]}  # fmt: skip
    return result


# ---- who and where


def check(options: SaliencyOptions) -> None:
    unknown = [name for name in options.methods if name not in attribution.METHODS]
    if unknown or len(set(options.methods)) < len(options.methods):
        known = ", ".join(attribution.METHODS)
        raise UserError(f"--methods {' '.join(options.methods)}: give some of {known}, each once")
    if options.max_samples < 0 or options.sanity_samples < 0 or min(options.key_slices, default=0) < 0:
        raise UserError("--max_samples, --sanity_samples and --key_slices must be 0 or more")


def unseen(rows: list[Row], seen: list[str] | None, rt: runtime.Runtime) -> list[Row]:
    """Rows outside training and validation of the network; UserError if none is left."""
    # Deviation (original code): it explains whatever the table lists, the early-stopping subjects among them.
    if seen is None:
        rt.print("note: the file does not say whom the network has seen: make sure that the table lists test subjects")
        return rows
    left = [row for row in rows if row.name not in set(seen)]
    if len(left) < len(rows):
        rt.print(f"note: {len(rows) - len(left)} of {len(rows)} rows were in training or validation and are left out")
    if not left:
        raise UserError("every listed subject was in training or validation of this network: name the test table "
                        "with --csv_path")  # fmt: skip
    return left


def region_codes(options: SaliencyOptions, rows: list[Row], rt: runtime.Runtime) -> dict[str, int]:
    """Codes of --target_regions, or nothing where there are no region maps."""
    if not Path(options.regions).is_dir():
        rt.print(f"no region maps in {options.regions}: regions are left out")
        return {}
    from common.phantom import LABELS

    codes = {}
    for item in options.target_regions:
        name, _, number = item.partition("=")
        if not number.isdecimal() and name not in LABELS:
            raise UserError(f"--target_regions {item}: give NAME=CODE, or one of {', '.join(LABELS)}")
        codes[name] = int(number) if number else LABELS[name]
    for row in rows:
        regions.region_path(options.regions, row.name)  # missing ones are known before the first map
    return codes


def record(options: SaliencyOptions, rows: list[Row], saved: dict) -> dict:
    """Settings that the maps depend on."""
    names = ("methods", "baseline", "seed", "tolerance_mm", "target_regions", "sanity_samples", "key_slices")
    settings = {name: to_dict(options)[name] for name in names}
    return settings | {"classifier": saved["hash"], "preparation": saved["preparation"], "pad": saved["pad"],
                       "n": len(rows), "subjects": [row.name for row in rows], "steps": attribution.STEPS}  # fmt: skip


def claim_folder(out: Path, settings: dict, overwrite: bool, rt: runtime.Runtime) -> None:
    """Enter the settings in OUT/saliency.json; UserError if the folder holds something else. Same settings: redone."""
    path = out / "saliency.json"
    settings, old = trainer.json_ready(settings), {}
    if path.is_file():
        old = training.read_record(path, ("classifier",), "name another --output_dir, or add --overwrite")
    changed = [name for name, value in settings.items() if old and old.get(name) != value]
    if changed and not overwrite:
        raise UserError(f"{out} holds maps of other settings ({', '.join(changed)}): name another --output_dir, or "
                        "add --overwrite")  # fmt: skip
    if not old and not overwrite and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files that are not ours: name another --output_dir, or add --overwrite")
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        write_json(path, settings)
    rt.barrier()


# ---- tables and group maps


def merge(shards: list[Sums]) -> Sums:
    """Sums of all ranks."""
    total = Sums()
    for sums in shards:
        for key, part in sums.maps.items():
            total.maps[key] = total.maps.get(key, 0) + part
        for label, n in sums.counts.items():
            total.counts[label] = total.counts.get(label, 0) + n
    return total


def write_tables(out: Path, found: list[dict]) -> None:
    """attribution_statistics.csv (the published columns), completeness.csv; region_shares.csv if regions are known."""
    for name, key in TABLES.items():
        rows = [row for part in found for row in part[key]]
        if rows:
            tables.write_csv(out / f"{name}.csv", rows)


def write_group_maps(study: Study, sums: Sums, rows: list[Row]) -> None:
    """Mean maps per method and class on the prepared grid (NIfTI), and a picture of the mean absolute ones."""
    affine = study.volumes.affine(rows[0])
    if not all(np.allclose(study.volumes.affine(row), affine, atol=0.1) for row in rows):
        return  # subjects on different grids have no common mean
    mean = {key: (total / sums.counts[key[1]]).astype(np.float32) for key, total in sums.maps.items()}
    for (method, label, kind), data in mean.items():
        nifti.save(study.out / method / f"mean_{kind}_{CLASSES[label]}.nii.gz", data, affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for method in study.options.methods:
        shown = {CLASSES[label]: np.flip(mean[method, label, "absolute"], 0)  # figures are drawn in RAS+ order
                 for label in sums.counts}  # fmt: skip
        both = sum(shown.values())
        peak = [int(i) for i in np.unravel_index(both.argmax(), both.shape)]
        figures.montage(study.out / f"group_{method}.png", shown, cmap="inferno", voxel=peak, spacing_mm=spacing,
                        unit=f"mean |{method}|", title=f"n = {len(rows)}")  # fmt: skip


def summarise(found: list[dict], options: SaliencyOptions) -> dict:
    """Completeness and pointing per method."""
    summary = {"completeness": {}, "pointing": {}}
    for method in options.methods:
        errors = [row["relative_error"] for part in found for row in part["completeness"] if row["method"] == method]
        if errors:
            summary["completeness"][method] = {"median": float(np.median(errors)), "max": max(errors), "n": len(errors)}
        rows = [row for part in found for row in part["regions"] if row["method"] == method]
        if target := target_summary(rows, options.seed):
            summary["pointing"][method] = target
    return summary


def print_report(report: dict, out: Path, rt: runtime.Runtime) -> None:
    for method, row in report["completeness"].items():
        rt.print(f"completeness of {method}: |sum - change of logit| / |change|, median {row['median']:.2%}, "
                 f"largest {row['max']:.2%} (n = {row['n']})")  # fmt: skip
    for method, row in report["pointing"].items():
        low, high = row["pointing_ci95"]
        rt.print(f"{method}: peak at {'/'.join(row['regions'])} of the own side in {row['pointing_accuracy']:.0%} "
                 f"[{low:.0%}, {high:.0%}] of {row['n']} TLE, chance {row['chance']:.1%}; mass "
                 f"{row['mass_over_volume']['mean']:.1f} times the volume's share")  # fmt: skip
    for method, row in (report["sanity"] or {}).items():
        verdict = "depends on the weights" if row["depends_on_weights"] else "hardly depends on the weights"
        mass = row["mass_over_volume"]
        rt.print(f"{method} {verdict}: rank correlation with a randomised network {row['rank_correlation']:.2f}"
                 + (f", whose mass is {mass:.1f} times the volume's share" if mass is not None else ""))  # fmt: skip
    rt.print(f"{report['n']} subjects in {out}")
