"""--evaluate: synthetic against true PET, between autoencoder ceiling and mean-image baseline; and amyloid status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from common import figures, metrics, nifti, runtime, tables
from common.cli import UserError
from common.runlog import progress, write_json
from il_cldm import aae, amyloid, dataset
from il_cldm.config import Config

COLUMNS = ("psnr", "ssim", "ssim_uniform", "mae", "nmse", "psnr_mask", "ssim_mask", "mae_mask", "nmse_mask")
METHODS = ("synthetic", "autoencoder", "mean_image")


def compare(pred: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """All image metrics of one subject, data range 1; the whole volume, and inside `mask`."""
    return {
        "psnr": metrics.psnr(pred, truth, data_range=1.0),
        "ssim": metrics.ssim(pred, truth, data_range=1.0),
        # The original's definition, so that its readers can compare: uniform 7x7x7 window, reflected border.
        "ssim_uniform": metrics.ssim(pred, truth, data_range=1.0, window="uniform", border="reflect"),
        "mae": metrics.mae(pred, truth),
        "nmse": metrics.nmse(pred, truth),
        "psnr_mask": metrics.psnr(pred, truth, data_range=1.0, mask=mask),
        "ssim_mask": metrics.ssim(pred, truth, data_range=1.0, mask=mask),
        "mae_mask": metrics.mae(pred, truth, mask=mask),
        "nmse_mask": metrics.nmse(pred, truth, mask=mask),
    }


def evaluate(config: Config, rt: runtime.Runtime) -> dict:
    """Write evaluation.csv (a row per subject and method), evaluation.json (summaries, detection) and figures.

    They go beside the synthetic PET. Every listed subject counts; none is dropped.
    """
    # ---- data
    folder = Path(config.out or config.syn_Abeta)
    lists = dataset.check_splits(config)
    names, train = lists[config.split], lists["train"]
    record = generation_record(folder, names)
    mri, pet = dataset.open_volumes(config)
    dataset.check_volumes(pet, list(dict.fromkeys(train + names)), rt, "true PET")
    autoencoder, aae_hash = aae.load_autoencoder(config, rt)
    with_regions = Path(config.regions).is_dir()
    regions = amyloid.region_settings(config) if with_regions else None

    # ---- subjects
    mean_pet = mean_image(pet, train)
    rows, suvrs = [], []
    mine = rt.shard(names)
    with progress(len(mine), 0, "evaluate", enabled=rt.is_main) as bar:
        for name in mine:
            truth, volumes = pet.load(name), load_methods(name, folder, pet, autoencoder, mean_pet, rt)
            mask, labels = subject_mask(config, name, mri, truth.shape)
            for method, volume in volumes.items():
                rows.append({"subject": dataset.stem(name), "method": method, **compare(volume, truth, mask)})
            if regions:
                values = {m: amyloid.suvr(v, labels, *regions[:2]) for m, v in (volumes | {"true": truth}).items()}
                suvrs.append({"subject": dataset.stem(name), **values})
            bar.update()
    rows = [row for part in rt.gather(rows) for row in part]
    suvrs = [row for part in rt.gather(suvrs) for row in part]
    if not rt.is_main:
        return {}

    # ---- report
    rows.sort(key=lambda r: (r["subject"], METHODS.index(r["method"])))
    suvrs.sort(key=lambda r: r["subject"])
    tables.write_csv(folder / "evaluation.csv", rows)
    summaries = {m: {c: summary([r[c] for r in rows if r["method"] == m], config) for c in COLUMNS} for m in METHODS}
    report = {
        "n": len(names),
        "split": config.split,
        "data_range": 1.0,
        "generation": {k: v for k, v in record.items() if k != "labels"},
        "aae": aae_hash,
        "ssim": "3D gaussian sigma 1.5, 11 wide, valid border",
        "ssim_uniform": "uniform 7x7x7, reflected border (the original's)",
        "mask": "region map > 0" if with_regions else f"MRI > {config.mask_threshold}",
        "metrics": summaries,
        "synthetic_minus_mean_image": {c: summary(paired(rows, c, "synthetic", "mean_image"), config) for c in COLUMNS},
    }
    if regions:
        tables.write_csv(folder / "suvr.csv", suvrs)
        report["amyloid"] = detection(config, rt, regions, record, train, names, mri, pet, folder, suvrs)
    else:
        options = "--target_labels, --reference_labels, --suvr_threshold"
        report["amyloid"] = {"skipped": f"needs region maps in {config.regions} and {options}"}
    write_json(folder / "evaluation.json", report)
    draw(folder, names[0], pet, load_methods(names[0], folder, pet, autoencoder, mean_pet, rt), suvrs)
    print_report(report, folder)
    return report


def generation_record(folder: Path, names: list[str]) -> dict:
    """generation.json of a folder; UserError unless --gen has written every one of these subjects there."""
    path = folder / "generation.json"
    if not path.is_file():
        raise UserError(f"no synthetic PET in {folder}; make it with `python il_cldm/main.py --gen`")
    record = json.loads(path.read_text())
    written = {dataset.stem(name) for name in record["labels"] if (folder / name).is_file()}
    for name in map(dataset.stem, names):
        if name not in written:
            raise UserError(f"{name}: no synthetic PET in {folder}; make it with `python il_cldm/main.py --gen`")
    return record


def summary(values: list[float], config: Config) -> dict:
    return metrics.summary(values, seed=config.seed)


def mean_image(pet: dataset.Volumes, train: list[str]) -> np.ndarray:
    """Mean training PET, streamed: what a model that ignores the MRI can reach."""
    total = np.zeros_like(pet.load(train[0]), dtype=np.float64)
    for name in train:
        total += pet.load(name)
    return (total / len(train)).astype(np.float32)


def load_methods(name: str, folder: Path, pet: dataset.Volumes, autoencoder, mean_pet: np.ndarray, rt) -> dict:
    """Synthetic PET, reconstruction of the true one (ceiling), mean image, (D, H, W); UserError if grids differ."""
    path = pet.path(name)
    synthetic = nifti.load(dataset.find_volume(folder, name))
    shape, affine = nifti.header(path)
    if synthetic.shape != shape or not np.allclose(synthetic.affine, affine, atol=0.1):
        raise UserError(f"{dataset.stem(name)}: synthetic PET ({synthetic.shape}) and {path} ({shape}) lie on "
                        "different grids; generate from the prepared MRI")  # fmt: skip
    recon = aae.reconstruct(autoencoder, pet.tensor(name)[None], rt)[0, 0].numpy()
    return dict(zip(METHODS, (synthetic.data, recon, mean_pet), strict=True))


def subject_mask(config: Config, name: str, mri: dataset.Volumes, shape) -> tuple[np.ndarray, np.ndarray | None]:
    """Brain mask and, where there are region maps, the labels."""
    if Path(config.regions).is_dir():
        labels = amyloid.load_regions(config, name, shape)
        return labels > 0, labels
    return mri.load(name) > config.mask_threshold, None


def paired(rows: list[dict], column: str, first: str, second: str) -> list[float]:
    by = {(r["subject"], r["method"]): r[column] for r in rows}
    return [by[s, first] - by[s, second] for s, m in by if m == first]


def detection(config: Config, rt, regions, record, train, names, mri, pet, folder, suvrs) -> dict:
    """Amyloid status of the true PET against scores from synthetic PET, with an MRI-only baseline and chance."""
    target, reference, threshold = regions
    names = sorted(names, key=dataset.stem)  # the order of `suvrs`

    def true_status(name: str) -> bool:
        volume = pet.load(name)
        return amyloid.suvr(volume, amyloid.load_regions(config, name, volume.shape), target, reference) >= threshold

    status = np.array([row["true"] >= threshold for row in suvrs]).astype(int)
    train_status = np.array([true_status(name) for name in train]).astype(int)
    true, synthetic = np.array([r["true"] for r in suvrs]), np.array([r["synthetic"] for r in suvrs])
    result = {
        "target_labels": list(target),
        "reference_labels": list(reference),
        "suvr_threshold": threshold,
        "n": len(names),
        "n_positive": int(status.sum()),
        "status": "true PET's composite SUVR at or above the threshold",
        "suvr_mae": float(np.abs(true - synthetic).mean()),
        "suvr_bias": float((synthetic - true).mean()),
        "suvr_correlation": float(np.corrcoef(true, synthetic)[0, 1]) if min(true.std(), synthetic.std()) > 0 else 0.0,
    }
    volumes = [nifti.load(dataset.find_volume(folder, n)).data for n in names]
    scores, cutoffs = {"SUVR of synthetic PET": synthetic}, {"SUVR of synthetic PET": threshold}
    if 0 < train_status.sum() < len(train_status) and config.classifier_steps:
        found = amyloid.baseline_scores(config, rt, train, train_status, mri, pet, names, volumes)
        scores, cutoffs = scores | found, cutoffs | dict.fromkeys(found, 0.5)
    if record["true_label_used"]:
        # The diagnosis went in, so finding it in the output would be circular: only scores that never saw it remain.
        result["flag"] = f"synthetic PET was made with --label {record['label']}: excluded from detection"
        scores = {k: v for k, v in scores.items() if "synthetic" not in k}
    result["detection"] = amyloid.detection_report(status, scores, cutoffs, config)
    return result


def draw(folder: Path, name: str, pet: dataset.Volumes, volumes: dict[str, np.ndarray], suvrs: list[dict]) -> None:
    """Montage of one subject; scatter of SUVR where there are regions."""
    stem, spacing_mm = dataset.stem(name), nifti.load(pet.path(name)).spacing_mm
    pictures = [("true PET", pet.load(name)), *volumes.items()]
    options = dict(window=(0, 1), difference_to="true PET", spacing_mm=spacing_mm, title=stem)
    figures.montage(folder / "figures" / f"{stem}.png", pictures, **options)
    if suvrs:
        points = {m: ([r["true"] for r in suvrs], [r[m] for r in suvrs]) for m in METHODS}
        options = dict(xlabel="true composite SUVR", ylabel="SUVR of the method", diagonal=True, points=True)
        figures.curves(folder / "figures" / "suvr.png", points, **options)


def print_report(report: dict, folder: Path) -> None:
    """The table a reader wants first."""
    columns = ("psnr", "ssim", "mae_mask", "psnr_mask")
    print(f"\n{report['n']} subjects of the {report['split']} list; mask: {report['mask']}; data range 1")
    print(f"{'':14s}" + "".join(f"{c:>16s}" for c in columns))
    for method, table in report["metrics"].items():
        sd = {c: f" ±{table[c]['sd']:6.3f}" if report["n"] > 1 else "" for c in columns}
        print(f"{method:14s}" + "".join(f"{table[c]['mean']:>9.4f}{sd[c]}" for c in columns))
    found = report["amyloid"]
    if "skipped" in found:
        print(f"amyloid status: skipped, {found['skipped']}")
    else:
        positive = f"{found['n_positive']} of {found['n']} positive at {found['suvr_threshold']:.3f}"
        print(f"composite SUVR: r {found['suvr_correlation']:.3f}, bias {found['suvr_bias']:+.3f}; {positive}")
        if "flag" in found:
            print(f"note: {found['flag']}")
        for name, row in found["detection"].items():
            auc = "AUC {:.3f} [{:.3f}, {:.3f}]".format(row["auc"], *row["ci"])
            print(f"  {name:28s} {auc}  balanced accuracy {row['balanced_accuracy']:.3f}")
    print(f"full report: {folder / 'evaluation.json'}")
