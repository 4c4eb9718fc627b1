"""Score reconstructions and baselines: against a dense truth, on left-out short-axis slices, on a left-out view.

    python mgdcr/evaluate.py --results mgdcr/results/balanced                    # against DATA/<subject>/dense.nii.gz
    python mgdcr/evaluate.py --leave_out slice --subject_id subject_001 --frame 0
    python mgdcr/evaluate.py --leave_out view --subject_id subject_001 --frame 0

Without --leave_out volumes of ex8_multi_optimizer.py are compared with the truth of make_phantom.py, beside every
baseline: nearest, linear, cubic, lanczos, lax_residual, with --priors also diffae and unconditional. With it each inner
slice (or view) in turn is withheld, the rest is reconstructed, and what was withheld is the truth: no dense truth is
needed. Writes OUT/scores.csv (one row per subject, frame, method) and OUT/summary.json (means, intervals, paired
Wilcoxon tests against the best interpolation, indices with Bland-Altman).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
ROI_MM = 50.0


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "folder that holds data/, checkpoints/ and results/", group="paths")
    results: str = option("", "folder of ex8_multi_optimizer.py; empty: ROOT/results/balanced", group="paths")
    data: str = option("", "folder of subjects; empty: ROOT/data", group="paths")
    ckpt: str = option("", "prior for --leave_out; empty: ROOT/checkpoints/cardiac_autoenc/best.ckpt", group="paths")
    trust_pickle: bool = option(False, "allow a checkpoint that needs pickle; it can run code", group="paths")
    ddim_ckpt: str = option("", "unconditional prior for --priors; empty: ROOT/checkpoints/cardiac_ddim/best.ckpt",
                            group="paths")  # fmt: skip
    out: str = option("", "output folder; empty: RESULTS/evaluation", group="paths")
    overwrite: bool = option(False, "replace scores that exist", group="paths")
    subject_id: tuple[str, ...] = option((), "subjects; none: all of them")
    frame: int = option(-1, "frame, from 0; -1: all")
    leave_out: str = option("none", "what to withhold in turn", choices=("none", "slice", "view"))
    mode: str = option("balanced", "how to reconstruct with --leave_out", choices=("fast", "balanced", "paper"))
    iterations: int = option(0, "most iterations with --leave_out; 0: as --mode has it")
    priors: bool = option(False, "also both priors alone, decoded codes without optimisation: diffae, unconditional")
    prior_steps: int = option(20, "their DDIM steps", unit="steps")
    factor: int = option(8, "dense slices per acquired gap")
    align: bool = option(True, "register views and slices for what uses the views")
    roi_mm: float = option(ROI_MM, "radius around the middle that is scored; 0: the whole slices", unit="mm")

    def __post_init__(self):
        root = Path(self.root)
        self.results = self.results or str(root / "results" / "balanced")
        self.data = self.data or str(root / "data")
        self.ckpt = self.ckpt or str(root / "checkpoints" / "cardiac_autoenc" / "best.ckpt")
        self.ddim_ckpt = self.ddim_ckpt or str(root / "checkpoints" / "cardiac_ddim" / "best.ckpt")
        self.out = self.out or str(Path(self.results) / "evaluation")
        if self.factor < 2:
            raise UserError(f"--factor {self.factor}: give at least 2, or there is nothing between the slices")
        if self.iterations < 0:
            raise UserError(f"--iterations {self.iterations}: 0 or more")
        if not 1 <= self.prior_steps <= 1000:
            raise UserError(f"--prior_steps {self.prior_steps}: 1 to 1000")


# ---- scores ---------------------------------------------------------------------------------------------------------


def region(shape, spacing_mm, radius_mm: float) -> np.ndarray:
    """Mask (H, W) of the pixels within a radius of the middle; spacing_mm (rows, columns); radius 0: everything."""
    rows, columns = ((np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape[-2:], spacing_mm, strict=True))
    return np.hypot(rows[:, None], columns[None]) < radius_mm if radius_mm else np.ones(shape[-2:], bool)


def unobserved(n_dense: int, factor: int) -> np.ndarray:
    """Whether a dense slice lies between acquired ones, (N,)."""
    return np.arange(n_dense) % factor != 0


def image_scores(volume: np.ndarray, truth: np.ndarray, mask: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """PSNR (dB), 2D SSIM and NRMSE of the slices `chosen` (N,) inside mask (H, W); both volumes in [0, 1]."""
    from skimage.metrics import structural_similarity

    from common import metrics

    ours, theirs = (np.clip(v[chosen], 0, 1).astype(np.float64) for v in (volume, truth))
    inside = np.broadcast_to(mask, ours.shape).astype(np.float64)
    how = dict(data_range=1.0, full=True, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    maps = [structural_similarity(a, b, **how)[1] for a, b in zip(ours, theirs, strict=True)]
    return {
        "psnr_db": metrics.psnr(ours, theirs, data_range=1.0, mask=inside),
        "ssim": float(np.stack(maps)[inside > 0].mean()),
        "nrmse": metrics.nrmse(ours, theirs, data_range=1.0, mask=inside),
    }


def label_scores(ours: np.ndarray, truth: np.ndarray, spacing_mm) -> dict[str, float]:
    """Dice, HD95 and ASSD (mm) of every structure; spacing_mm along the three axes of the maps."""
    from common import metrics
    from mgdcr.indices import LABELS

    out = {}
    for name, code in LABELS.items():
        a, b = (ours == code).astype(np.uint8), (truth == code).astype(np.uint8)
        out |= {f"dice_{name}": metrics.dice(a, b), f"hd95_mm_{name}": metrics.hd95_mm(a, b, spacing_mm=spacing_mm),
                f"assd_mm_{name}": metrics.assd_mm(a, b, spacing_mm=spacing_mm)}  # fmt: skip
    return out


def roughness(volume: np.ndarray) -> float:
    """Mean magnitude of the second difference along the slices: stair-steps are high, blur is low."""
    return float(np.abs(np.diff(volume.astype(np.float64), 2, axis=0)).mean()) if len(volume) > 2 else 0.0


def jitter(cine: np.ndarray) -> float:
    """Mean magnitude of the second difference over the closed cycle of (T, N, H, W); 0 of fewer than three frames."""
    if len(cine) < 3:
        return 0.0
    cine = cine.astype(np.float64)
    return float(np.abs(np.roll(cine, 1, 0) - 2 * cine + np.roll(cine, -1, 0)).mean())


def plane_scores(prediction: np.ndarray, target: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """PSNR (dB), NRMSE and correlation of a view's pixels (P,), after gain and offset in closed form."""
    from mgdcr.intensity import gain_offset

    gain, offset = gain_offset(prediction, target, weights)
    used = weights > 0
    ours, theirs = gain * prediction[used] + offset, target[used]
    rmse = float(np.sqrt(np.mean((ours - theirs) ** 2)))
    psnr = min(100.0, -20 * np.log10(rmse)) if rmse > 0 else 100.0
    flat = ours.std() < 1e-9 or theirs.std() < 1e-9
    return {"psnr_db": float(psnr), "nrmse": rmse, "ncc": 0.0 if flat else float(np.corrcoef(ours, theirs)[0, 1])}


# ---- withholding ----------------------------------------------------------------------------------------------------


def without_optimisation(frame, priors: dict) -> dict[str, np.ndarray]:
    """Volumes (N, H, W) of every baseline; `priors`: of `load_priors`."""
    from mgdcr import baselines

    out = {kind: baselines.interpolate(frame.sax, frame.factor, kind) for kind in baselines.INTERPOLATIONS}
    if frame.views:
        out["lax_residual"] = baselines.lax_residual(out["linear"], frame.views, frame.factor, frame.spacing_mm)
    return out | {name: baselines.prior_interpolation(alone, frame) for name, alone in priors.items()}


def methods(frame, prior, goal, settings, priors: dict) -> dict[str, np.ndarray]:
    """Volumes (N, H, W) of every baseline and, with a `prior`, of ours and of its start."""
    from mgdcr import inverse

    out = without_optimisation(frame, priors)
    if prior is not None:
        result = inverse.reconstruct(prior, frame, goal, settings)
        out |= {"start": result.seed, "ours": result.volume}
    return out


def load_priors(options: Options, rt) -> tuple[dict, int]:
    """Both networks as baselines, by name, with noise codes of the acquired slices as published; their image size."""
    from mgdcr import inverse, trainer

    settings = inverse.Settings(steps=options.prior_steps, chunk=16)
    autoencoder = trainer.load_network(Path(options.ckpt), rt, trust_pickle=options.trust_pickle)
    plain = trainer.load_network(Path(options.ddim_ckpt), rt, trainer.DDIM, trust_pickle=options.trust_pickle,
                                 option="--ddim_ckpt")  # fmt: skip
    if plain.image_size != autoencoder.image_size:
        raise UserError(f"{options.ddim_ckpt} is for {plain.image_size} pixels, {options.ckpt} for "
                        f"{autoencoder.image_size}: give two of one size")  # fmt: skip
    return {"diffae": inverse.Prior(autoencoder.model, settings, rt),
            "unconditional": inverse.UnconditionalPrior(plain.model, settings, rt)}, autoencoder.image_size  # fmt: skip


def without_slice(study, number: int):
    """The study without acquired slice `number`, twice as many dense slices in its gap, and that slice's place there.

    The rest of the stack keeps its spacing only if every second slice goes: so of a stack 0..Z-1 the slices of the
    parity of number - 1 stay, and the dense grid has twice the factor.
    """
    from dataclasses import replace

    from mgdcr import geometry

    first = (number - 1) % 2
    kept = np.arange(first, study.sax.grid.shape[0], 2)
    affine = study.sax.grid.affine.copy()
    affine[:3, 3] += affine[:3, 2] * first
    affine[:3, 2] *= 2
    data = np.ascontiguousarray(study.sax.data[:, kept])
    valid = None if study.sax.valid is None else np.ascontiguousarray(study.sax.valid[:, kept])
    grid = geometry.Grid(affine, data.shape[1:])
    factor = 2 * study.factor
    sax = replace(study.sax, data=data, grid=grid, valid=valid)
    sparse = replace(study, sax=sax, dense=geometry.dense_grid(grid, factor), factor=factor)
    return sparse, (number - first) * study.factor


def leave_slices_out(
    study, frame: int, prior, goal, settings, roi_mm: float, image_size=None, priors=None
) -> list[dict]:
    """Scores of every inner acquired slice, predicted from every second one without it; UserError below 3 slices."""
    from mgdcr.study import frame_of

    depth = study.sax.grid.shape[0]
    if depth < 3:
        raise UserError(f"{study.name} has {depth} slices: leaving one out needs three or more")
    rows = []
    for parity in (0, 1):
        inner = [k for k in range(1, depth - 1) if k % 2 == parity]
        if not inner:
            continue
        sparse, _ = without_slice(study, inner[0])
        part = frame_of(sparse, frame, image_size)
        truth = frame_of(study, frame).sax
        mask = region(truth.shape, part.spacing_mm, roi_mm)
        for method, volume in methods(part, prior, goal, settings, priors or {}).items():
            for number in inner:
                place = without_slice(study, number)[1]
                if place >= len(volume):
                    continue
                scores = image_scores(volume[place][None], truth[number][None], mask, np.array([True]))
                rows.append({"subject": study.name, "frame": frame, "left_out": f"slice_{number}",
                             "method": method} | scores)  # fmt: skip
    return rows


def leave_views_out(study, frame: int, prior, goal, settings, image_size=None, priors=None) -> list[dict]:
    """Scores on the pixels of every view, reconstructed with the others; UserError where there is no view."""
    from dataclasses import replace

    import torch

    from mgdcr.study import frame_of

    whole = frame_of(study, frame, image_size)
    if not whole.views:
        raise UserError(f"{study.name} has no long-axis view to leave out")
    rows = []
    for view in whole.views:
        part = replace(whole, views=[other for other in whole.views if other is not view])
        between = (view.sampler.coordinates[:, 0] % study.factor).numpy()
        weights = view.weights.numpy() * (np.minimum(between, study.factor - between) >= 1)
        for method, volume in methods(part, prior, goal, settings, priors or {}).items():
            seen = view.sampler.sample(torch.from_numpy(np.ascontiguousarray(volume))).numpy()
            rows.append({"subject": study.name, "frame": frame, "left_out": view.name, "method": method}
                        | plane_scores(seen, view.values.numpy(), weights))  # fmt: skip
    return rows


# ---- against a dense truth ------------------------------------------------------------------------------------------


def against_truth(source, results: Path, options: Options, priors: dict, image_size=None) -> tuple[list[dict], dict]:
    """Scores of every frame that was reconstructed and has a truth, and of the baselines; indices by method."""
    import json

    from mgdcr import geometry, indices, study

    folder = Path(options.data) / source.name
    truth = geometry.load_cine(folder / "dense.nii.gz")
    labels = folder / "labels.nii.gz"
    maps = geometry.load_cine(labels).data.round().astype(np.uint8) if labels.is_file() else None
    loaded = study.load(source, factor=options.factor, align=options.align)
    places = sorted((results / source.name).glob("frame_*/volume.nii.gz"))
    if not places:
        raise UserError(f"no frame_*/volume.nii.gz in {results / source.name}: run ex8_multi_optimizer.py first")
    numbers = [int(p.parent.name.removeprefix("frame_")) for p in places]
    rows, found, cines = [], {}, {}
    spacing = truth.grid.spacing_mm[::-1]
    for number, path in zip(numbers, places, strict=True):
        if options.frame not in (-1, number):
            continue
        ours = geometry.load_cine(path)
        if ours.grid.shape != truth.grid.shape:
            raise UserError(f"{path} has {ours.grid.shape} voxels, the truth {truth.grid.shape}: use the same --factor")
        low, high = json.loads((path.parent / "report.json").read_text())["scale"].values()

        def scaled(stack, low=low, high=high):
            return (stack - low) / (high - low)

        frame = study.frame_of(loaded, number, image_size)
        candidates = {name: scaled(study.restore(loaded, volume))
                      for name, volume in without_optimisation(frame, priors).items()}  # fmt: skip
        candidates["ours"] = scaled(ours.data[0])
        mask = region(frame.sax.shape, spacing[1:], options.roi_mm)
        chosen = unobserved(len(ours.data[0]), options.factor)
        for method, volume in candidates.items():
            row = {"subject": source.name, "frame": number, "left_out": "between", "method": method}
            row |= image_scores(volume, scaled(truth.data[number]), mask, chosen) | {"roughness": roughness(volume)}
            if maps is not None:
                own = indices.grow_labels(volume, maps[number, :: options.factor], options.factor, spacing)
                row |= label_scores(own, maps[number], spacing)
                found.setdefault(method, []).append(own)
            cines.setdefault(method, []).append(volume)
            rows.append(row)
        if maps is not None:  # what outlines alone give, without an image between the slices
            own = indices.interpolate_labels(maps[number, :: options.factor], options.factor)
            found.setdefault("outlines", []).append(own)
            rows.append({"subject": source.name, "frame": number, "left_out": "between", "method": "outlines"}
                        | label_scores(own, maps[number], spacing))  # fmt: skip
    if maps is not None and cines:
        found["truth"] = [maps[number] for number in numbers if options.frame in (-1, number)]
    function = (
        {name: indices.function(np.stack(own), spacing) for name, own in found.items()} if len(numbers) > 1 else {}
    )
    steadiness = {name: jitter(np.stack(volumes)) for name, volumes in cines.items()}
    return rows, {"function": function, "jitter": steadiness}


# ---- output ---------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict], by_subject: dict[str, dict]) -> dict:
    """Means with intervals per method, paired Wilcoxon tests of ours against the best interpolation, indices."""
    from scipy.stats import wilcoxon

    from common import metrics
    from mgdcr.baselines import INTERPOLATIONS
    from mgdcr.indices import bland_altman

    names = [k for k, v in rows[0].items() if isinstance(v, float)]
    table = {}
    for row in rows:
        for name in names:
            if name in row:
                table.setdefault(row["method"], {}).setdefault(name, []).append(row[name])
    groups = {m: [row["subject"] for row in rows if row["method"] == m] for m in table}
    out = {"scores": {m: {n: metrics.summary(v, groups=groups[m]) for n, v in values.items()}
                      for m, values in table.items()}}  # fmt: skip
    kinds = [kind for kind in INTERPOLATIONS if kind in table]
    if "ours" in table and kinds:
        best = max(kinds, key=lambda kind: np.mean(table[kind]["psnr_db"]))
        gain = np.subtract(table["ours"]["psnr_db"], table[best]["psnr_db"])
        test = float(wilcoxon(gain).pvalue) if len(gain) > 4 and np.any(gain) else None
        out["ours_against"] = {"baseline": best, "gain_db": float(gain.mean()), "p_wilcoxon": test, "n": len(gain)}
    out["subjects"] = by_subject
    pairs = [
        entry["function"] for entry in by_subject.values() if {"ours", "truth"} <= entry.get("function", {}).keys()
    ]
    if pairs:
        out["agreement"] = {index: bland_altman([p["ours"][index] for p in pairs], [p["truth"][index] for p in pairs])
                            for index in ("edv_ml", "esv_ml", "sv_ml", "ef", "mass_g")}  # fmt: skip
    return out


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        evaluate(options, rt)


def evaluate(options: Options, rt) -> None:
    """Score all chosen subjects, shared out over the ranks, and write both files."""
    from types import SimpleNamespace

    from common import tables
    from common.runlog import write_json
    from mgdcr import inverse, objective, study

    out = Path(options.out)
    if (out / "scores.csv").exists() and not options.overwrite:
        raise UserError(f"{out} already holds scores; name another --out, or add --overwrite")
    where = SimpleNamespace(sax="", data=options.data, subject_id=options.subject_id, lax_names=(), no_lax=False)
    sources = study.find(where)
    changed = {"iterations": options.iterations} if options.iterations else {}
    prior, goal = None, objective.Objective()
    priors, size = load_priors(options, rt) if options.priors else ({}, None)
    settings = inverse.Settings(**inverse.MODES[options.mode] | changed)
    if options.leave_out == "none":
        sources = [s for s in sources if options.subject_id or (Path(options.results) / s.name).is_dir()]
        if not sources:
            raise UserError(f"no subject of {options.data} in {options.results}: run ex8_multi_optimizer.py first")
    else:
        from mgdcr.trainer import load_network

        trained = load_network(Path(options.ckpt), rt, trust_pickle=options.trust_pickle)
        prior, size = inverse.Prior(trained.model, settings, rt), trained.image_size
    rows, by_subject = [], {}
    for source in rt.shard(sources):
        if options.leave_out == "none":
            new, by_subject[source.name] = against_truth(source, Path(options.results), options, priors, size)
            rows += new
            continue
        loaded = study.load(source, factor=options.factor, align=options.align)
        for frame in range(loaded.sax.frames) if options.frame < 0 else [options.frame]:
            if options.leave_out == "slice":
                rows += leave_slices_out(loaded, frame, prior, goal, settings, options.roi_mm, size, priors)
            else:
                rows += leave_views_out(loaded, frame, prior, goal, settings, size, priors)
    parts = rt.gather((rows, by_subject))
    rows, by_subject = [row for part, _ in parts for row in part], {k: v for _, part in parts for k, v in part.items()}
    if rt.is_main:
        rows.sort(key=lambda row: (row["subject"], row["frame"], row["left_out"], row["method"]))
        tables.write_csv(out / "scores.csv", rows, digits=6)
        write_json(out / "summary.json", summarise(rows, by_subject))
        rt.print(f"{len(rows)} rows in {out / 'scores.csv'}, means in {out / 'summary.json'}")


if __name__ == "__main__":
    cli.run(main)
