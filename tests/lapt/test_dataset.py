"""dataset.py and data_split.py: intensities and back, padding, items, augmentation, windows, splits without leaks."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import nifti, runtime
from common.cli import UserError
from lapt import data_split, dataset
from lapt.dataset import Augment, Intensity, Slices, Volumes
from tests.helpers import ROOT, run_main
from tests.lapt.conftest import N_CASES, SHAPE

STATS = {"dwi": {"low": 50.0, "high": 550.0, "mean": 260.0, "sd": 80.0},
         "adc": {"low": 300.0, "high": 2500.0, "mean": 950.0, "sd": 350.0}}  # fmt: skip


def make(normalisation="quantile", statistics="training", **more):
    return Intensity(**{"normalisation": normalisation, "statistics": statistics, "stats": STATS,
                        "ctp_window": (0, 200), "time_points": 15} | more)  # fmt: skip


def images(shape=(6, 5, 4)):
    rng = np.random.default_rng(0)
    dwi, adc = rng.uniform(0, 700, shape).astype(np.float32), rng.uniform(100, 3000, shape).astype(np.float32)
    return dwi, adc, rng.random(shape) < 0.7


# ---- intensities


@pytest.mark.parametrize("normalisation", dataset.NORMALISATIONS)
def test_normalise_and_back(normalisation):
    """Fact 8: background exactly -1 or 0; inside [-1, 1] or +-3; back to physical units where nothing was cut off."""
    dwi, adc, mask = images()
    intensity = make(normalisation)
    mri = intensity.normalise(dwi, adc, mask)
    assert mri.dtype == np.float32 and mri.shape == (2, 6, 5, 4)
    background = {"quantile": -1.0, "zscore": 0.0}[normalisation]
    assert intensity.background == background and (mri[:, ~mask] == background).all()
    low, high = intensity.bounds
    assert low <= mri.min() and mri.max() <= high
    for back in (intensity.denormalise(mri), intensity.denormalise(torch.from_numpy(mri))):
        for got, image, s in zip(back, (dwi, adc), STATS.values(), strict=True):
            kept = {"quantile": (s["low"], s["high"]),
                    "zscore": (s["mean"] - 3 * s["sd"], s["mean"] + 3 * s["sd"])}[normalisation]  # fmt: skip
            np.testing.assert_allclose(np.asarray(got)[mask], np.clip(image, *kept)[mask].clip(0), rtol=1e-5, atol=1e-3)
            assert got.dtype in (np.float32, torch.float32) and got.min() >= 0


def test_normalise_by_hand():
    dwi, adc, mask = np.array([50.0, 300.0, 999.0]), np.array([1400.0, 300.0, 0.0]), np.array([1, 1, 1])
    mri = make().normalise(dwi, adc, mask)
    np.testing.assert_allclose(mri, [[-1, 0, 1], [0, -1, -1]], atol=1e-6)
    mri = make("zscore").normalise(dwi, adc, mask)
    np.testing.assert_allclose(mri, [[-2.625, 0.5, 3], [450 / 350, -650 / 350, -950 / 350]], rtol=1e-5)


@pytest.mark.parametrize("normalisation", dataset.NORMALISATIONS)
@pytest.mark.parametrize("number", [float, np.float64, np.array])
def test_input_is_float32_at_any_numpy(normalisation, number):
    """Fact 10: NumPy 1 promotes float64 arrays, NumPy 2 float64 scalars too; neither reaches a network."""
    stats = {name: {key: number(value) for key, value in s.items()} for name, s in STATS.items()}
    intensity = make(normalisation, "case", stats=stats, ctp_window=(number(0), number(200)))
    dwi, adc, mask = (image.astype(np.float64) for image in images())
    mri, ctp = intensity.normalise(dwi, adc, mask, stats), intensity.normalise_ctp(dwi[None], mask)
    assert mri.dtype == ctp.dtype == np.float32
    np.testing.assert_array_equal(mri, make(normalisation).normalise(*images()))
    assert dataset._tensors({"mri": mri.astype(np.float64)}, intensity, lambda x, _: x)["mri"].dtype == torch.float32


def test_ctp_window():
    """Fact 8: CTP in [-1, 1], background exactly -1; the window is a setting."""
    ctp, mask = np.array([[-900.0, 0, 50, 200, 1000, 50]]), np.array([1, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(make().normalise_ctp(ctp, mask), [[-1, -1, -0.5, 1, 1, -1]])
    np.testing.assert_allclose(make(ctp_window=(0, 100)).normalise_ctp(ctp, mask), [[-1, -1, 0, 1, 1, -1]])
    assert make().normalise_ctp(ctp, mask).dtype == np.float32


def test_statistics_of_the_case_or_of_the_training_set():
    dwi, adc, mask = images()
    own = {name: dict(s, low=s["low"] + 100) for name, s in STATS.items()}
    by_case, by_training = make(statistics="case"), make()
    np.testing.assert_array_equal(by_training.normalise(dwi, adc, mask, own), by_training.normalise(dwi, adc, mask))
    assert np.abs(by_case.normalise(dwi, adc, mask, own) - by_training.normalise(dwi, adc, mask)).max() > 0.01
    with pytest.raises(ValueError, match="statistics of the case"):
        by_case.normalise(dwi, adc, mask)
    zeros = np.zeros((2, 3), np.float32)  # a prediction has no image of its own: units of the training set
    np.testing.assert_allclose(by_case.denormalise(zeros)[0], 300.0)
    np.testing.assert_allclose(by_case.denormalise(zeros, own)[0], 350.0)


def test_intensity_as_plain_values():
    intensity = make("zscore", "case", split_hash="abc")
    again = Intensity.from_dict(json.loads(json.dumps(intensity.to_dict())))
    assert again == intensity and intensity.range("adc") == 2200
    for spoil, message in ((lambda d: d.pop("stats"), "missing or unknown entries: stats"),
                           (lambda d: d.update(normalisation="minmax"), "'minmax' is not one of"),
                           (lambda d: d.update(ctp_window=[5, 5]), "CTP window"),
                           (lambda d: d["stats"].pop("adc"), "no training statistics of adc")):  # fmt: skip
        values = intensity.to_dict()
        spoil(values)
        with pytest.raises(UserError, match=message):
            Intensity.from_dict(values)


# ---- padding


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_pad_and_unpad(kind):
    """Fact 4: sizes that are no multiple are padded with the background, and un-padded exactly."""
    array = np.arange(2 * 19 * 33, dtype=np.float32).reshape(2, 19, 33)
    array = torch.from_numpy(array) if kind == "tensor" else array
    padded = dataset.pad_to_multiple(array, 16, -1.0)
    assert tuple(padded.shape) == (2, 32, 48) and type(padded) is type(array)
    assert float(padded[:, :6].max()) == -1 and float(padded[0, 6, 7]) == 0 and float(padded[:, -7:].max()) == -1
    assert bool((dataset.unpad(padded, (19, 33)) == array).all())
    assert dataset.pad_to_multiple(array, 1, -1.0).shape == array.shape
    with pytest.raises(ValueError, match="does not fit"):
        dataset.pad_to(array, (16, 48), 0)
    with pytest.raises(ValueError, match="larger"):
        dataset.unpad(array, (20, 33))


def test_extract():
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(dataset.extract(array, (1, 1), (2, 2), -5), array[:, 1:3, 1:3])
    out = dataset.extract(array, (-1, 2), (5, 4), -5)
    assert out.shape == (2, 5, 4) and (out[:, 0] == -5).all() and (out[:, :, 2:] == -5).all()
    np.testing.assert_array_equal(out[:, 1:4, :2], array[:, :, 2:])
    np.testing.assert_array_equal(dataset.extract(out, (1, -2), (3, 4), 0)[..., 2:], array[..., 2:])
    assert (dataset.extract(array, (9, 9), (2, 2), 7) == 7).all()


# ---- items


def test_slice_items(prepared, cohort, intensity):
    """Fact 8 and 10: keys, shapes and float32 of slice items; values are those of the raw files."""
    data = Slices(prepared, "test", intensity, multiple=32)
    assert data.size == (64, 64) and len(data) == sum(len(case.slices) for case in data.cases)
    names = [(item["case"], item["slice"]) for item in map(data.__getitem__, range(len(data)))]
    assert names == sorted(names) and len(set(names)) == len(data)
    case, z = data.index[3]
    item = data[3]
    assert item["case"] == case.name and item["slice"] == z
    assert {k: tuple(v.shape) for k, v in item.items() if torch.is_tensor(v)} == {
        "mri": (2, 64, 64), "ctp": (15, 64, 64), "mask": (1, 64, 64), "lesion": (1, 64, 64)}  # fmt: skip
    assert all(v.dtype == torch.float32 for v in item.values() if torch.is_tensor(v))
    folder = cohort / "raw" / case.name
    raw = {w: nifti.load(folder / f"{w}.nii.gz").data[..., z] for w in ("dwi", "adc", "mask", "lesion")}
    ctp = nifti.load(folder / "ctp.nii.gz", series=True).data[..., z]
    inside = raw["mask"] > 0
    for name in ("mask", "lesion"):
        np.testing.assert_array_equal(dataset.unpad(item[name], SHAPE[:2])[0], raw[name])
    dwi, adc = intensity.denormalise(dataset.unpad(item["mri"], SHAPE[:2]))
    low, high = intensity.stats["dwi"]["low"], intensity.stats["dwi"]["high"]
    np.testing.assert_allclose(dwi[inside], raw["dwi"].clip(low, high)[inside], rtol=1e-4)
    low, high = intensity.stats["adc"]["low"], intensity.stats["adc"]["high"]
    np.testing.assert_allclose(adc[inside], raw["adc"].clip(low, high)[inside], rtol=1e-4)
    np.testing.assert_allclose(dataset.unpad(item["ctp"], SHAPE[:2])[:, inside],
                               ctp.clip(0, 200)[:, inside] / 100 - 1, atol=1e-6)  # fmt: skip
    outside = item["mask"][0] == 0
    assert (item["mri"][:, outside] == -1).all() and (item["ctp"][:, outside] == -1).all()
    assert "ctp" not in Slices(prepared, "test", intensity, with_ctp=False)[0]


def test_volume_items(prepared, intensity):
    """A volume item stacks its slice items; padded in all directions; `start` puts it back."""
    slices, volumes = Slices(prepared, "val", intensity), Volumes(prepared, "val", intensity, size=(64, 56, 12))
    item, case = volumes[0], volumes.cases[0]
    assert item["mri"].shape == (2, 64, 56, 12) and item["ctp"].shape == (15, 64, 56, 12)
    assert item["start"].tolist() == [-8, -4, -2]
    back = dataset.extract(item["mri"].numpy(), (-item["start"]).tolist(), case.shape, 0)
    for (other, z), own in zip(slices.index, (slices[i] for i in range(len(slices))), strict=True):
        if other.name == case.name:
            np.testing.assert_array_equal(back[..., z], own["mri"])
    assert volumes[0]["case"] == case.name and Volumes(prepared, "val", intensity, multiple=32).size == (64, 64, 8)


def test_a_larger_volume_is_taken_about_the_brain_never_cutting_it(prepared, intensity):
    item = Volumes(prepared, "val", intensity, size=(40, 44, 8))[0]
    case = dataset.read_cases(prepared, "val")[0]
    assert item["mask"].sum() == case.volume("mask").sum() and (item["start"][:2] > 0).all()
    with pytest.raises(UserError, match=r"its brain is \d+ voxels along y, the size there is 16"):
        Volumes(prepared, "val", intensity, size=(48, 16, 8))


def test_windows_of_volumes(prepared, intensity):
    data = Volumes(prepared, "train", intensity, window=4, with_ctp=False)
    with_lesion = [i for i, case in enumerate(data.cases) if case.lesion_ml]
    free = [i for i, case in enumerate(data.cases) if not case.lesion_ml]
    fixed = data[with_lesion[0]]
    whole = Volumes(prepared, "train", intensity, with_ctp=False)[with_lesion[0]]
    assert fixed["mri"].shape == (2, 48, 48, 4)
    per_slice = whole["lesion"].sum((0, 1, 2))
    assert fixed["lesion"].sum() == max(per_slice[i : i + 4].sum() for i in range(5))  # validation: most lesion
    starts = set()
    for position in range(30):
        item = data[(with_lesion[0], position)]
        z = int(item["start"][2])
        starts.add(z)
        np.testing.assert_array_equal(item["mri"], whole["mri"][..., z : z + 4])
    assert len(starts) > 1 and all(data[(free[0], p)]["lesion"].sum() == 0 for p in range(3))


def test_window_starts():
    """Centred windows reach every lesion slice, also the last ones; the original's rule does not."""
    assert dataset.window_starts([3, 31], 32, 8) == [0, 24] and dataset.window_starts([16], 32, 8) == [12]
    assert dataset.window_starts([], 32, 8) == list(range(25))
    for lesion in ([0], [31], [13], list(range(25, 32))):
        assert all(any(s <= z < s + 8 for s in dataset.window_starts(lesion, 32, 8)) for z in lesion)
    assert dataset.window_starts([25, 31], 32, 8, "upstream") == list(range(25))
    assert dataset.window_starts([3, 24, 30], 32, 8, "upstream") == [3, 24]
    with pytest.raises(UserError, match="not one of centred, upstream"):
        dataset.window_starts([], 32, 8, "random")


# ---- augmentation


def test_augmentation_depends_on_the_position_alone(prepared, intensity):
    data = Slices(prepared, "train", intensity, augment="plausible", seed=3)
    a, b, other = data[(2, 10)], data[(2, 10)], data[(2, 11)]
    plain = data[2]
    for name in ("mri", "ctp", "mask", "lesion"):
        assert torch.equal(a[name], b[name]) and a[name].dtype == torch.float32 and a[name].shape == plain[name].shape
    assert not torch.equal(a["mri"], other["mri"]) and not torch.equal(a["mri"], plain["mri"])
    assert not torch.equal(Slices(prepared, "train", intensity, augment="plausible", seed=4)[(2, 10)]["mri"], a["mri"])
    with pytest.raises(UserError, match="'heavy' is not one of"):
        Slices(prepared, "train", intensity, augment="heavy")


@pytest.mark.parametrize("name", ["plausible", "strong", "upstream"])
def test_augmented_background_stays_background(prepared, intensity, name):
    """Outside the moved mask everything is exactly the modality's minimum: no raw values smeared in from the border."""
    data = Slices(prepared, "train", intensity, augment=name)
    for position in range(6):
        item = data[(position, position)]
        outside = item["mask"][0] == 0
        assert (item["mri"][:, outside] == -1).all() and (item["ctp"][:, outside] == -1).all()
        assert set(item["mask"].unique().tolist()) <= {0, 1} and item["mri"].min() >= -1 and item["mri"].max() <= 1
        assert 0.5 < item["mask"].sum() / data[position]["mask"].sum() < 1.5
        assert (item["lesion"] <= item["mask"]).all()


def blob(nd, shape, place):
    item = {"mask": torch.ones(1, *shape), "lesion": torch.zeros(1, *shape), "mri": torch.zeros(2, *shape) - 1}
    item["lesion"][(0, *place)] = 1
    item["mri"][(slice(None), *place)] = 1
    return item


def test_flips_and_turns_by_hand():
    """Left-right by default only; a quarter turn of isotropic slices; a shift by a share of the length."""
    intensity, still = make(), dict(flip_x=0.0, affine=0.0)
    item = blob(2, (9, 7), (1, 2))
    for options, place in (({"flip_x": 1.0}, (7, 2)), ({"flip_y": 1.0}, (1, 4)),
                           ({"affine": 1.0, "rotate": (0, 0, 0), "zoom": (0, 0, 0), "translate": (0, 0, 0)}, (1, 2)),
                           ):  # fmt: skip
        moved = Augment(**(still | options))(item, intensity, (1, 1, 1), runtime.generator(0))
        assert moved["lesion"].sum() == 1 and moved["lesion"][(0, *place)] == 1
        assert moved["mri"][(0, *place)] == pytest.approx(1) and moved["mri"][0].sum() == pytest.approx(-61)
    assert Augment().flip_y == Augment().flip_z == 0  # nobody lies on the face or on the head

    # theta maps output to input positions in mm: with turns the length in mm is kept, whatever the voxels
    augment = Augment(rotate=(0.0, 0.0, math.pi / 2), zoom=(0, 0, 0), translate=(0, 0, 0))
    theta = augment._theta([1.0] * 9, (10, 20), (2.0, 1.0, 5.0))  # u = 1: the full angle
    corner_mm = torch.tensor([10.0, 0.0])  # x half-length 10 mm, y 10 mm
    moved = theta[:, :2] @ (corner_mm / 10).flip(0)  # affine_grid: last axis first
    np.testing.assert_allclose((moved.flip(0) * 10).norm(), 10.0, rtol=1e-6)
    np.testing.assert_allclose(moved.flip(0).abs() * 10, [0, 10], atol=1e-5)
    shift = Augment(rotate=(0, 0, 0), zoom=(0, 0, 0), translate=(0.1, 0.0, 0.0))
    theta = shift._theta([1.0] * 9, (10, 20), (2.0, 1.0, 5.0))
    np.testing.assert_allclose(theta, [[1, 0, 0], [0, 1, 0.2]])  # a tenth of x: its normalised length is 2
    volume = Augment(rotate=(0.3, 0.2, 0.1), zoom=(0, 0, 0), translate=(0, 0, 0))
    half_mm = np.array([96.0, 112.0, 64.0])
    theta = volume._theta([1.0] * 9, (192, 224, 32), (1.0, 1.0, 4.0)).numpy()[::-1, 2::-1]
    turn = half_mm[:, None] * theta / half_mm
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)


def test_volume_augmentation(prepared, intensity):
    item = Volumes(prepared, "train", intensity, augment="strong", with_ctp=False)[(0, 5)]
    assert item["mri"].shape == (2, *SHAPE) and (item["mri"][:, item["mask"][0] == 0] == -1).all()


def test_batches_are_the_same_with_workers(prepared, intensity):
    """The trainers' stream: items depend on the step alone, not on workers."""
    data = Slices(prepared, "train", intensity, augment="plausible")
    rt = runtime.Runtime(torch.device("cpu"))
    streams = [runtime.training_batches(data, 4, 2, 0, rt, workers) for workers in (0, 1)]
    for _ in range(2):
        a, b = (next(stream) for stream in streams)
        assert torch.equal(a["mri"], b["mri"]) and torch.equal(a["ctp"], b["ctp"]) and a["case"] == b["case"]
    assert a["mri"].shape == (4, 2, 48, 48) and a["lesion"].shape == (4, 1, 48, 48)


# ---- splits


def test_split_is_proportional_and_independent_of_order():
    strata = {f"p{i:03d}": "free" if i % 5 == 0 else "lesion" for i in range(100)}
    split = data_split.make(strata, 0.1, 0.2, 42)
    sizes = {name: len(split.patients[name]) for name in data_split.SPLITS}
    assert sizes == {"train": 70, "val": 10, "test": 20}
    for name, n in (("val", 2), ("test", 4)):
        assert sum(strata[p] == "free" for p in split.patients[name]) == n
    backwards = data_split.make(dict(reversed(strata.items())), 0.1, 0.2, 42)
    assert backwards == split and split.hash == backwards.hash
    assert data_split.make(strata, 0.1, 0.2, 43).hash != split.hash
    everyone = [p for name in data_split.SPLITS for p in split.patients[name]]
    assert sorted(everyone) == sorted(strata)
    tiny = data_split.make({"a": "lesion", "b": "lesion", "c": "free", "d": "ct_only"}, 0.1, 0.1, 0)
    assert sorted(len(tiny.patients[name]) for name in data_split.LISTS) == [1, 1, 1, 1]
    assert tiny.patients["ct_only"] == ("d",)
    with pytest.raises(UserError, match="2 patients .* too few"):
        data_split.make({"a": "lesion", "b": "lesion"}, 0.1, 0.1, 0)
    for shares in ((0.5, 0.5), (0.0, 0.1), (0.1, 1.0)):
        with pytest.raises(UserError, match="shares above 0, together below 1"):
            data_split.make(strata, *shares, 0)


def test_prepared_splits(prepared):
    split = data_split.read(prepared)
    assert [len(split.patients[name]) for name in data_split.SPLITS] == [9, 2, 3]
    found = [case.name for name in data_split.SPLITS for case in dataset.read_cases(prepared, name)]
    assert sorted(found) == [case.name for case in dataset.read_cases(prepared)] and len(found) == N_CASES


def edit(folder, name, change):
    path = folder / "splits" / f"{name}_list.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_leaks_and_edited_lists_are_refused(prepared, tmp_path):
    """Fact 9: patient overlap between splits is refused; edited lists need new statistics."""
    folder = shutil.copytree(prepared, tmp_path / "prepared")
    moved = json.loads((folder / "splits/test_list.json").read_text())[0]
    edit(folder, "train", lambda patients: patients.append(moved))
    with pytest.raises(UserError, match=rf"listed twice, such as {moved} \(train, test\)"):
        dataset.read_cases(folder, "train")
    edit(folder, "test", lambda patients: patients.remove(moved))
    with pytest.raises(UserError, match="data_split.py --data .* --keep_lists"):
        Intensity.of_folder(folder)
    before = json.loads((folder / "statistics.json").read_text())
    run_main(data_split, "--data", folder, "--keep_lists")
    after = dataset.read_statistics(folder)
    assert after["train_cases"] == 10 and after["split_hash"] != before["split_hash"]
    assert after["dwi"]["mean"] != before["dwi"]["mean"]
    edit(folder, "val", lambda patients: patients.pop())
    with pytest.raises(UserError, match="is in no list"):
        dataset.read_cases(folder)
    with pytest.raises(UserError, match="add --overwrite"):
        run_main(data_split, "--data", folder)
    run_main(data_split, "--data", folder, "--val_size", 0.15, "--test_size", 0.2, "--overwrite")
    again = json.loads((folder / "statistics.json").read_text())
    assert again == before  # the same split as at first, the same statistics


def test_damaged_folders(prepared, tmp_path, intensity):
    with pytest.raises(UserError, match="is no prepared folder"):
        dataset.read_cases(tmp_path)
    folder = shutil.copytree(prepared, tmp_path / "prepared")
    case = dataset.read_cases(folder, "val")[0]
    (case.folder / "dwi.npy").write_bytes((case.folder / "dwi.npy").read_bytes()[:500])
    with pytest.raises(UserError, match=rf"{case.name}: .*dwi.npy is missing or damaged"):
        Slices(folder, "val", intensity)[0]
    (case.folder / "case.json").write_text("{")
    with pytest.raises(UserError, match="no usable case.json"):
        Slices(folder, "val", intensity)
    with pytest.raises(UserError, match="15 CTP time points, 14 are needed"):
        Slices(prepared, "val", make(time_points=14))
    with pytest.raises(UserError, match="slices of 48 x 48 pixels do not fit the size 32 x 64"):
        Slices(prepared, "val", intensity, size=(32, 64))


def test_help_needs_no_torch():
    for script in ("lapt/data_split.py", "lapt/preprocessing.py", "lapt/isles.py", "lapt/make_phantom.py"):
        code = f"""import runpy, sys; sys.argv = ['x', '--help']
try: runpy.run_path({script!r}, run_name='__main__')
except SystemExit: assert not {{'torch', 'scipy', 'nibabel'}} & set(sys.modules)"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
