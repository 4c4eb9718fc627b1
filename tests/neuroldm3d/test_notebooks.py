"""The notebooks run headless on one phantom study, and show what they say."""

import re

import numpy as np
import pandas as pd
import pytest

from common import nifti, runtime
from common.cli import UserError
from neuroldm3d.notebooks import study
from tests import notebooks
from tests.helpers import ROOT

FOLDER = ROOT / "neuroldm3d" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
NUMBER = r"[-+]?\d+\.?\d*"


class Shown(notebooks.Shown):
    """The same, and the numbers in its text."""

    def numbers(self, pattern):
        """The groups of all matches as floats, (matches, groups); `#` in the pattern stands for a number."""
        found = re.findall(pattern.replace("#", f"({NUMBER})"), self.text)
        return np.array(found, float).reshape(-1, pattern.count("#"))

    def row(self, name):
        """The numbers of the printed list `name [..]` or `name: [..]`."""
        return np.array(re.search(rf"^{name}:? \[(.*)\]", self.text, re.M)[1].split(","), float)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine are slower than one
        return study.make(tmp_path_factory.mktemp("notebooks") / "study")


@pytest.fixture
def show(made, tmp_path, monkeypatch):
    """show(name): the notebook executed on the shared study."""
    monkeypatch.setenv("NEUROLDM3D_ROOT", str(made))

    def execute(name):
        return Shown(**vars(notebooks.execute(FOLDER / f"{name}.ipynb", tmp_path, monkeypatch)))

    return execute


def test_all_four_are_there():
    assert NOTEBOOKS == ["data_split", "visualize", "visualize_latent", "visualize_recon"]


@pytest.mark.parametrize("stage", study.STAGES)
def test_a_study_without_what_is_needed_is_refused(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("NEUROLDM3D_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=study.STAGES[stage][0]):
        study.open_study(stage)
    assert not list(tmp_path.iterdir())


def test_a_script_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="audit.py: error: no tables in"):
        study.run("audit.py", "--root", tmp_path)
    assert "error: no tables in" in study.run("audit.py", "--root", tmp_path, check=False)


@pytest.mark.slow
def test_data_split(show, made):
    shown = show("data_split")
    assert len(shown.pictures) == 2
    assert "0 problems, 0 pairs of copies" in shown.text
    pairs = {kind: float(nmse) for kind, nmse in re.findall(r"^(\w+): .* = twin_\1, .*MSE ([\d.]+)$", shown.text, re.M)}
    assert set(pairs) == {"exact", "near", "mirrored"} and pairs["exact"] == 0 < pairs["near"] < 0.3
    assert len(re.findall(r"^error: the audit found 1 problem", shown.text, re.M)) == 2  # audit.py and data_split.py
    together = re.findall(r"twin in (\w+), original in (\w+)", shown.text)
    assert len(together) == 3 and all(twin == original for twin, original in together)

    master = pd.read_csv(made / "data_csvs" / "master.csv")
    by_site = master.groupby("site").HC_vs_LTLE_vs_RTLE_string.value_counts().unstack(fill_value=0)
    table = re.findall(r"^(SITE_\w) +(\d+) +(\d+) +(\d+) +(\d+)%$", shown.text, re.M)
    assert {site: [int(n) for n in counts] for site, *counts, _ in table} == {
        site: row[["HC", "left", "right"]].tolist() for site, row in by_site.iterrows()
    }
    n = len(master) + 3
    folds = shown.numbers(r"fold \d: # tested")
    assert folds.sum() == n and np.ptp(folds) <= 4 and f"{n} tests of {n} rows" in shown.text


@pytest.mark.slow
def test_visualize(show, made, tmp_path):
    shown = show("visualize")
    assert len(shown.pictures) == 7
    difference = {kind: shown.numbers(rf"(?m)^{kind}: TLE - HC # \[#, #\]")[0] for kind in ("real", "synthetic")}
    truth = pd.read_csv(made / "truth.csv").query("split != 'val'")
    volume = (truth.measured_left_mm3 + truth.measured_right_mm3).groupby(truth.group == "HC").mean()
    np.testing.assert_allclose(difference["real"][0], volume[False] - volume[True], rtol=0.5)
    assert difference["real"][2] < 0  # the interval tells atrophy from none
    files = {title: sorted((made / "synthetic_data" / title).glob("*.nii.gz")) for title in ("HC", "TLE")}
    with runtime.start("cpu", "fp32", 0) as rt:
        regions = study.Study(made, tmp_path, rt).hippocampi
    weight = sum(regions.probability.values())[::-1] * regions.voxel_mm3  # nifti.load gives RAS+
    mean = {title: np.mean([(nifti.load(f).data * weight).sum() for f in group]) for title, group in files.items()}
    assert difference["synthetic"][0] == pytest.approx(mean["TLE"] - mean["HC"], abs=1)
    assert difference["synthetic"][1] < difference["synthetic"][0] < difference["synthetic"][2]
    lines = re.findall(r"^(.*): nearest (\S+), distance ([\d.]+) (COPY)?", shown.text, re.M)
    *samples, planted = lines
    assert planted[0] == f"planted {planted[1]}" and planted[2:] == ("0.00", "COPY")
    assert len(samples) == 4 and all(float(distance) > 1 and not copy for _, _, distance, copy in samples)


@pytest.mark.slow
def test_visualize_recon(show, made, tmp_path):
    shown = show("visualize_recon")
    assert len(shown.pictures) == 5
    from_mean, from_sample, better, n = shown.numbers(r"mean #, from a sample #; the sample is better in # of #")[0]
    assert 0 <= better <= n == 16 and 0 < from_sample < 1.5 * from_mean
    with runtime.start("cpu", "fp32", 0) as rt:
        opened = study.Study(made, tmp_path, rt)
        rows = opened.rows("test")
        rows = [row for label in (0, 1) for row in [r for r in rows if r.label == label][:8]]
        expected = [np.square(opened.through_vae(row) - opened.volumes.load(row)).mean() for row in rows]
    assert from_mean == pytest.approx(np.mean(expected), rel=1e-3)
    table = shown.numbers(r"(?m)^(?:whole volume|\w+) +# +# +# +#$")
    assert len(table) > 10 and (table > 0).all()
    np.testing.assert_allclose(table[:, 1] / table[:, 0], table[:, 2], rtol=0.05)
    assert table[0, 3] < 0.3 and "hippocampus_left" in shown.text  # the whole volume: most of its variance is kept


@pytest.mark.slow
def test_visualize_latent(show, made):
    shown = show("visualize_latent")
    assert len(shown.pictures) == 8
    parts = shown.numbers("shared #, people #, noise # of its variance")
    assert len(parts) == 8
    np.testing.assert_allclose(parts.sum(1), 1, atol=0.002)
    way = shown.numbers("distance of the prediction #")[:, 0]
    assert len(way) == 5 and (np.diff(way) < 0).all() and way[-1] == 0

    hc, tle = shown.row("sampled HC"), shown.row("sampled TLE")
    assert hc[0] == tle[0]  # scale 0: the label has no say
    gap = hc - tle
    assert gap[1] > 0 and (np.diff(gap) > 0).all()  # TLE samples have smaller hippocampi, and more so if guided
    assert shown.row("reconstructed HC")[0] > shown.row("reconstructed TLE")[0]

    n = len(list((made / "synthetic_data").glob("*/*.nii.gz")))
    copies = shown.numbers("(?:samples|two planted): # copies among #")
    np.testing.assert_array_equal(copies, [[0, n], [2, n + 2]])
    first, last = shown.row("distance to the first"), shown.row("distance to the last")
    assert first[0] == last[-1] == 0 and (np.diff(first) > 0).all() and (np.diff(last) < 0).all()
