"""Synthetic cohort with known truth in the paper's layout: grey-matter maps, tables, region maps, hippocampal volumes.

    python neuroldm3d/make_phantom.py                                    # the paper's grid, 240 subjects: minutes
    python neuroldm3d/make_phantom.py --shape 33 41 33 --out STUDY       # for training on a CPU: half a minute
    python neuroldm3d/make_phantom.py --n_train 400 --n_test 100 --out STUDY

A map stands for CAT12's mwp1: the grey matter of a subject warped to MNI space and modulated, so a voxel holds the
subject's own volume of grey matter per volume of the template. The template is that of common/phantom.py; the warp has
removed the head's size and position. What remains: misregistration (1.5 mm rms), sulci of its own, smooth differences
of local volume (10 % rms), age (0.3 % a year), sex, and one of six made-up sites, which differ in scale (2 %), noise
and share of patients (40 to 75 %).

HC: hippocampal factors 1 +- 0.08 on both sides. TLE: 0.66 +- 0.10 on the side of the group, 0.96 +- 0.08 on the other;
one patient in five is MRI-negative, 0.92 +- 0.08. The loss fades out over 5 mm about the hippocampus. By the true
factors the AUC is 0.94, by the region maps 0.84; a small 3D CNN trained on 100 subjects of 33 x 41 x 33 voxels reaches
0.82 to 0.85, the site alone 0.57.

truth.csv: hippocampus_<side>_mm3 is the grey matter inside the region as simulated, measured_<side>_mm3 what the map
and the region map (data/regions) give voxel by voxel.

Subjects are seeded one by one and numbered per split: another --n_train leaves every other subject and split as it was.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
SPACING_MM, SHAPE, CENTRE_MM = 1.5, (113, 137, 113), np.array([0.0, -18.0, 12.0])  # CAT12's mwp1 grid
SHARES = {"HC": 1356 / 3204, "left": 1071 / 3204, "right": 777 / 3204}  # of the paper's cohort
SITES = {  # scale of all values; noise; odds of a patient against a control
    "SITE_A": (1.00, 0.03, 0.40),
    "SITE_B": (0.98, 0.04, 0.50),
    "SITE_C": (1.02, 0.03, 0.55),
    "SITE_D": (1.03, 0.05, 0.60),
    "SITE_E": (0.97, 0.04, 0.65),
    "SITE_F": (1.01, 0.03, 0.75),
}
FIRST_ID = {"train": 1, "val": 4001, "test": 7001}
GREY, REGIONS, TABLES = "data/gm", "data/regions", "data_csvs"
SIDES = ("left", "right")
MISREGISTRATION_MM, SULCI, LOCAL_VOLUME, REACH_MM = 1.5, 0.5, 0.10, 5.0
HEAD = 0.68  # grey matter of a subject per grey matter of the larger MNI head
LATTICE, LATTICE_MM = (30, 36, 30), 6.0  # of the smooth fields, in mm as the template
LATTICE_ORIGIN = CENTRE_MM - LATTICE_MM * (np.array(LATTICE) - 1) / 2
GRAIN_MM = 4.0
WORK_MM = 2.6  # tissues are evaluated on a grid at least this fine, then block-averaged: proper partial volumes


@dataclass
class Options(CommonOptions):
    out: str = option(str(HERE), "folder that gets data/, data_csvs/ and truth.csv")
    n_train: int = option(160, "training subjects")
    n_val: int = option(30, "validation subjects")
    n_test: int = option(50, "test subjects")
    shape: tuple[int, int, int] = option(
        SHAPE, "grid; isotropic voxels that hold the head (113 137 113: 1.5 mm)", unit="voxels"
    )
    overwrite: bool = option(False, "replace a cohort that is already there")


# ---- who


def draw_group(position: int) -> str:
    """Group of the subject at a position (0, 1, ...) of its split: always the one furthest behind its share."""
    taken = Counter()
    for n in range(position + 1):
        group = max(SHARES, key=lambda g: SHARES[g] * (n + 1) - taken[g])
        taken[group] += 1
    return group


def draw_subject(seed: int, number: int, group: str) -> dict:
    """Site, sex, age and hippocampal factors of a subject (no image)."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    patient = group != "HC"
    odds = np.array([share if patient else 1 - share for _, _, share in SITES.values()])
    site = str(rng.choice(list(SITES), p=odds / odds.sum()))
    sex, age = str(rng.choice(["F", "M"])), float(rng.uniform(18, 65))
    factors, visible = {"left": 1 + 0.08 * rng.normal(), "right": 1 + 0.08 * rng.normal()}, bool(rng.random() > 0.2)
    if patient:
        other = "right" if group == "left" else "left"
        factors[other] -= 0.04
        factors[group] = 0.66 + 0.10 * rng.normal() if visible else 0.92 + 0.08 * rng.normal()
    factors = {f"factor_{side}": float(np.clip(f, 0.35, 1.3)) for side, f in factors.items()}
    return {"site": site, "sex": sex, "age": round(age, 1), "mri_positive": int(patient and visible)} | factors


# ---- what


def grid_affine(shape) -> np.ndarray:
    """Affine (4, 4) of a LAS+ grid about the centre of CAT12's: isotropic, as fine as its field of view fits."""
    spacing = SPACING_MM * max(full / n for full, n in zip(SHAPE, shape, strict=True))
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = CENTRE_MM - np.diag(affine)[:3] * (np.asarray(shape) - 1) / 2
    return affine


@lru_cache(maxsize=1)
def atlas():
    """Template at 1 mm: csf, grey, white, windows of the left and right hippocampus (5, ...); region (1, ...)."""
    import torch
    from scipy import ndimage

    from common import phantom

    base = phantom.template()
    windows = []
    for side in SIDES:
        away_mm = ndimage.distance_transform_edt(base["region"][0].numpy() != phantom.REGION_ID[f"hippocampus_{side}"])
        windows.append(np.exp(-0.5 * (away_mm / REACH_MM) ** 2).astype(np.float32))
    return torch.cat([base["tissue"][:3], torch.from_numpy(np.stack(windows))]), base["region"]


def sample(volume, points_mm, origin, step_mm, mode="bilinear"):
    """Tensor (C, X, Y, Z), RAS+ from `origin`, at world points (..., 3): (C, ...); 0 outside."""
    import torch
    import torch.nn.functional as F

    size = step_mm * (torch.tensor(volume.shape[1:]) - 1)
    grid = (points_mm - torch.as_tensor(origin, dtype=torch.float32)) / size * 2 - 1
    return F.grid_sample(volume[None], grid.flip(-1)[None], mode=mode, align_corners=True)[0]


def smooth_noise(rng, channels: int, fwhm_mm: float, rms: float):
    """(channels, ...) smooth noise on the LATTICE, the same in mm on every image grid."""
    from scipy import ndimage

    sigma = fwhm_mm / 2.3548 / LATTICE_MM
    noise = rng.standard_normal((channels, *LATTICE))
    noise = ndimage.gaussian_filter(noise, (0, sigma, sigma, sigma))
    return (noise * (rms / noise.std(axis=(1, 2, 3), keepdims=True))).astype(np.float32)


def head_points(shape, affine, k: int):
    """World mm (..., 3) of the working voxels (k per image voxel and axis) that can hold the head; their slices."""
    import torch

    from common import nifti, phantom

    fine, base = nifti.strided_affine(affine, 1 / k), phantom.template()
    low = np.asarray(base["origin"]) - 5
    high = low + np.array(base["region"].shape[1:]) + 10
    axes, box = [], []
    for i, n in enumerate(shape):
        mm = np.arange(n * k) * fine[i, i] + fine[i, 3]
        inside = np.flatnonzero((mm >= low[i]) & (mm <= high[i]))
        box.append(slice(inside[0], inside[-1] + 1))
        axes.append(torch.from_numpy(mm[box[i]]).float())
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1), tuple(box)


def grey_matter(seed: int, shape, subject: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """A subject's modulated grey matter (D, H, W) float32 LAS+, label map (common.phantom.LABELS), affine, volumes."""
    import torch
    from scipy import ndimage

    from common import phantom

    # Where the working voxels fall on the template, and what is there.
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    affine = grid_affine(shape)
    k = int(np.ceil(affine[1, 1] / WORK_MM))
    points, box = head_points(shape, affine, k)
    fields = np.concatenate([smooth_noise(rng, 3, 20.0, MISREGISTRATION_MM), smooth_noise(rng, 2, 12.0, SULCI),
                             smooth_noise(rng, 1, 25.0, LOCAL_VOLUME)])  # fmt: skip
    local = sample(torch.from_numpy(fields), points, LATTICE_ORIGIN, LATTICE_MM)
    points = points + local[:3].movedim(0, -1)
    (maps, region), origin = atlas(), phantom.template()["origin"]
    maps = sample(maps, points, origin, 1.0)
    region = sample(region, points, origin, 1.0, "nearest")[0].to(torch.uint8)

    # Fractions of an average of 152 heads become those of one: sharpened, with sulci of its own.
    odds = (maps[:3] + 1e-4) ** phantom.SHARPEN
    odds[0] *= torch.exp(local[3])
    odds[2] *= torch.exp(local[4])
    tissue = odds / odds.sum(0) * maps[:3].sum(0).clamp(max=1)

    # Modulation: the subject's volume per volume of the template.
    scale, noise, _ = SITES[subject["site"]]
    growth = local[5] + np.log(HEAD * scale) - 0.003 * (subject["age"] - 40) + 0.04 * (subject["sex"] == "M")
    for window, side in zip(maps[3:], SIDES, strict=True):
        growth = growth + np.log(subject[f"factor_{side}"]) * window
    modulated = tissue[1] * torch.exp(growth)

    def whole(part):
        full = np.zeros((*part.shape[:-3], *(n * k for n in shape)), part.numpy().dtype)
        full[(..., *box)] = part.numpy()
        return full

    brain = phantom.Brain(whole(tissue), whole(region), np.empty(0), (k, k, k), affine, phantom.Factors(), {})
    grain = ndimage.gaussian_filter(rng.standard_normal(shape), GRAIN_MM / 2.3548 / affine[1, 1])
    grey = phantom.block_mean(whole(modulated), brain.k) * (1 + noise * grain / grain.std())
    grey, labels = np.maximum(grey, 0).astype(np.float32), brain.labels()

    fine_mm3, voxel_mm3 = (affine[1, 1] / k) ** 3, affine[1, 1] ** 3
    truth = {}
    for side in SIDES:
        inside = region == phantom.REGION_ID[f"hippocampus_{side}"]
        truth[f"hippocampus_{side}_mm3"] = float(modulated[inside].sum()) * fine_mm3
        truth[f"measured_{side}_mm3"] = float(grey[labels == phantom.LABELS[f"hippocampus_{side}"]].sum() * voxel_mm3)
    return grey, labels, affine, truth | {"grey_ml": float(grey.sum() * voxel_mm3 / 1000)}


# ---- files


def make_subject(options: Options, split: str, position: int) -> dict:
    """Write the map and the region map of one subject; returns its truth row."""
    from common import nifti

    number, group = FIRST_ID[split] + position, draw_group(position)
    subject = draw_subject(options.seed, number, group)
    grey, labels, affine, volumes = grey_matter(options.seed * 100_003 + number, options.shape, subject)
    name = f"mwp1sub-{number:04d}_T1w"
    nifti.save(Path(options.out) / GREY / f"{name}.nii.gz", grey, affine)
    nifti.save(Path(options.out) / REGIONS / f"{name}.nii.gz", labels, affine, dtype=np.int16)
    return {"name": name, "split": split, "group": group} | subject | volumes


def table_row(truth: dict) -> dict:
    """The master table's columns (EPD: epilepsy; MRI_Plus: patients with visible atrophy only) and the covariates."""
    group = truth["group"]
    schemes = {
        "HC_vs_EPD": ({"HC": 0, "EPD": 1}, "HC" if group == "HC" else "EPD"),
        "LTLE_vs_RTLE": ({"left": 0, "right": 1}, group),
        "HC_vs_LTLE_vs_RTLE": ({"HC": 0, "left": 1, "right": 2}, group),
    }
    row = {"sbj_nme": truth["name"].split("_")[0].removeprefix("mwp1"), "file": f"../{GREY}/{truth['name']}.nii.gz"}
    shown = {"": True, "_MRI_Plus": group == "HC" or truth["mri_positive"]}
    for kind in ("numeric", "string"):
        for suffix, included in shown.items():
            for scheme, (numbers, label) in schemes.items():
                known = included and label in numbers
                value = numbers[label] if kind == "numeric" and known else label
                row[f"{scheme}{suffix}_{kind}"] = value if known else ""
    return row | {name: truth[name] for name in ("site", "age", "sex")}


def check(options: Options) -> None:
    if min(options.shape) < 16 or max(options.shape) > 192:
        raise UserError(f"--shape {options.shape}: every axis between 16 and 192 voxels")
    for split, n in {"train": options.n_train, "val": options.n_val, "test": options.n_test}.items():
        if not 0 < n < 2999:
            raise UserError(f"--n_{split} {n}: between 1 and 2998 subjects")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: seeds are 0 or more")
    for path in (Path(options.out) / name for name in (GREY, REGIONS, TABLES, "truth.csv")):
        if not options.overwrite and (path.is_file() or path.is_dir() and any(path.iterdir())):
            raise UserError(f"{path} already holds data; give another --out, or --overwrite to replace it")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import phantom, tables
    from common.runlog import progress, write_json

    atlas()  # once, before the threads ask for it
    out, sizes = Path(options.out), {"train": options.n_train, "val": options.n_val, "test": options.n_test}
    jobs = [(split, position) for split, n in sizes.items() for position in range(n)]
    with ThreadPoolExecutor(max(options.num_workers, 1)) as pool, progress(len(jobs), 0, "phantom") as bar:
        futures = [pool.submit(make_subject, options, *job) for job in jobs]
        rows = []
        try:
            for future in futures:
                rows.append(future.result())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for split in sizes:
        part = [table_row(row) for row in rows if row["split"] == split]
        tables.write_csv(out / TABLES / f"{split}.csv", part, digits=6)
    tables.write_csv(out / TABLES / "master.csv", [table_row(row) for row in rows], digits=6)
    tables.write_csv(out / "truth.csv", rows, digits=6)
    spacing = float(grid_affine(options.shape)[1, 1])
    record = {"source": "phantom", "seed": options.seed, "shape": list(options.shape), "spacing_mm": spacing,
              "labels": phantom.LABELS}  # fmt: skip
    write_json(out / "data" / "phantom.json", record)
    counts = Counter(row["group"] for row in rows)
    print(f"{len(rows)} subjects in {out}: {', '.join(f'{counts[group]} {group}' for group in SHARES)}")
    print(f"{' x '.join(map(str, options.shape))} voxels of {spacing:.4g} mm")


if __name__ == "__main__":
    cli.run(main)
