"""Which patients train, validate and test: disjoint lists in a prepared folder, lesion-free patients in each share.

    python lapt/data_split.py --data FOLDER --val_size 0.2 --overwrite    # split anew
    python lapt/data_split.py --data FOLDER --keep_lists                  # after editing the lists by hand

FOLDER/splits/{train,val,test}_list.json are JSON lists of patient ids, as in the volume release; ct_only_list.json
names patients without DWI and ADC, who can be predicted only. The manifest and the statistics of the training set
follow the lists; every network carries their hash.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
SPLITS, CT_ONLY = ("train", "val", "test"), "ct_only"
LISTS = (*SPLITS, CT_ONLY)


@dataclass
class Options(CommonOptions):
    data: str = option(str(HERE / "data"), "prepared folder")
    val_size: float = option(0.1, "share of the patients for validation")
    test_size: float = option(0.1, "share of the patients for the test")
    split_seed: int = option(42, "seed of the split")
    keep_lists: bool = option(False, "take the lists as they are, only renew the manifest and the statistics")
    overwrite: bool = option(False, "replace the lists that are already there: earlier results no longer match")


@dataclass(frozen=True)
class Split:
    """Patients by list; `hash` (16 hex digits) depends on those of train, val and test alone."""

    patients: dict[str, tuple[str, ...]]
    path: Path | None = None

    @property
    def hash(self) -> str:
        content = json.dumps({name: sorted(self.patients[name]) for name in SPLITS}, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def _split_of(self) -> dict[str, str]:
        return {patient: name for name in LISTS for patient in self.patients[name]}

    def of(self, patient: str, has_mri: bool = True) -> str:
        """The list that a case of this patient belongs to: without DWI and ADC always CT_ONLY. UserError if none."""
        if not has_mri:
            return CT_ONLY
        if patient in self._split_of:
            return self._split_of[patient]
        raise UserError(f"patient {patient} is in no list of {self.path or 'the split'}; add it to one of them, or "
                        "split anew with lapt/data_split.py --overwrite")  # fmt: skip


def make(strata: dict[str, str], val_size: float, test_size: float, seed: int) -> Split:
    """Split of patients by stratum (any text, such as with or without lesion; CT_ONLY: no part in training).

    Strata get proportional shares; val and test at least one patient each. Depends on seed, names and strata alone.
    UserError for shares that no split can have and for fewer than three patients.
    """
    for name, share in (("val_size", val_size), ("test_size", test_size)):
        if not 0 < share < 1 or val_size + test_size >= 1:
            raise UserError(f"--{name} {share}: val_size and test_size are shares above 0, together below 1")
    if seed < 0:
        raise UserError(f"--split_seed {seed}: seeds are 0 or more")
    members = sorted(patient for patient, stratum in strata.items() if stratum != CT_ONLY)
    n = len(members)
    if n < 3:
        raise UserError(f"{n} patients with DWI and ADC are too few to train, validate and test: at least three are "
                        "needed, or put all into one list with --one_split")  # fmt: skip
    mixed = [members[i] for i in np.random.default_rng(seed).permutation(n)]
    mixed.sort(key=lambda patient: strata[patient])  # strata one after the other, mixed within

    def take(share):
        """Equidistant places of the rest, so that every stratum gives its share."""
        count = min(max(1, round(share * n)), len(mixed) - 1)
        places = {int((i + 0.5) * len(mixed) / count) for i in range(count)}
        taken = [mixed[i] for i in sorted(places)]
        mixed[:] = [patient for i, patient in enumerate(mixed) if i not in places]
        return tuple(sorted(taken))

    test, val = take(test_size), take(val_size)
    ct_only = tuple(sorted(patient for patient, stratum in strata.items() if stratum == CT_ONLY))
    return Split({"train": tuple(sorted(mixed)), "val": val, "test": test, CT_ONLY: ct_only})


def whole(strata: dict[str, str], name: str) -> Split:
    """All patients with DWI and ADC in one list."""
    lists = {other: () for other in SPLITS}
    lists[name] = tuple(sorted(patient for patient, stratum in strata.items() if stratum != CT_ONLY))
    return Split(lists | {CT_ONLY: tuple(sorted(p for p, stratum in strata.items() if stratum == CT_ONLY))})


def read(folder: str | Path) -> Split:
    """The lists in FOLDER/splits, missing ones empty; UserError if damaged, all missing, or a patient is in two."""
    folder = Path(folder) / "splits"
    lists: dict[str, tuple[str, ...]] = {}
    for name in LISTS:
        path = folder / f"{name}_list.json"
        if not path.is_file():
            lists[name] = ()
            continue
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no JSON ({error}); repair it, or split anew with lapt/data_split.py") from error
        if not isinstance(content, list) or not all(isinstance(patient, str) for patient in content):
            raise UserError(f"{path} must be a JSON list of patient ids; repair it, or split anew with "
                            "lapt/data_split.py")  # fmt: skip
        lists[name] = tuple(content)
    if not any(lists.values()):
        raise UserError(f"{folder} has no patient lists; prepare the data with lapt/preprocessing.py, which writes "
                        "them")  # fmt: skip
    check_disjoint(lists, folder)
    return Split(lists, folder)


def check_disjoint(lists: dict[str, tuple[str, ...]], where: str | Path) -> None:
    """UserError if a patient is listed twice."""
    twice = [patient for patient, n in Counter(p for names in lists.values() for p in names).items() if n > 1]
    if twice:
        found = ", ".join(name for name, patients in lists.items() if twice[0] in patients)
        raise UserError(f"{where}: {len(twice)} patient(s) listed twice, such as {twice[0]} ({found}); keep each "
                        "patient in one list")  # fmt: skip


def write(folder: str | Path, split: Split) -> None:
    """The lists, each whole or not at all."""
    from common.runlog import write_json

    for name in LISTS:
        write_json(Path(folder) / "splits" / f"{name}_list.json", list(split.patients[name]))


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from lapt import preprocessing

    folder = Path(options.data)
    if not (folder / "cases").is_dir():
        raise UserError(f"{folder} is no prepared folder (no cases/ in it); make it with lapt/preprocessing.py")
    if options.keep_lists:
        split = read(folder)
    else:
        if not options.overwrite:
            raise UserError(f"{folder / 'splits'} has lists, and results carry their hash: add --overwrite to split "
                            "anew, or --keep_lists to keep them")  # fmt: skip
        split = make(preprocessing.strata(folder), options.val_size, options.test_size, options.split_seed)
    preprocessing.finish(folder, split)
    sizes = ", ".join(f"{len(split.patients[name])} {name}" for name in LISTS if split.patients[name])
    print(f"split {split.hash} in {folder / 'splits'}: {sizes} patients")


if __name__ == "__main__":
    cli.run(main)
