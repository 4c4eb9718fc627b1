"""What lapt/evaluate.py does: synthetic against real DWI and ADC, case by case, then over patients.

Methods are "synthetic", "baseline" (another model's samples) and "autoencoder" (reconstruction of the real images);
segmentation also measures "real" images, which is what the segmenter can reach. Volumes are (X, Y, Z) in RAS+ order.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import figures, metrics, nifti, runtime, tables, training
from common.cli import UserError
from common.runlog import git_revision, progress, write_json
from lapt import dataset, inference, lesions, quality
from lapt import report as page
from lapt.dataset import MODALITIES, Case
from lapt.diffusion import fold, load_model
from lapt.segmentation import load_guide

REPORT, PAGE = "evaluation.json", "report.html"
HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim", "lesion_psnr", "lesion_ssim", "lesion_ms_ssim", "dice")
# Columns of the tables, and those that are described but not judged.
IMAGE = ("mae", "psnr", "ssim", "ms_ssim", "nmse", "flicker")
LESION = ("lesion_mae", "lesion_psnr", "lesion_ssim", "lesion_ms_ssim", "lesion_nmse", "lesion_bias",
          "lesion_contrast", "lesion_contrast_real", "lesion_contrast_error")  # fmt: skip
SEGMENTATION = ("dice", "hd95_mm", "volume_error_ml", "volume_abs_error_ml", "false_positive_ml")
NOT_JUDGED = ("lesion_bias", "lesion_contrast", "lesion_contrast_real", "volume_error_ml")  # signed: near 0 is good
MIN_SLICE_SHARE = 0.1  # of the largest slice: thinner ones say little about realism
Images = dict[str, np.ndarray]  # "dwi" and "adc", (X, Y, Z)


def evaluate(options, rt: runtime.Runtime) -> dict:
    """Measure all cases of a split and write OUTDIR; returns the report, on every rank. See lapt/evaluate.py."""
    # ---- setup: everything the user can get wrong, before any measurement
    out = Path(options.outdir)
    if (out / REPORT).exists() and not options.overwrite:
        raise UserError(f"{out} holds results already; name another --outdir or add --overwrite")
    rt.barrier()  # every rank has looked before rank 0 writes
    cases = dataset.read_cases(options.dataroot, options.split)
    folders = {name: Path(getattr(options, name)) for name in ("synthetic", "baseline") if getattr(options, name)}
    records = {name: sample_record(folder, cases) for name, folder in folders.items()}
    model, guide = load_networks(options, rt)
    window = dataset.Intensity.of_folder(options.dataroot)
    features = None
    if options.features != "none":
        features = quality.load_features(options.features, options.feature_weights, rt, model)

    # ---- cases: each rank takes its share
    measure = partial(measure_case, folders=folders, model=model, guide=guide, window=window, options=options)
    tables = ([], [], [])  # images, segmentations, lesions
    mine = rt.shard(cases)
    with progress(len(mine), 0, "evaluate", enabled=rt.is_main) as bar:
        for case in mine:
            for table, rows in zip(tables, measure(case), strict=True):
                table.extend(rows)
            bar.update()
    order = {case.name: i for i, case in enumerate(cases)}
    images, segments, found = (
        sorted((row for part in rt.gather(table) for row in part), key=lambda row: order[row["case"]])
        for table in tables
    )

    # ---- report
    judged = [*IMAGE, *LESION]
    report = {
        "n_cases": len(cases),
        "n_patients": len({case.patient for case in cases}),
        "n_with_lesion": len({row["case"] for row in found}),
        "split": options.split,
        "split_hash": window.split_hash,
        "note": trained_elsewhere(records, model, guide, options),
        "units": inference.UNITS,
        "definitions": definitions(options, cases, window),
        "samples": records,
        "images": summaries(images, ("method", "modality"), judged, options.seed),
        "segmentation": summaries(segments, ("method", "rule"), SEGMENTATION, options.seed),
        "lesion_sizes": size_tables(found, options.size_edges_ml),
        "options": without_folders(options),
        "git_revision": git_revision(),
    }
    if options.baseline:
        report["synthetic_minus_baseline"] = {
            "images": comparisons(images, "modality", judged, options.seed),
            "segmentation": comparisons(segments, "rule", SEGMENTATION, options.seed),
        }
    if features is not None:
        report["realism"] = realism(cases, folders, features, model, window, options, rt)
    report = plain(report)
    if rt.is_main:
        write_tables(out, images, segments, found)
        drawn = draw(out / "figures", cases, folders, images, segments, found, options)
        page.write(out / PAGE, report, drawn)
        write_json(out / REPORT, report)
        print(summary_text(report))
        if report["note"]:
            print(f"note: {report['note']}")
        print(f"full report: {out / REPORT}, to read: {out / PAGE}")
    rt.barrier()
    return report


def load_networks(options, rt: runtime.Runtime) -> tuple:
    """(model or None, guide or None) of --model and --guide."""
    model = guide = None
    if options.model:
        model = load_model(options.model, rt, options.trust_pickle, option="--model")
    if options.guide:
        guide = load_guide(options.guide, rt, trust_pickle=options.trust_pickle, option="--guide")
    return model, guide


def trained_elsewhere(records: dict[str, dict], model, guide, options) -> str:
    """dataset.split_note of all networks behind the numbers."""
    splits = {name: record.get("normalisation", {}).get("split_hash", "") for name, record in records.items()}
    splits |= {name: n.intensity.split_hash for name, n in (("model", model), ("guide", guide)) if n is not None}
    return dataset.split_note(splits, options.dataroot)


def without_folders(options) -> dict:
    """Options as plain values, absolute paths without the folders above: they name people and machines."""
    values = json.loads(json.dumps(vars(options), default=str))
    return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in values.items()}


# ---- images ---------------------------------------------------------------------------------------------------------


def sample_record(folder: Path, cases: list[Case]) -> dict:
    """Settings of a folder of samples; UserError unless it holds finished samples of every case."""
    path = folder / inference.RECORD
    if not path.is_file():
        raise UserError(f"no samples in {folder} (no {path.name}); make them with `python lapt/sample.py -r RUN`")
    record = training.read_record(path, ("settings", "cases"), "sample again with --overwrite")
    for case in cases:
        sidecar = folder / case.name / inference.SIDECAR
        if not sidecar.is_file():
            raise UserError(f"{case.name}: no finished samples in {folder}; run lapt/sample.py with the same split")
    return record["settings"]


def load_samples(folder: Path, case: Case, image: str = "mean") -> Images:
    """DWI and ADC of a case's samples: their mean, or the first; UserError if they are not on the prepared grid."""
    images = {}
    for name in MODALITIES:
        path = folder / case.name / f"{name}_mean.nii.gz"
        if image == "first" or not path.is_file():
            path = folder / case.name / f"{name}_sample_0.nii.gz"
        volume = nifti.load(path)
        if volume.shape != tuple(case.shape) or not np.allclose(volume.affine, case.affine, atol=1e-2):
            raise UserError(f"{case.name}: {path} ({volume.shape}) and the prepared images ({tuple(case.shape)}) lie "
                            "on different grids; sample the prepared data with --dataroot and --split")  # fmt: skip
        images[name] = volume.data
    return images


def load_real(case: Case) -> tuple[Images, np.ndarray, np.ndarray]:
    """(DWI and ADC, 0 outside the mask; mask; lesion inside the mask) of a prepared case; UserError without MRI."""
    if not case.has_mri:
        raise UserError(f"{case.name} has no DWI and ADC to compare with; choose another --split")
    mask = case.volume("mask") > 0
    return {name: case.volume(name) * mask for name in MODALITIES}, mask, (case.volume("lesion") > 0) & mask


@torch.inference_mode()
def reconstruct(model, real: Images, mask: np.ndarray, stats: dict) -> Images:
    """The autoencoder's reconstruction of DWI and ADC in physical units, 0 outside the mask."""
    own = stats if model.intensity.statistics == "case" else None
    mri = torch.from_numpy(model.intensity.normalise(real["dwi"], real["adc"], mask, stats))
    slices = fold(mri[None])
    padded = dataset.pad_to_multiple(slices, model.multiple, model.intensity.background)
    decoded = [model.decode(model.encode(part.to(model.rt.device))).cpu() for part in padded.split(inference.CPU_BATCH)]
    images = dataset.unpad(torch.cat(decoded), slices.shape[2:]).permute(1, 2, 3, 0).numpy()
    return {k: v * mask for k, v in zip(MODALITIES, model.intensity.denormalise(images, own), strict=True)}


def measure_case(case: Case, *, folders, model, guide, window, options) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of one case: (method, modality), (method, segmenter), and (method, connected lesion)."""
    real, mask, lesion = load_real(case)
    methods = {name: load_samples(folder, case, options.image) for name, folder in folders.items()}
    methods = {name: {m: image * mask for m, image in images.items()} for name, images in methods.items()}
    if model is not None:
        methods["autoencoder"] = reconstruct(model, real, mask, case.stats)
    head = {"case": case.name, "patient": case.patient}
    images, segments, found = [], [], []
    for method, predicted in methods.items():
        for name in MODALITIES:
            width = data_range(case, name, window, options)
            values = compare(predicted[name], real[name], mask, lesion, case.affine, width)
            images.append(head | {"method": method, "modality": name} | values)
    for method, shown in (methods | {"real": real}).items():
        masks = {"adc_threshold": lesions.core_mask(shown["adc"], mask, options.lesion_threshold)}
        if guide is not None:
            masks["guide"] = inference.guide_probability(guide, shown["dwi"], shown["adc"], mask) > guide.threshold
        for rule, predicted in masks.items():
            segments.append(head | {"method": method, "rule": rule} | lesions.overlap(predicted, lesion, case.affine))
        pairs = {name: (shown[name], real[name]) for name in MODALITIES}
        rows = lesions.component_rows(pairs, lesion, mask, case.affine, masks["adc_threshold"], options.size_edges_ml)
        found += [head | {"method": method} | row for row in rows]
    return images, segments, found


def data_range(case: Case, modality: str, window: dataset.Intensity, options) -> float:
    """Declared intensity range of a modality in physical units."""
    if options.data_range == "training":
        return window.range(modality)
    return case.stats[modality]["high"] - case.stats[modality]["low"]


def compare(
    predicted: np.ndarray, real: np.ndarray, mask: np.ndarray, lesion: np.ndarray, affine: np.ndarray, data_range: float
) -> dict[str, float | None]:
    """All measures of one image (X, Y, Z), both 0 outside the mask; lesion_* are None where there is no lesion."""
    per_slice = quality.ms_ssim_slices(predicted, real, data_range=data_range)
    with_brain, with_lesion = mask.any((0, 1)), lesion.any((0, 1))
    row = {
        "mae": metrics.mae(predicted, real, mask=mask),
        "psnr": metrics.psnr(predicted, real, data_range=data_range, mask=mask),
        "ssim": masked_ssim(predicted, real, mask, data_range),
        "ms_ssim": float(per_slice[with_brain].mean()),
        "nmse": metrics.nmse(predicted, real, mask=mask),
        "flicker": quality.flicker(predicted, real, mask),
    }
    row |= dict.fromkeys(LESION)
    if lesion.any():
        row |= {
            "lesion_psnr": metrics.psnr(predicted, real, data_range=data_range, mask=lesion),
            "lesion_ssim": masked_ssim(predicted, real, lesion, data_range),
            "lesion_ms_ssim": float(per_slice[with_lesion].mean()),
            "lesion_nmse": metrics.nmse(predicted, real, mask=lesion),
        }
    return row | lesions.lesion_errors(predicted, real, lesion, mask, lesions.spacing_mm(affine))


def ssim_window(shape) -> int:
    """Width of the SSIM window: 11, or the largest odd number that fits a volume of few slices."""
    smallest = min(shape)
    return min(11, smallest - 1 + smallest % 2)


def masked_ssim(predicted: np.ndarray, real: np.ndarray, mask: np.ndarray, data_range: float) -> float | None:
    """3D SSIM over a mask; None where no voxel of it has a whole window around it."""
    size = ssim_window(real.shape)
    inner = (slice(size // 2, n - size // 2) for n in real.shape)
    if not mask[tuple(inner)].any():
        return None
    return metrics.ssim(predicted, real, data_range=data_range, mask=mask, window_size=size)


def definitions(options, cases: list[Case], window: dataset.Intensity) -> dict:
    """What the numbers mean, beside them in the report."""
    shape = cases[0].shape
    scales = quality.ms_ssim_scales(shape[:2])
    ranges = {m: window.range(m) for m in MODALITIES} if options.data_range == "training" else "of each case"
    return {
        "mask": "brain mask, both images 0 outside",
        "data_range": {"of": options.data_range, "q0.995 - q0.005": ranges},
        "image": f"{options.image} of a case's samples",
        "ssim": f"3D, Gaussian sigma 1.5, window {ssim_window(shape)}, valid borders, mean over the mask",
        "ms_ssim": f"2D per axial slice, {scales} scale(s), mean over slices with brain (lesion_: with lesion)",
        "flicker": "mean absolute difference of the errors of neighbouring slices",
        "lesion_contrast": f"mean in the lesion over mean of brain more than {lesions.RIM_MM:g} mm away from it",
        "adc_threshold": f"ADC < {options.lesion_threshold:g}e-6 mm^2/s inside the mask",
        "intervals": "95 % bootstrap of the mean over patients",
        "paired_test": "Wilcoxon signed-rank over patients' means, two-sided",
    }


# ---- over patients --------------------------------------------------------------------------------------------------


def summaries(rows: list[dict], keys: tuple[str, str], columns, seed: int) -> dict:
    """{first key: {second key: {column: summary}}}; a column without any value is None."""
    result: dict = {}
    for first in dict.fromkeys(row[keys[0]] for row in rows):
        result[first] = {}
        for second in dict.fromkeys(row[keys[1]] for row in rows):
            part = [row for row in rows if row[keys[0]] == first and row[keys[1]] == second]
            result[first][second] = {column: summary(part, column, seed) for column in columns}
    return result


def summary(rows: list[dict], column: str, seed: int) -> dict | None:
    """metrics.summary of a column's values with intervals over patients; None where there is no value."""
    rows = [row for row in rows if row[column] is not None]
    if not rows:
        return None
    return metrics.summary([row[column] for row in rows], seed=seed, groups=[row["patient"] for row in rows])


def comparisons(rows: list[dict], key: str, columns, seed: int) -> dict:
    """{modality or rule: {column: paired test of synthetic against baseline}}."""
    result = {}
    for name in dict.fromkeys(row[key] for row in rows):
        part = [row for row in rows if row[key] == name]
        result[name] = {column: paired_test(part, column, seed) for column in columns}
    return result


def paired_test(rows: list[dict], column: str, seed: int) -> dict | None:
    """Synthetic minus baseline, patient by patient: mean with interval, Wilcoxon p, share of patients that improved.

    None where no case has a value from both. p is 1 where nothing differs, None for a single patient.
    """
    from scipy.stats import wilcoxon

    values = {(row["case"], row["method"]): row[column] for row in rows}
    patients: dict[str, list[float]] = {}
    for row in rows:
        pair = [values.get((row["case"], method)) for method in ("synthetic", "baseline")]
        if row["method"] == "synthetic" and None not in pair:
            patients.setdefault(row["patient"], []).append(pair[0] - pair[1])
    if not patients:
        return None
    differences = np.array([np.mean(v) for v in patients.values()])
    p = None
    if len(differences) > 1:
        p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
    result = {"n_patients": len(differences), "mean_difference": float(differences.mean()),
              "ci95": metrics.bootstrap_interval(differences, seed=seed), "wilcoxon_p": p}  # fmt: skip
    if column not in NOT_JUDGED:
        better = differences > 0 if column in HIGHER_IS_BETTER else differences < 0
        result["share_improved"] = float(better.mean())
    return result


def size_tables(rows: list[dict], edges: tuple[float, ...]) -> dict:
    """{method: table of lesion sizes}."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {m: lesions.size_table([row for row in rows if row["method"] == m], edges) for m in methods}


# ---- realism of slices ----------------------------------------------------------------------------------------------


def realism(cases: list[Case], folders: dict[str, Path], features, model, window, options, rt) -> dict:
    """FID and KID of each method's slices (first samples) against the real ones, and of real training slices."""
    own = options.features == "autoencoder"
    scale = model.intensity if own else window

    def of_cases(chosen: list[Case], folder: Path | None) -> tuple[np.ndarray, list[str]]:
        found = {}
        for case in rt.shard(chosen):
            images, mask, _ = load_real(case)
            if folder is not None:
                images = load_samples(folder, case, "first")
            found[case.name] = features(slices_of(images, mask, scale, case.stats), rt)
        found = {name: part for parts in rt.gather(found) for name, part in parts.items()}
        patients = [case.patient for case in chosen for _ in found[case.name]]
        return np.concatenate([found[case.name] for case in chosen]), patients

    real, patients = of_cases(cases, None)
    sets = {name: of_cases(cases, folder) for name, folder in folders.items()}
    if others := real_cases(options, len(cases)):
        sets["real_training"] = of_cases(others, None)
    result = {"features": features.record | {"width": real.shape[1]}, "slices": "axial, DWI and ADC together"}
    draws = {"seed": options.seed, "resamples": options.fid_resamples}
    for name, (found, ids) in sets.items():
        result[name] = quality.compare_sets(real, found, (patients, ids), **draws)
    n, width = len(real), real.shape[1]
    if n <= width:
        result["warning"] = (f"{n} slices are not more than the {width} features: FID is biased upward; compare it "
                             "with that of real training slices only, and prefer KID")  # fmt: skip
    return result


def real_cases(options, n: int) -> list[Case]:
    """Up to n training cases with MRI, other patients than those measured; none where training is what is measured."""
    if options.split == "train":
        return []
    try:
        return [case for case in dataset.read_cases(options.dataroot, "train") if case.has_mri][:n]
    except UserError:
        return []  # a folder of test cases only


def slices_of(images: Images, mask: np.ndarray, scale: dataset.Intensity, stats: dict) -> np.ndarray:
    """Axial slices (n, 2, X, Y) with enough brain, normalised as `scale` says."""
    mri = scale.normalise(images["dwi"], images["adc"], mask, stats)
    area = mask.sum((0, 1))
    return np.moveaxis(mri[..., area >= MIN_SLICE_SHARE * area.max()], -1, 0)


# ---- files ----------------------------------------------------------------------------------------------------------


def plain(value):
    """JSON knows no NaN: it becomes None; NumPy numbers become Python's."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write_tables(out: Path, images: list[dict], segments: list[dict], found: list[dict]) -> None:
    for name, rows in {"evaluation": images, "segmentation": segments, "lesions": found}.items():
        (out / f"{name}.csv").unlink(missing_ok=True)  # of an earlier evaluation: a split without lesions writes none
        if rows:
            tables.write_csv(out / f"{name}.csv", rows)


def draw(out: Path, cases: list[Case], folders: dict[str, Path], images, segments, found, options) -> list[Path]:
    """Montages of the cases with the largest lesions, lesion error by size, core volume found against true."""
    drawn = []
    shown = sorted(cases, key=lambda case: -(case.lesion_ml or 0))[: options.figures]
    for case in shown:
        real, mask, lesion = load_real(case)
        where = lesion if lesion.any() else mask
        voxel = [int(v) for v in np.round(np.mean(np.nonzero(where), axis=1))]
        voxel[2] = int(where.sum((0, 1)).argmax())
        for name in MODALITIES:
            pictures = {"real": real[name]}
            pictures |= {m: load_samples(folder, case, options.image)[name] * mask for m, folder in folders.items()}
            path = out / f"{case.name}_{name}.png"
            drawn.append(figures.montage(path, pictures, difference_to="real", planes=("axial",), voxel=voxel,
                                         spacing_mm=case.spacing_mm, title=f"{case.name}, {name.upper()}",
                                         unit="1e-6 mm²/s" if name == "adc" else "a.u."))  # fmt: skip
    methods = list(dict.fromkeys(row["method"] for row in images))
    if found:
        points = {m: ([row["ml"] for row in found if row["method"] == m],
                      [row["adc_mae"] for row in found if row["method"] == m]) for m in methods}  # fmt: skip
        drawn.append(figures.curves(out / "lesion_error_by_size.png", points, xlabel="lesion volume (ml)", points=True,
                                    ylabel="ADC error inside (1e-6 mm²/s)"))  # fmt: skip
    rule = "guide" if options.guide else "adc_threshold"
    rows = [row for row in segments if row["rule"] == rule]
    points = {m: ([row["true_volume_ml"] for row in rows if row["method"] == m],
                  [row["volume_ml"] for row in rows if row["method"] == m]) for m in (*methods, "real")}  # fmt: skip
    drawn.append(figures.curves(out / "core_volume.png", points, xlabel="true lesion volume (ml)", points=True,
                                ylabel=f"found by {rule} (ml)", diagonal=True))  # fmt: skip
    return drawn


def summary_text(report: dict) -> str:
    """The tables a reader wants first."""
    lines = [f"\n{report['n_cases']} cases of {report['n_patients']} patients ({report['split']}), "
             f"{report['n_with_lesion']} with lesion; means over cases"]  # fmt: skip
    columns = ("mae", "psnr", "ssim", "ms_ssim", "lesion_mae", "lesion_bias", "flicker")
    lines.append(f"{'':22s}" + "".join(f"{c:>13s}" for c in columns))
    for method, by_modality in report["images"].items():
        for modality, table in by_modality.items():
            lines.append(f"{method + ', ' + modality:22s}" + "".join(f"{_mean(table[c]):>13s}" for c in columns))
    columns = ("dice", "hd95_mm", "volume_error_ml", "false_positive_ml")
    lines.append(f"{'segmentation':32s}" + "".join(f"{c:>18s}" for c in columns))
    for method, by_rule in report["segmentation"].items():
        for rule, table in by_rule.items():
            lines.append(f"{method + ', ' + rule:32s}" + "".join(f"{_mean(table[c]):>18s}" for c in columns))
    for name, table in report.get("synthetic_minus_baseline", {}).get("images", {}).items():
        for column in ("mae", "lesion_mae"):
            if found := table[column]:
                low, high = (_number(v) for v in found["ci95"])
                lines.append(f"synthetic - baseline, {name} {column}: {_number(found['mean_difference'])} "
                             f"[{low}, {high}], p {_number(found['wilcoxon_p'])}, n {found['n_patients']}")  # fmt: skip
    for name, found in report.get("realism", {}).items():
        if isinstance(found, dict) and "fid" in found:
            lines.append(f"{name} slices against real: FID {found['fid']:.4f}, KID x 1000 {1000 * found['kid']:.3f} "
                         f"({report['realism']['features']['network']}, n {found['n_real']})")  # fmt: skip
    return "\n".join(lines)


def _mean(found: dict | None) -> str:
    return _number(None if found is None else found["mean"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
