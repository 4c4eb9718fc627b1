"""scripts/compare.py: picture and page of two volumes on one grid; other grids are refused or resampled."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from common import figures, nifti
from common.cli import UserError
from ldae import dataset
from ldae.scripts import compare
from tests.helpers import run_main, run_script


@pytest.fixture(scope="module")
def pair(cohort):
    rows = dataset.read_table(cohort / "data/dataset.csv")
    return rows[0].path, rows[2].path


def page_data(path):
    return json.loads(re.search(r"const data = (.*);\n", path.read_text()).group(1))


def decoded(panel, shape):
    """(D, H, W) values of a panel's pictures."""
    parts = [np.asarray(Image.open(io.BytesIO(base64.b64decode(t.split(",")[1])))) for t in panel["tiles"]]
    return panel["low"] + np.concatenate(parts).reshape(shape) / 255 * (panel["high"] - panel["low"])


def test_page_holds_both_volumes_and_their_difference(pair, tmp_path):
    out = tmp_path / "month"
    done = run_script(["ldae/scripts/compare.py", *map(str, pair), "--out", str(out), "--names", "month 0", "<12>"])
    assert done.returncode == 0, done.stderr
    first, second = (nifti.load(path) for path in pair)
    rmse = np.sqrt(((second.data - first.data) ** 2).mean())
    assert f"RMSE {rmse:.4g}" in done.stdout
    text, data = (tmp_path / "month.html").read_text(), page_data(tmp_path / "month.html")
    assert "<title>month 0 and &lt;12&gt;</title>" in text and f"RMSE {rmse:.4g}" in text
    assert not re.search(r"(src|href)=|https?:", text)  # self-contained
    assert data["shape"] == list(first.shape) and data["spacing"] == [12, 12, 12]
    np.testing.assert_allclose(data["affine"], first.affine)
    low, high = data["panels"][0]["low"], data["panels"][0]["high"]
    step = (high - low) / 255
    for panel, volume in zip(data["panels"], (first, second), strict=False):
        np.testing.assert_allclose(decoded(panel, first.shape), volume.data.clip(low, high), atol=0.51 * step)
    limit = data["panels"][2]["high"]
    difference = (second.data - first.data).clip(-limit, limit)
    np.testing.assert_allclose(decoded(data["panels"][2], first.shape), difference, atol=0.51 * limit / 127.5)
    with Image.open(tmp_path / "month.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_page_draws_the_planes_as_the_figures_do(pair, tmp_path):
    """The script's pixel-to-voxel rule gives `figures.plane`: right on the left, superior and anterior up."""
    run_main(compare, *pair, "--out", tmp_path / "c")
    script = (tmp_path / "c.html").read_text().split("<script>")[1].split("</script>")[0]
    rule = script.split("async function bytes")[0]
    rule += re.search(r"function voxel.*?\n}\n", script, re.DOTALL).group(0)
    rule += re.search(r"const offset = .*;\n", script).group(0)
    rule = re.sub(r"const data = .*;\n", "", rule)
    shape = nifti.load(pair[0]).shape
    harness = f"""
        const controls = {{}}, data = {{shape: {list(shape)}}};
        const document = {{getElementById: id => controls[id] ??= {{value: "0"}}}};
        {rule}
        const out = [];
        for (const p of [0, 1, 2]) {{
          find("plane").value = `${{p}}`; find("slice").value = "5";
          const width = data.shape[across[p]], height = data.shape[down[p]], rows = [];
          for (let y = 0; y < height; y++) {{
            rows.push([]);
            for (let x = 0; x < width; x++) rows[y].push(offset(voxel(x, y)));
          }}
          out.push(rows);
        }}
        console.log(JSON.stringify(out));"""
    done = subprocess.run(["node", "-e", harness], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    index = np.arange(np.prod(shape)).reshape(shape)
    for shown, name in zip(json.loads(done.stdout), ("sagittal", "coronal", "axial"), strict=True):
        np.testing.assert_array_equal(shown, figures.plane(index, name, 5))


def test_other_grids_are_refused_or_resampled(pair, tmp_path):
    volume = nifti.load(pair[0])
    moved = volume.affine.copy()
    moved[0, 3] += 3
    nifti.save(tmp_path / "moved.nii.gz", volume.data, moved)
    nifti.save(tmp_path / "cropped.nii.gz", *(lambda v: (v.data, v.affine))(nifti.crop_or_pad(volume, (12, 20, 16))))
    with pytest.raises(UserError, match="different grids .affines 3 mm apart.*--resample"):
        run_main(compare, pair[0], tmp_path / "moved.nii.gz", "--out", tmp_path / "a")
    with pytest.raises(UserError, match=r"different grids \(shapes \(16, 20, 16\) and \(12, 20, 16\)\)"):
        run_main(compare, pair[0], tmp_path / "cropped.nii.gz", "--out", tmp_path / "a")
    assert not list(tmp_path.glob("a.*"))
    run_main(compare, pair[0], tmp_path / "cropped.nii.gz", "--out", tmp_path / "a", "--resample")
    data = page_data(tmp_path / "a.html")
    difference = decoded(data["panels"][2], volume.shape)
    assert np.abs(difference[2:14]).max() < 0.01 * volume.data.max()  # the part that is there is the same


def test_a_reoriented_copy_is_the_same_volume(pair, tmp_path, capsys):
    volume = nifti.load(pair[0])
    nifti.save(tmp_path / "las.nii.gz", *nifti.reorient(volume.data, volume.affine, "LAS"))
    run_main(compare, pair[0], tmp_path / "las.nii.gz", "--out", tmp_path / "same")
    assert "MAE 0, RMSE 0, largest difference 0, correlation 1" in capsys.readouterr().out


def test_refusals(pair, tmp_path):
    with pytest.raises(UserError, match="two volumes are needed"):
        run_main(compare, pair[0])
    (tmp_path / "c.html").write_text("mine")
    with pytest.raises(UserError, match="c.html is there already"):
        run_main(compare, *pair, "--out", tmp_path / "c")
    for options, message in (
        (("--names", "a"), "two titles"),
        (("--window", 2, 1), "lower value comes first"),
        (("--difference_window", -1), "--difference_window -1.0: give 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_main(compare, *pair, "--out", tmp_path / "d", *options)
    with pytest.raises(UserError, match="file not found"):
        run_main(compare, pair[0], tmp_path / "none.nii.gz", "--out", tmp_path / "d")
    assert (tmp_path / "c.html").read_text() == "mine" and not list(tmp_path.glob("d.*"))
