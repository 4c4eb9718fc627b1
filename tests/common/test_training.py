"""What the studies share: a folder of results belongs to one set of options."""

import json
from dataclasses import dataclass

import pytest

from common.cli import CommonOptions, UserError, option
from common.training import claim_study
from tests.helpers import ROOT, run_script

PAPERS = sorted(path.parent.name for path in ROOT.glob("*/reproduce.py"))


@dataclass
class Study(CommonOptions):
    preset: str = option("phantom", "the study, or the demo")
    out: str = option("", "folder")
    shape: tuple[int, ...] = option((8, 8), "grid")
    steps: int = option(10, "length")
    jobs: int = option(2, "processes", free=True)


def test_a_study_of_other_options_is_not_taken_for_this_one(tmp_path):
    """Its cohort and runs would be found and used, and the results would tell the new options."""
    claim_study(Study(out=str(tmp_path), steps=5))
    claim_study(Study(out=f"{tmp_path}/.", steps=5, jobs=1, num_workers=0, device="cpu", preset="smoke"))
    for changed, message in ((dict(steps=6), "steps 5 -> 6"), (dict(steps=5, seed=1), "seed 0 -> 1"),
                             (dict(steps=5, shape=(8, 9)), r"shape \[8, 8\] -> \[8, 9\]")):  # fmt: skip
        with pytest.raises(UserError, match=f"a study of other options .{message}.: name another --out"):
            claim_study(Study(out=str(tmp_path), **changed))
    assert json.loads((tmp_path / "options.json").read_text())["steps"] == 5  # as it was


def test_an_option_that_is_newer_than_the_study_was_its_default(tmp_path):
    claim_study(Study(out=str(tmp_path)))
    record = json.loads((tmp_path / "options.json").read_text())
    del record["steps"]
    (tmp_path / "options.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="steps 10 -> 11"):
        claim_study(Study(out=str(tmp_path), steps=11))
    claim_study(Study(out=str(tmp_path)))
    (tmp_path / "options.json").write_text("{")
    with pytest.raises(UserError, match="options.json is damaged .*; delete the folder or name another --out"):
        claim_study(Study(out=str(tmp_path)))


def test_every_paper_has_a_study():
    assert PAPERS == ["il_cldm", "lapt", "ldae", "mgdcr", "neuroldm3d"]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_study_keeps_to_its_folder(paper, tmp_path):
    """Before anything is made; and the demo has a folder of its own."""
    (tmp_path / "options.json").write_text(json.dumps({"seed": 7}))
    done = run_script([f"{paper}/reproduce.py", "--device", "cpu", "--out", tmp_path])
    assert done.returncode == 2 and "a study of other options (seed 7 -> 0)" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["options.json"]
    folders = run_script(["-c", f"from {paper}.reproduce import *; P = globals().get('PRESETS_HERE') or PRESETS\n"
                          "print(Options().out, Options(**P['smoke']).out)"]).stdout.split()  # fmt: skip
    assert [path.rsplit("/", 1)[1] for path in folders] == ["reproduce", "demo"]
