"""From raw CT perfusion, DWI, ADC and masks to the folder that all stages read: checks, one grid, statistics, splits.

    python lapt/preprocessing.py --input_dir RAW --output_dir FOLDER            # RAW/<case>/{ctp,dwi,adc,...}.nii.gz
    python lapt/preprocessing.py --input_dir RAW --check_only                   # every case, what is wrong with it
    python lapt/preprocessing.py --cases TABLE.csv --to_ctp_grid --spacing_mm 1 1 4 --shape 192 224 32 --make_masks
    python lapt/preprocessing.py --input_dir NEW --output_dir FOLDER2 --one_split test   # for evaluation only
    python lapt/preprocessing.py --input_dir RAW --maps tmax cbf cbv mtt   # perfusion maps as channels after the CTP

Images of a case must show the same head in the same place: register DWI and ADC to the CTP and correct its motion
first (lapt/isles.py says how). The file formats are in lapt/raw.py (input) and lapt/dataset.py (output). Without DWI
and ADC a case can be predicted only, without a lesion mask it counts as free of lesions. The result depends neither
on --num_workers nor on the order of files. A 192 x 224 x 32 x 15 case takes some seconds and 90 MB.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
INDEX = "CTPDWI_slice_idx.json"  # the original's name
OURS = ("cases", "splits", "manifest.csv", "statistics.json", INDEX, "report.csv")
COLUMNS = ("case", "patient", "split", "brain_ml", "lesion_ml", "retained_slices", "shape", "spacing_mm",
           "time_points", "maps", "has_mri", "has_lesion_file")  # fmt: skip
BINS = 1 << 20  # of the histogram behind the pooled quantiles


@dataclass
class Options(CommonOptions):
    input_dir: str = option(str(HERE / "data" / "raw"), "folder of raw cases")
    cases: str = option("", "table of cases (CSV: case, patient, ctp, dwi, adc, mask, lesion) instead of --input_dir")
    output_dir: str = option(str(HERE / "data"), "prepared folder")
    time_points: int = option(0, "CTP frames of every case; 0: as most cases have", group="checks")
    resample_time: bool = option(False, "interpolate series with another number of frames", group="checks")
    maps: tuple[str, ...] = option((), "further images that the network is to see, <case>/NAME.nii.gz or column NAME: "
                                       "perfusion maps such as tmax cbf cbv mtt, or ncct", group="checks")  # fmt: skip
    maps_only: bool = option(False, "take --maps instead of the CTP", group="checks")
    frame_s: float = option(0.0, "with --resample_time: time between frames, by the time in the header; 0: the whole "
                                 "series evenly", unit="s", group="checks")  # fmt: skip
    to_ctp_grid: bool = option(False, "resample images on another grid onto the CTP's, by their headers", group="grid")
    spacing_mm: tuple[float, float, float] = option((0.0, 0.0, 0.0), "common voxel size, x y z; 0: as it is", unit="mm",
                                                    group="grid")  # fmt: skip
    shape: tuple[int, int, int] = option((0, 0, 0), "common grid about the middle of the brain, x y z; 0: as it is",
                                         unit="voxels", group="grid")  # fmt: skip
    make_masks: bool = option(False, "make missing brain masks from the CTP: tissue inside the skull", group="masks")
    fill_holes: bool = option(False, "fill holes of the brain masks, slice by slice", group="masks")
    clip_lesion: bool = option(False, "cut off lesion outside the brain mask instead of refusing it", group="masks")
    min_brain_mm2: float = option(200.0, "least brain of a retained slice", unit="mm^2", group="masks")
    ctp_window: tuple[float, float] = option((0.0, 200.0), "HU that become -1 and 1", group="intensity")
    val_size: float = option(0.1, "share of the patients for validation", group="split")
    test_size: float = option(0.1, "share of the patients for the test", group="split")
    split_seed: int = option(42, "seed of the split", group="split")
    splits: str = option("", "folder splits/ with {train,val,test}_list.json to take over", group="split")
    one_split: str = option("", "put all cases into one list", choices=("", "train", "val", "test"), group="split")
    check_only: bool = option(False, "read and check every case, write nothing")
    skip_bad: bool = option(False, "leave out cases that cannot be used instead of stopping; report.csv names them")
    overwrite: bool = option(False, "replace a prepared folder that is already there")


# ---- cases ----------------------------------------------------------------------------------------------------------


def rules_of(options: Options, sources):
    """Reading rules; time_points 0 becomes the number that most cases have."""
    from lapt import raw

    names = ("resample_time", "frame_s", "to_ctp_grid", "spacing_mm", "shape", "clip_lesion", "fill_holes",
             "make_masks", "min_brain_mm2", "maps", "maps_only")  # fmt: skip
    time_points = options.time_points
    if not time_points and not options.maps_only:
        counts = Counter(n for s in sources if "ctp" in s.files and (n := raw.frames(s.files["ctp"])))
        time_points = max(counts, key=lambda n: (counts[n], n)) if counts else 0
    return raw.Rules(time_points, **{name: getattr(options, name) for name in names})


def prepare_all(sources, rules, folder: Path | None, num_workers: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """(records of the good cases, (case, what is wrong) of the others), in the order of `sources`."""
    from common.runlog import progress
    from lapt import raw

    work, results = partial(raw.prepare, rules=rules, folder=folder), []
    with progress(len(sources), 0, "check" if folder is None else "prepare") as bar:

        def collect(outcomes):
            for outcome in outcomes:
                results.append(outcome)
                bar.update()

        if num_workers <= 1:
            collect(map(work, sources))
        else:  # spawned, as on every system: nothing is inherited
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(num_workers, len(sources)), mp_context=context) as pool:
                collect(pool.map(work, sources))
    good = [result for message, result in results if not message]
    return good, [(result, message) for message, result in results if message]


def report(bad: list[tuple[str, str]], n: int, options: Options) -> None:
    """One line per bad case on stderr; UserError unless they may be skipped."""
    stop = len(bad) == n or bad and not options.skip_bad
    if stop and len(bad) == 1:
        raise UserError(f"{bad[0][0]}: {bad[0][1]}")
    for case, message in bad:
        print(f"{case}: {message}", file=sys.stderr)
    if stop:
        names = ", ".join(case for case, _ in bad[:5]) + (", ..." if len(bad) > 5 else "")
        advice = "mend them" if len(bad) == n else "mend them as told above, or leave them out with --skip_bad"
        raise UserError(f"{len(bad)} of {n} cases cannot be used ({names}): {advice}")


# ---- what follows from the prepared cases ---------------------------------------------------------------------------


def strata(folder: Path) -> dict[str, str]:
    """Stratum of every patient of a prepared folder: lesion, free, or data_split.CT_ONLY."""
    from lapt import data_split, raw

    found: dict[str, str] = {}
    for path in sorted((folder / "cases").iterdir()):
        known = raw.read_record(path)
        own = data_split.CT_ONLY if not known["has_mri"] else "lesion" if known["lesion_ml"] else "free"
        other = found.get(known["patient"], own)
        if data_split.CT_ONLY in (own, other):  # a patient with one paired case trains with that
            own = own if other == data_split.CT_ONLY else other
        found[known["patient"]] = "lesion" if "lesion" in (own, other) else own
    return found


def pooled(records: list[dict], folder: Path, name: str) -> dict | None:
    """Statistics of DWI, ADC or a map over all brain voxels of the cases that have it, read one case at a time.

    None without such cases.
    """
    import numpy as np

    from lapt import raw

    records = [known for known in records if name in known["stats"]]
    stats = [known["stats"][name] for known in records]
    if not stats:
        return None
    n = sum(s["n"] for s in stats)
    mean = sum(s["n"] * s["mean"] for s in stats) / n
    variance = sum(s["n"] * (s["sd"] ** 2 + (s["mean"] - mean) ** 2) for s in stats) / n
    low, high = min(s["min"] for s in stats), max(s["max"] for s in stats)
    edges, counts = np.linspace(low, high, BINS + 1), np.zeros(BINS, np.int64)
    for known in records:
        channel = known["time_points"] + known["maps"].index(name) if name in known["maps"] else None
        what = name if channel is None else "ctp"
        image, mask = (np.load(folder / "cases" / known["case"] / f"{w}.npy", mmap_mode="r") for w in (what, "mask"))
        image = image if channel is None else image[:, channel]
        counts += np.histogram(image[mask > 0], BINS, (low, high))[0]
    cumulative = np.concatenate([[0], counts.cumsum()])
    quantiles = np.interp(np.array(raw.QUANTILES) * n, cumulative, edges)
    return {"low": float(quantiles[0]), "high": float(quantiles[1]), "mean": mean, "sd": float(variance**0.5),
            "min": low, "max": high, "n": n}  # fmt: skip


def finish(folder: Path, split, ctp_window=None) -> dict:
    """Write lists, slice index, manifest and statistics of the prepared cases; returns the statistics.

    ctp_window: None keeps the one of the present statistics.
    """
    import json

    from common import tables
    from common.runlog import write_json
    from lapt import data_split, raw

    records = [raw.read_record(path) for path in sorted((folder / "cases").iterdir())]
    where = {known["case"]: split.of(known["patient"], known["has_mri"]) for known in records}
    if len({known["time_points"] for known in records}) > 1:
        raise UserError("the cases have different numbers of CTP frames; prepare them with --time_points N "
                        "--resample_time")  # fmt: skip
    old = folder / "statistics.json"
    window = json.loads(old.read_text())["ctp_window"] if ctp_window is None else list(ctp_window)
    train = [known for known in records if where[known["case"]] == "train"]
    statistics = {
        "split_hash": split.hash,
        "train_cases": len(train),
        "ctp_window": window,
        "time_points": records[0]["time_points"],
        "maps": {name: pooled(train, folder, name) for name in records[0]["maps"]},
        "shape": [max(known["shape"][axis] for known in records) for axis in range(3)],
        "adc_unit": "1e-6 mm^2/s",
        **{name: pooled(train, folder, name) for name in ("dwi", "adc")},
    }
    data_split.write(folder, split)
    index = {known["case"]: {"slice_idx": known["slices"], "n": len(known["slices"])} for known in records}
    write_json(folder / INDEX, index)
    rows = [
        known | {
            "split": where[known["case"]],
            "retained_slices": len(known["slices"]), "shape": "x".join(map(str, known["shape"])),
            "spacing_mm": "x".join(f"{s:.6g}" for s in known["spacing_mm"]), "maps": " ".join(known["maps"]),
            "has_mri": int(known["has_mri"]), "has_lesion_file": int(known["has_lesion_file"]),
        }
        for known in records
    ]  # fmt: skip
    tables.write_csv(folder / "manifest.csv", rows, COLUMNS, digits=6)
    write_json(old, statistics)
    return statistics


# ---- command --------------------------------------------------------------------------------------------------------


def check(options: Options) -> None:
    """UserError for options that no data can mend."""
    from lapt import raw

    if options.time_points < 0 or options.frame_s < 0 or options.min_brain_mm2 < 0:
        raise UserError("--time_points, --frame_s and --min_brain_mm2 are 0 or more")
    if options.frame_s and not (options.resample_time and options.time_points):
        raise UserError("--frame_s needs --resample_time and --time_points: the number of frames at this distance")
    if min(options.spacing_mm) < 0 or min(options.shape) < 0:
        raise UserError(f"--spacing_mm {options.spacing_mm}, --shape {options.shape}: 0 or more")
    raw.check_spacing(options.spacing_mm)
    raw.check_maps(options.maps)
    if options.maps_only and (not options.maps or options.time_points or options.resample_time):
        raise UserError("--maps_only needs --maps; without a CTP there are no --time_points and --resample_time")
    if not -math.inf < options.ctp_window[0] < options.ctp_window[1] < math.inf:
        raise UserError(f"--ctp_window {options.ctp_window}: the lower value first, both finite")
    if options.splits and options.one_split:
        raise UserError("--splits and --one_split exclude each other")
    there = [name for name in OURS if (Path(options.output_dir) / name).exists()]
    if there and not options.overwrite and not options.check_only:
        raise UserError(f"{options.output_dir} already holds {there[0]}; give another --output_dir, or --overwrite to "
                        "replace the prepared data")  # fmt: skip


def make_split(options: Options, folder: Path):
    """The split that the options ask for, of the cases in `folder`."""
    from lapt import data_split

    if options.splits:
        lists = Path(options.splits)
        return data_split.read(lists.parent if lists.name == "splits" else lists)
    if options.one_split:
        return data_split.whole(strata(folder), options.one_split)
    return data_split.make(strata(folder), options.val_size, options.test_size, options.split_seed)


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import tables
    from lapt import data_split, raw

    # ---- read, check and write beside the final place, so that nothing half-made is left
    where = options.cases or options.input_dir
    sources = raw.read_table(where, options.maps) if options.cases else raw.find(where, options.maps)
    rules, out = rules_of(options, sources), Path(options.output_dir)
    if options.check_only:
        good, bad = prepare_all(sources, rules, None, options.num_workers)
        report(bad, len(sources), options)
        summary(good, bad, rules)
        return
    partial_folder = out / ".preparing"
    shutil.rmtree(partial_folder, ignore_errors=True)
    (partial_folder / "cases").mkdir(parents=True)
    try:
        good, bad = prepare_all(sources, rules, partial_folder / "cases", options.num_workers)
        report(bad, len(sources), options)
        statistics = finish(partial_folder, split := make_split(options, partial_folder), options.ctp_window)
        if bad:
            tables.write_csv(partial_folder / "report.csv", [{"case": c, "problem": text} for c, text in bad])

        # ---- into place
        for name in OURS:
            old, new = out / name, partial_folder / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
            if new.exists():
                new.replace(old)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    summary(good, bad, rules)
    sizes = ", ".join(f"{len(split.patients[n])} {n}" for n in data_split.LISTS if split.patients[n])
    print(f"{out}: {sizes} patients, split {split.hash}, largest grid {' x '.join(map(str, statistics['shape']))}")


def summary(good: list[dict], bad: list, rules) -> None:
    slices = sum(len(known["slices"]) for known in good)
    paired = [known for known in good if known["has_mri"]]
    lesions = [known["lesion_ml"] for known in paired if known["lesion_ml"]]
    shown = f", lesions of {min(lesions):.1f} to {max(lesions):.1f} ml in {len(lesions)}" if lesions else ""
    channels = f"{rules.time_points} time points" + (f" and {', '.join(rules.maps)}" if rules.maps else "")
    print(f"{len(good)} cases, {slices} retained slices, {channels}{shown}")
    for text, some in (("without DWI and ADC: to be predicted only", [k for k in good if not k["has_mri"]]),
                       ("without lesion file: taken as free of lesions",
                        [k for k in paired if not k["has_lesion_file"]])):  # fmt: skip
        if some:
            print(f"note: {len(some)} cases {text}, such as {some[0]['case']}")
    if bad:
        print(f"note: {len(bad)} cases left out")


if __name__ == "__main__":
    cli.run(main)
