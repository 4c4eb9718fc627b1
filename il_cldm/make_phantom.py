"""Synthetic cohort with known truth in IL-CLDM's layout: paired T1 and amyloid PET, labels, split lists, region maps.

    python il_cldm/make_phantom.py                                  # the paper's grid, 80 subjects: minutes
    python il_cldm/make_phantom.py --shape 32 32 32 --out STUDY     # for training on a CPU: under a minute
    python il_cldm/make_phantom.py --coupling independent --out LEAK_TEST  # PET that no MRI can predict
    python il_cldm/make_phantom.py --from_labels DIR --out STUDY    # PET simulated on DLMUSE label maps of real T1

Subjects are seeded one by one and numbered per split: another --n_train leaves every other subject and split as it was.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
DIAGNOSES = ("NC", "SMC", "MCI", "AD")  # label_id 0..3; all four classes of the paper's default occur
FIRST_ID = {"train": 1, "val": 6001, "test": 8001}
POSITIVE_LOAD = 0.4  # amyloid status: load at or above
PET, MRI, REGIONS = "data/process/whole_Abeta_112", "data/process/whole_MRI_112", "data/process/regions_112"


@dataclass
class Options(CommonOptions):
    out: str = option(str(HERE), "folder that gets data/, data_info/ and truth.csv")
    n_train: int = option(48, "training subjects")
    n_val: int = option(8, "validation subjects")
    n_test: int = option(24, "test subjects")
    shape: tuple[int, int, int] = option(
        (112, 128, 112), "grid; isotropic voxels that hold the head (112 128 112: 1.5 mm)", unit="voxels"
    )
    coupling: str = option(
        "mri",
        "mri: uptake follows label and MRI-visible atrophy; independent: of neither",
        choices=("mri", "independent"),
    )
    pet_divisor: float = option(3.0, "SUVR that is stored as 1", unit="SUVR")
    native: bool = option(
        False,
        "also write raw/{mri,pet,labels} for --prepare: other spacing, orientation, origin and units",
    )
    from_labels: str = option("", "folder of DLMUSE label maps of real T1: simulate PET and labels on them, no phantom")
    overwrite: bool = option(False, "replace a cohort that is already there")


def draw_subject(seed: int, number: int, coupling: str) -> dict:
    """Label, status and factors of a subject (no image); classes come in turn with `number`."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    label = (number - 1) % 4
    age = rng.uniform(60, 88)
    older = (age - 74) / 10
    stage = (0.12, 0.32, 0.58, 0.84)[label]
    visible = np.clip(stage + rng.normal(0, 0.16), 0, 1)  # neurodegeneration as an MRI shows it
    factors = {
        "age": age,
        "atrophy": np.clip(0.75 * visible + 0.08 * older + rng.normal(0, 0.06), 0, 1),
        "ventricle_scale": np.clip(np.exp(1.15 * visible + 0.12 * older + rng.normal(0, 0.12)), 0.7, 4.5),
        "hippocampus_left": np.clip(1 - 0.4 * visible - 0.03 * older + rng.normal(0, 0.04), 0.5, 1.2),
        "hippocampus_right": np.clip(1 - 0.4 * visible - 0.03 * older + rng.normal(0, 0.04), 0.5, 1.2),
    }
    if coupling == "mri":
        level = 0.7 * visible + 0.3 * stage
        positive = level + rng.normal(0, 0.12) > 0.45
    else:
        level = rng.uniform(0, 1)
        positive = bool(((number - 1) // 4 + label) % 2)  # half of every class
    load = (
        np.clip(0.50 + 0.45 * level + rng.normal(0, 0.04), 0.5, 1)
        if positive
        else np.clip(0.04 + 0.18 * level + rng.normal(0, 0.03), 0, 0.3)
    )
    factors = {name: float(value) for name, value in (factors | {"amyloid_load": load}).items()}
    return {"label_id": label, "amyloid_positive": int(positive), "factors": factors}


def make_subject(options: Options, name: str, number: int) -> tuple[dict, dict]:
    """Write one subject; returns its truth row and its entry of prepare.json."""
    from common import nifti, phantom  # they import nibabel and torch, which --help need not

    out, seed = Path(options.out), options.seed * 100_003 + number  # distinct anatomy for every (seed, number)
    drawn = draw_subject(options.seed, number, options.coupling)
    factors = phantom.Factors(**drawn.pop("factors"))
    brain = phantom.anatomy(seed, options.shape, factors)
    labels = brain.labels()
    mri, pet = phantom.t1_image(brain, seed), phantom.pet_image(brain, seed)
    high = float(np.percentile(mri[labels > 0], 99.5))
    scaled = {MRI: mri / high, PET: pet / options.pet_divisor}
    clipped = {folder: float((data[labels > 0] > 1).mean()) for folder, data in scaled.items()}
    for folder, data in scaled.items():
        nifti.save(out / folder / name, data.clip(0, 1), brain.affine)
    nifti.save(out / REGIONS / name, labels, brain.affine, dtype=np.int16)
    if options.native:
        write_native(options, name, seed, factors, brain.affine[0, 0])
    measured = phantom.composite_suvr(
        pet, labels, *(phantom.codes(phantom.LABELS, n) for n in (phantom.TARGET, phantom.REFERENCE))
    )
    truth = drawn | {"diagnosis": DIAGNOSES[drawn["label_id"]]} | brain.truth | {"measured_suvr": measured}
    entry = {
        "mri_scale": {"norm": "percentile", "low": 0.0, "high": high, "clipped_share": clipped[MRI]},
        "pet_scale": {"norm": "fixed", "low": 0.0, "high": options.pet_divisor, "clipped_share": clipped[PET]},
    }
    return truth, {"mri": f"phantom seed {seed}", "pet": f"phantom seed {seed}"} | entry


def write_native(options: Options, name: str, seed: int, factors, spacing_mm: float) -> None:
    """The head in one shifted scanner world: MRI int16 0..1500, LAS, anisotropic; PET in SUVR, LPS, coarser."""
    from common import nifti, phantom

    stem, raw = name.removesuffix(".nii.gz"), Path(options.out) / "raw"
    shift = np.random.default_rng(np.random.SeedSequence([seed, 9])).uniform(-40, 40, 3)

    def write(data, affine, axes, path, dtype):
        affine = affine.copy()
        affine[:3, 3] += shift
        nifti.save(path, *nifti.reorient(data, affine, axes), dtype=dtype)

    def scan(spacing):
        return phantom.anatomy(
            seed, tuple(int(np.ceil(f / s)) for f, s in zip(phantom.FOV_MM, spacing, strict=True)), factors, spacing
        )

    fine = scan(spacing_mm * np.array([0.8, 0.72, 1.0]))
    t1 = np.rint(phantom.t1_image(fine, seed) * 1300).clip(0, 1500)
    write(t1, fine.affine, "LAS", raw / "mri" / f"{stem}_T1w.nii.gz", np.int16)
    write(fine.labels(), fine.affine, "LAS", raw / "labels" / f"{stem}_dseg.nii.gz", np.int16)
    coarse = scan(np.full(3, 1.3 * spacing_mm))
    write(phantom.pet_image(coarse, seed), coarse.affine, "LPS", raw / "pet" / f"{stem}_pet.nii.gz", np.float32)


def suvr_threshold(shape) -> float:
    """SUVR over the label map (with this grid's partial volume) of an average subject right at POSITIVE_LOAD."""
    from common import phantom

    factors = phantom.Factors(
        age=74,
        atrophy=0.35,
        ventricle_scale=1.7,
        hippocampus_left=0.8,
        hippocampus_right=0.8,
        amyloid_load=POSITIVE_LOAD,
    )
    brain = phantom.anatomy(0, shape, factors)
    pet = phantom.pet_image(brain, 0, noise=0.0, heterogeneity=0.0)
    return phantom.composite_suvr(
        pet, brain.labels(), *(phantom.codes(phantom.LABELS, n) for n in (phantom.TARGET, phantom.REFERENCE))
    )


def simulate_on_labels(options: Options) -> None:
    """Raw PET, diagnosis labels and region settings on DLMUSE label maps of real T1, ready for --prepare.

    Only the anatomy is real. Subjects are ranked by the ventricles' share of the brain; a made-up label and amyloid
    load follow that rank with noise, as if large ventricles meant disease.
    """
    from common import nifti, phantom, tables
    from common.runlog import progress
    from il_cldm.prepare import scan

    out, maps = Path(options.out), {}
    for key, path in scan(options.from_labels, "labels").items():
        maps[key] = nifti.load_labels(path)
    ventricles, csf = (phantom.codes(phantom.MUSE, n) for n in (("ventricle_left", "ventricle_right"), ("csf",)))

    def share(key):
        labels = maps[key].data
        return np.isin(labels, ventricles).sum() / max((~np.isin(labels, [0, *csf])).sum(), 1)

    regions = [phantom.codes(phantom.MUSE, n) for n in (phantom.TARGET, phantom.REFERENCE)]
    rows, borderline = [], []
    order = sorted(maps, key=share)
    with progress(len(order), 0, "PET on real labels", enabled=True) as bar:
        for rank, key in enumerate(order):
            rng = np.random.default_rng(np.random.SeedSequence([options.seed, *key.encode()]))
            level = float(np.clip((rank + 0.5) / len(order) + rng.normal(0, 0.08), 0, 1))
            labels, load = maps[key], 0.04 + 0.9 * level
            simulate = partial(phantom.pet_from_labels, labels.data, phantom.MUSE, rng=rng,
                               spacing_mm=labels.spacing_mm)
            pet, limit = simulate(amyloid_load=load), simulate(amyloid_load=POSITIVE_LOAD, noise=0.0)
            borderline.append(phantom.composite_suvr(limit, labels.data, *regions))
            nifti.save(out / "raw" / "pet" / f"{key}_pet.nii.gz", pet, labels.affine)
            suvr = phantom.composite_suvr(pet, labels.data, *regions)
            rows.append({"filename": f"{key}.nii.gz", "label_id": min(int(4 * level), 3), "ventricle_share": share(key),
                         "amyloid_load": load, "measured_suvr": suvr})  # fmt: skip
            bar.update()
    record = {"source": "PET simulated on real label maps, labels made up", "seed": options.seed,
              "target_labels": regions[0], "reference_labels": regions[1],
              "suvr_threshold": float(np.mean(borderline)), "label_id": dict(enumerate(DIAGNOSES))}  # fmt: skip
    (out / "data_info").mkdir(parents=True, exist_ok=True)
    tables.write_csv(out / "truth.csv", rows, digits=6)
    tables.write_csv(out / "data_info" / "data_info.csv", rows, ("filename", "label_id"))
    (out / "data_info" / "prepare.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"PET and made-up labels on {len(rows)} real label maps in {out}; next: main.py --prepare --root {out} "
          f"--raw_pet {out / 'raw' / 'pet'} --raw_mask {options.from_labels} --raw_mri FOLDER_OF_T1")  # fmt: skip


def check(options: Options) -> None:
    if min(options.shape) < 16 or max(options.shape) > 192:
        raise UserError(f"--shape {options.shape}: every axis between 16 and 192 voxels")
    counts = {"train": options.n_train, "val": options.n_val, "test": options.n_test}
    for split, n in counts.items():
        if not 0 < n <= 1999:
            raise UserError(f"--n_{split} {n}: between 1 and 1999 subjects")
    if options.pet_divisor <= 0 or options.seed < 0:
        raise UserError("--pet_divisor must be positive and --seed not negative")
    out = Path(options.out)
    for path in (PET, MRI, REGIONS, "data_info", "truth.csv", "raw"):
        path = out / path
        if not options.overwrite and (path.is_file() or path.is_dir() and any(path.iterdir())):
            raise UserError(f"{path} already holds data; give another --out, or --overwrite to replace it")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    if options.from_labels:
        return simulate_on_labels(options)
    from common import phantom, tables
    from common.runlog import progress

    phantom.template()  # once, before the threads ask for it
    names = {}
    for split, n in (("train", options.n_train), ("val", options.n_val), ("test", options.n_test)):
        names[split] = {f"{i % 97:03d}S{i:04d}.nii.gz": i for i in range(FIRST_ID[split], FIRST_ID[split] + n)}
    out = Path(options.out)
    for folder in (PET, MRI, REGIONS, "data_info", *(f"raw/{f}" for f in ("mri", "pet", "labels") if options.native)):
        (out / folder).mkdir(parents=True, exist_ok=True)

    rows, entries = [], {}
    jobs = [(split, name, number) for split in names for name, number in names[split].items()]
    with (
        ThreadPoolExecutor(max(options.num_workers, 1)) as pool,
        progress(len(jobs), 0, "phantom", enabled=True) as bar,
    ):
        futures = [pool.submit(make_subject, options, name, number) for _, name, number in jobs]
        try:
            for (split, name, _), future in zip(jobs, futures, strict=True):
                truth, entries[name] = future.result()
                rows.append({"filename": name, "split": split} | truth)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    spacing = float(phantom.grid_affine(options.shape)[0, 0])
    record = {
        "source": "phantom",
        "seed": options.seed,
        "coupling": options.coupling,
        "shape": list(options.shape),
        "spacing_mm": spacing,
        "mri_norm": "percentile",
        "pet_norm": "fixed",
        "pet_divisor": options.pet_divisor,
        "target_labels": phantom.codes(phantom.LABELS, phantom.TARGET),
        "reference_labels": phantom.codes(phantom.LABELS, phantom.REFERENCE),
        "suvr_threshold": suvr_threshold(options.shape),
        "labels": phantom.LABELS,
        "label_id": dict(enumerate(DIAGNOSES)),
        "subjects": entries,
    }
    tables.write_csv(out / "truth.csv", rows, digits=6)
    tables.write_csv(out / "data_info" / "data_info.csv", rows, ("filename", "label_id"))
    (out / "data_info" / "prepare.json").write_text(json.dumps(record, indent=1) + "\n")
    for split in names:
        (out / "data_info" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names[split]))
    positive = sum(row["amyloid_positive"] for row in rows)
    print(f"{len(rows)} subjects in {out}, {positive} amyloid-positive (SUVR {record['suvr_threshold']:.3f} or more)")
    print(f"{' x '.join(map(str, options.shape))} voxels of {spacing:g} mm")


if __name__ == "__main__":
    cli.run(main)
