"""Which slices the semantic encoder looks at: the attention weight of every slice of every scan.

    python ldae/scripts/slice_attention.py                                 # all scans of the table
    python ldae/scripts/slice_attention.py --part test --n_single 8        # test subjects, 8 scans with a picture

Writes ROOT/attention/slice_attention.csv (a row per scan and slice: index, world position in mm, weight; weights of a
scan sum to 1), slice_attention.json (per diagnosis: mean position and effective number of slices), slice_attention.png
(mean +- SD by diagnosis), single_scans.png and scan_<scan>.png (weights laid over the scan). As long as
save_semantic_latent.py. Under torchrun the scans are shared out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
COLUMNS = ("scan", "subject", "session", "diagnosis", "slice", "position_mm", "weight")
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume (D, H, W), perpendicular to the slices
SHOWN = {"sagittal": ("axial", "coronal"), "coronal": ("sagittal", "axial"), "axial": ("sagittal", "coronal")}


@dataclass
class Options(CommonOptions):
    precision: str = option("fp32", "arithmetic of the encoder", choices=("auto", "fp32", "bf16", "fp16"))
    root: str = option(str(HERE), "study folder that default paths hang off", group="paths")
    csv_path: str = option("", "table of the scans; empty: ROOT/data/dataset.csv", group="paths")
    model_path: str = option("", "network of stage 3; empty: ROOT/runs/ldae_repr_learn/checkpoints/best.ckpt",
                             group="paths")  # fmt: skip
    split: str = option("", "split of the subjects; empty: ROOT/split.json", group="paths")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache", group="paths")
    output_dir: str = option("", "output folder; empty: ROOT/attention", group="paths")
    trust_pickle: bool = option(False, "allow a network file that needs pickle; it can run code", group="paths")
    overwrite: bool = option(False, "replace earlier results", group="paths")
    part: str = option("all", "subjects that are taken; all needs no split", choices=("train", "val", "test", "all"),
                       group="scans")  # fmt: skip
    max_scans: int = option(0, "only the first so many scans; 0: all", group="scans")
    n_single: int = option(4, "scans with a picture of their own, the diagnoses in turn", group="scans")

    def __post_init__(self):
        if self.max_scans < 0 or self.n_single < 0:
            raise UserError("--max_scans and --n_single must be 0 or more")
        root = Path(self.root)
        self.csv_path = self.csv_path or str(root / "data" / "dataset.csv")
        self.model_path = self.model_path or str(root / "runs" / "ldae_repr_learn" / "checkpoints" / "best.ckpt")
        self.split = self.split or str(root / "split.json")
        self.cache = self.cache or str(root / "data" / "cache")
        self.output_dir = self.output_dir or str(root / "attention")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        export(options, rt)


def export(options: Options, rt) -> dict | None:
    """Write table, summary and pictures; returns the summary (rank 0)."""
    from common.runlog import progress, write_json
    from ldae import dataset, generation, model

    # ---- setup
    out = Path(options.output_dir)
    record_path = out / "slice_attention.json"
    if record_path.exists() and not options.overwrite:
        raise UserError(f"{record_path} is there already; name another --output_dir, or add --overwrite")
    ldae = model.load_ldae(Path(options.model_path), rt, options.trust_pickle, option="--model_path")
    rows = generation.select_rows(options, ldae)
    volumes = dataset.Volumes(ldae.preparation, None if options.cache == "none" else options.cache)
    rt.barrier()  # every rank has judged the folder before any writes

    # ---- loop over scans: each rank takes its share
    found = {}
    mine = rt.shard(rows)
    with progress(len(mine), 0, "slice attention", enabled=rt.is_main) as bar:
        for row in mine:
            weights = ldae.attention(volumes.tensor(row)[None])[0].cpu().numpy()
            found[row.scan] = weights, positions(volumes.affine(row), ldae.preparation.shape, ldae.plane)
            bar.update()
    found = {scan: entry for part in rt.gather(found) for scan, entry in part.items()}
    if not rt.is_main:
        return None

    # ---- finish
    write_table(out / "slice_attention.csv", rows, found)
    draw(out, rows, found, volumes, ldae.plane, singles(rows, options.n_single))
    record = {"model": ldae.hash, "plane": ldae.plane, "part": options.part, "split": ldae.split_hash,
              "scans": len(rows), "by_diagnosis": summary(rows, found)}  # fmt: skip
    write_json(record_path, record)
    for name, entry in record["by_diagnosis"].items():
        rt.print(f"{name}: {entry['scans']} scans, mean position {entry['mean_position_mm']:.1f} mm, "
                 f"{entry['effective_slices']:.1f} effective slices of {entry['slices']}")  # fmt: skip
    rt.print(f"written to {out}")
    return record


def positions(affine, shape, plane: str):
    """World position (mm) of the centre of every slice, (S,), along the axis that the slices are perpendicular to."""
    import numpy as np

    axis = AXES[plane]
    voxels = np.tile([(n - 1) / 2 for n in shape] + [1.0], (shape[axis], 1))
    voxels[:, axis] = np.arange(shape[axis])
    return (voxels @ np.asarray(affine).T)[:, axis]


def by_diagnosis(rows) -> dict[str, list]:
    groups = {}
    for row in rows:
        groups.setdefault(row.diagnosis or "no diagnosis", []).append(row)
    return dict(sorted(groups.items()))


def singles(rows, n: int) -> list:
    """`n` rows, the diagnoses in turn, each subject once as long as there are others."""
    groups, chosen = by_diagnosis(rows), []
    queues = []
    for members in groups.values():
        first = {row.subject: row for row in reversed(members)}
        queues.append(list(reversed(first.values())) + [row for row in members if first[row.subject] is not row])
    while len(chosen) < min(n, len(rows)):
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop(0))
    return chosen


def summary(rows, found) -> dict[str, dict]:
    """Per diagnosis: scans, slices, mean and SD of the weighted position, mean effective number exp(entropy)."""
    import numpy as np

    result = {}
    for name, members in by_diagnosis(rows).items():
        weights = np.array([found[row.scan][0] for row in members], np.float64)
        centres = (weights * np.array([found[row.scan][1] for row in members])).sum(1)
        entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(1)
        result[name] = {
            "scans": len(members),
            "slices": weights.shape[1],
            "mean_position_mm": float(centres.mean()),
            "sd_position_mm": float(centres.std()),
            "effective_slices": float(np.exp(entropy).mean()),
        }
    return result


def write_table(path: Path, rows, found) -> None:
    """A row per scan and slice."""
    from common.tables import write_csv

    records = []
    for row in rows:
        about = {name: getattr(row, name) for name in COLUMNS[:4]}
        for i, (weight, position) in enumerate(zip(*found[row.scan], strict=True)):
            records.append(about | {"slice": i, "position_mm": f"{position:.2f}", "weight": f"{weight:.6g}"})
    write_csv(path, records, COLUMNS)


def draw(out: Path, rows, found, volumes, plane: str, chosen) -> None:
    """Mean +- SD by diagnosis, the curves of single scans, and the weights laid over each of these."""
    import numpy as np

    from common import figures

    lines = {}
    for name, members in by_diagnosis(rows).items():
        weights = np.array([found[row.scan][0] for row in members])
        mean, sd = weights.mean(0), weights.std(0)
        lines[f"{name} (n = {len(members)})"] = np.arange(len(mean)), mean, np.maximum(mean - sd, 0), mean + sd
    label = {"xlabel": f"{plane} slice", "ylabel": "attention weight"}
    figures.curves(out / "slice_attention.png", lines, title="mean \N{PLUS-MINUS SIGN} SD over scans", **label)
    if not chosen:
        return
    single = {f"{row.scan} ({row.diagnosis or '?'})": (np.arange(len(found[row.scan][0])), found[row.scan][0])
              for row in chosen}  # fmt: skip
    figures.curves(out / "single_scans.png", single, title="single scans", **label)
    for row in chosen:
        volume, weights = volumes.load(row), found[row.scan][0]
        shape = [1, 1, 1]
        shape[AXES[plane]] = -1
        laid = np.broadcast_to(weights.reshape(shape), volume.shape)
        spacing_mm = np.linalg.norm(volumes.affine(row)[:3, :3], axis=0).tolist()
        figures.overlay(out / f"scan_{row.scan}.png", volume, laid, window=(0, 1), alpha=0.4, planes=SHOWN[plane],
                        foreground_window=(0, float(weights.max())), threshold=-1.0, spacing_mm=spacing_mm,
                        unit="attention weight", title=row.scan)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
