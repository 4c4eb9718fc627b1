"""preprocessing.py and raw.py: what is written, whatever the workers; grids, time points, masks, tables, CT alone."""

import csv
import json
import shutil

import numpy as np
import pytest

from common import nifti
from common.cli import UserError
from lapt import data_split, dataset, preprocessing, raw
from lapt.raw import Rules, Source
from tests.helpers import run_main, run_script
from tests.lapt.conftest import N_CASES, SHAPE


def prepare(source, folder, *more):
    run_main(preprocessing, "--input_dir", source, "--output_dir", folder, "--num_workers", 1, *more)
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def records(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def load(folder, what):
    return nifti.load(folder / f"{what}.nii.gz", series=what == "ctp").data


@pytest.fixture
def raw_case(cohort):
    folder = cohort / "raw" / "case_0001"
    return Source("case_0001", "case_0001", {what: folder / f"{what}.nii.gz" for what in raw.IMAGES})


# ---- what is written


def test_prepared_folder(cohort, prepared):
    """Fact 8: float32 and uint8, slice axis first, raw values; retained slices and quantiles of every case."""
    index = json.loads((prepared / "CTPDWI_slice_idx.json").read_text())
    rows = records(prepared / "manifest.csv")
    assert list(index) == [row["case"] for row in rows] == [f"case_{n:04d}" for n in range(1, N_CASES + 1)]
    for row in rows:
        folder, known = prepared / "cases" / row["case"], dataset.read_case(prepared / "cases" / row["case"])
        arrays = {what: np.load(folder / f"{what}.npy") for what in raw.IMAGES}
        assert {what: (a.dtype, a.shape) for what, a in arrays.items()} == {
            "ctp": (np.float32, (8, 15, 48, 48)), "dwi": (np.float32, (8, 48, 48)), "adc": (np.float32, (8, 48, 48)),
            "mask": (np.uint8, (8, 48, 48)), "lesion": (np.uint8, (8, 48, 48))}  # fmt: skip
        assert all(a.flags["C_CONTIGUOUS"] for a in arrays.values())
        source = cohort / "raw" / row["case"]
        for what in raw.IMAGES:
            np.testing.assert_array_equal(known.volume(what), load(source, what))
        np.testing.assert_array_equal(known.affine, nifti.header(source / "dwi.nii.gz")[1])
        brain = arrays["mask"] > 0
        assert index[row["case"]] == {"slice_idx": list(known.slices), "n": len(known.slices)}
        assert list(known.slices) == [z for z in range(8) if brain[z].sum() * 16 >= 200]
        for what in ("dwi", "adc"):
            values = arrays[what][brain].astype(np.float64)
            stats = [*np.quantile(values, [0.005, 0.995]), values.mean(), values.std(), len(values)]
            np.testing.assert_allclose([known.stats[what][k] for k in ("low", "high", "mean", "sd", "n")], stats)
        assert known.lesion_ml == pytest.approx((arrays["lesion"] > 0).sum() * 0.256)
        assert float(row["brain_ml"]) == pytest.approx(brain.sum() * 0.256, rel=1e-5)
        assert row["split"] == data_split.read(prepared).of(row["patient"])


def test_statistics_are_of_the_training_set_alone(prepared):
    """Pooled over all brain voxels of all training cases; neither validation nor test enters."""
    known = json.loads((prepared / "statistics.json").read_text())
    cases = dataset.read_cases(prepared, "train")
    assert known["train_cases"] == len(cases) == 9 and known["split_hash"] == data_split.read(prepared).hash
    assert (known["time_points"], known["ctp_window"], known["shape"]) == (15, [0, 200], list(SHAPE))
    for what in ("dwi", "adc"):
        values = np.concatenate([c.volume(what)[c.volume("mask") > 0] for c in cases]).astype(np.float64)
        assert known[what]["n"] == len(values)
        np.testing.assert_allclose([known[what]["mean"], known[what]["sd"]], [values.mean(), values.std()])
        low, high = np.quantile(values, [0.005, 0.995])
        assert abs(known[what]["low"] - low) < 1 and abs(known[what]["high"] - high) < 1  # values are whole numbers
        whole = np.concatenate([c.volume(what)[c.volume("mask") > 0] for c in dataset.read_cases(prepared)])
        assert abs(whole.mean() - known[what]["mean"]) > 1e-6


def test_same_bytes_again_and_with_spawned_processes(cohort, prepared, tmp_path):
    """Fact 8: identical output on a second run and with two spawned processes, as a user starts it."""
    done = run_script(["lapt/preprocessing.py", "--input_dir", cohort / "raw", "--output_dir", tmp_path / "again",
                       "--val_size", 0.15, "--test_size", 0.2, "--num_workers", 2], cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "14 cases" in done.stdout and "9 train, 2 val, 3 test patients" in done.stdout
    assert contents(tmp_path / "again") == contents(prepared)


def test_harmless_variants_give_the_same_numbers(raw_cases, cohort, tmp_path):
    """LAS orientation, a header that scales, ADC in mm^2/s: the prepared arrays do not change."""
    from lapt import make_phantom

    plain = prepare(raw_cases, tmp_path / "plain")
    for case, defect in zip(sorted(raw_cases.iterdir()), make_phantom.HARMLESS, strict=True):
        make_phantom._spoil(case, defect)
    other = prepare(raw_cases, tmp_path / "other")
    for name in ("case_0001", "case_0002", "case_0003"):
        for path in sorted((plain / "cases" / name).glob("*.npy")):
            np.testing.assert_allclose(np.load(path), np.load(other / "cases" / name / path.name), rtol=1e-6)
        a, b = (dataset.read_case(folder / "cases" / name) for folder in (plain, other))
        np.testing.assert_array_equal(a.affine, b.affine)


def test_check_only_writes_nothing(cohort, tmp_path, capsys):
    prepare(cohort / "raw", tmp_path / "out", "--check_only")
    assert not (tmp_path / "out").exists() and "14 cases" in capsys.readouterr().out


def test_nothing_is_replaced_without_being_asked(raw_cases, tmp_path):
    folder = prepare(raw_cases, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(UserError, match="already holds cases; .*--overwrite"):
        prepare(raw_cases, folder)
    (raw_cases / "case_0002/ctp.nii.gz").unlink()
    with pytest.raises(UserError, match="case_0002"):
        prepare(raw_cases, folder, "--overwrite")
    assert contents(folder) == before  # a failed run leaves what was there, and nothing of its own
    shutil.rmtree(raw_cases / "case_0002")
    prepare(raw_cases, folder, "--overwrite", "--one_split", "train")
    assert sorted(p.name for p in (folder / "cases").iterdir()) == ["case_0001", "case_0003"]
    assert data_split.read(folder).patients["train"] == ("case_0001", "case_0003")


def test_bad_cases_can_be_left_out(cohort, raw_cases, tmp_path, capsys):
    shutil.copytree(cohort / "raw/case_0004", raw_cases / "case_0004")
    (raw_cases / "case_0002/adc.nii.gz").unlink()
    folder = prepare(raw_cases, tmp_path / "out", "--skip_bad")
    assert sorted(p.name for p in (folder / "cases").iterdir()) == ["case_0001", "case_0003", "case_0004"]
    report = records(folder / "report.csv")
    assert [row["case"] for row in report] == ["case_0002"] and "no adc" in report[0]["problem"]
    printed = capsys.readouterr()
    assert "1 cases left out" in printed.out and "case_0002: no adc in" in printed.err


# ---- CT alone, lesion-free, tables and layouts


def test_ct_only_and_lesion_free_cases(cohort, raw_cases, tmp_path, capsys):
    """Without DWI and ADC: only to be predicted; without lesion file: free of lesions."""
    for number in (4, 5):
        shutil.copytree(cohort / f"raw/case_000{number}", raw_cases / f"case_000{number}")
    for what in ("dwi", "adc", "lesion"):
        (raw_cases / f"case_0002/{what}.nii.gz").unlink()
    (raw_cases / "case_0003/lesion.nii.gz").unlink()
    folder = prepare(raw_cases, tmp_path / "out")
    out = capsys.readouterr().out
    assert "1 cases without DWI and ADC" in out and "1 cases without lesion file" in out
    (alone,) = dataset.read_cases(folder, "ct_only")
    assert alone.name == "case_0002" and not alone.has_mri and alone.lesion_ml is None
    assert "case_0002" not in [c.name for s in data_split.SPLITS for c in dataset.read_cases(folder, s)]
    intensity = dataset.Intensity.of_folder(folder)
    item = dataset.Slices(folder, "ct_only", intensity)[0]
    assert "mri" not in item and item["ctp"].shape == (15, 48, 48) and item["lesion"].sum() == 0
    assert dataset.Volumes(folder, "ct_only", intensity)[0]["ctp"].shape == (15, 48, 48, 8)
    free = dataset.read_case(folder / "cases/case_0003")
    assert free.lesion_ml == 0 and free.volume("lesion").sum() == 0


def test_a_ct_without_contrast_is_a_series_of_one(raw_cases, tmp_path):
    for case in raw_cases.iterdir():
        ctp = nifti.load(case / "ctp.nii.gz", series=True)
        nifti.save(case / "ctp.nii.gz", ctp.data[0], ctp.affine)
    folder = prepare(raw_cases, tmp_path / "out")
    intensity = dataset.Intensity.of_folder(folder)
    assert intensity.time_points == 1
    assert dataset.Slices(folder, "train", intensity)[0]["ctp"].shape == (1, 48, 48)


def test_layout_of_the_volume_release(raw_cases, tmp_path):
    """<patient>/<date>/<series> with ctp_mask.nii.gz; the patient is the first part, its studies stay together."""
    places = {"case_0001": "p_1/2020-01-01/s1", "case_0002": "p_1/2021-01-01/s1", "case_0003": "p_2/2020-01-01/s1"}
    for case, place in places.items():
        shutil.copytree(raw_cases / case, tmp_path / "nifti" / place)
        (tmp_path / "nifti" / place / "mask.nii.gz").rename(tmp_path / "nifti" / place / "ctp_mask.nii.gz")
    sources = raw.find(tmp_path / "nifti")
    assert [(s.name, s.patient) for s in sources] == [
        ("p_1__2020-01-01__s1", "p_1"), ("p_1__2021-01-01__s1", "p_1"), ("p_2__2020-01-01__s1", "p_2")]  # fmt: skip
    assert all(set(s.files) == set(sources[0].files) for s in sources)
    folder = prepare(tmp_path / "nifti", tmp_path / "out", "--one_split", "test")
    assert len(dataset.read_cases(folder, "test")) == 3 and data_split.read(folder).patients["test"] == ("p_1", "p_2")
    with pytest.raises(UserError, match="no training statistics"):
        dataset.Intensity.of_folder(folder)


def test_table_of_cases_and_given_lists(raw_cases, tmp_path):
    rows = [f"c{n},p{n},raw/case_000{n}/ctp.nii.gz,raw/case_000{n}/mask.nii.gz,{raw_cases}/case_000{n}/dwi.nii.gz,"
            f"raw/case_000{n}/adc.nii.gz," for n in (3, 1, 2)]  # fmt: skip
    (tmp_path / "cases.csv").write_text("\n".join(["case,patient,ctp,mask,dwi,adc,lesion", *rows]) + "\n")
    (tmp_path / "lists/splits").mkdir(parents=True)
    for name, patients in {"train": ["p1"], "val": ["p2"], "test": ["p3"]}.items():
        (tmp_path / f"lists/splits/{name}_list.json").write_text(json.dumps(patients))
    run_main(preprocessing, "--cases", tmp_path / "cases.csv", "--output_dir", tmp_path / "out", "--num_workers", 1,
             "--splits", tmp_path / "lists/splits")  # fmt: skip
    assert [c.name for c in dataset.read_cases(tmp_path / "out")] == ["c1", "c2", "c3"]
    assert [c.patient for c in dataset.read_cases(tmp_path / "out", "val")] == ["p2"]


# ---- slices, time, grids, masks


def study(mask, ctp=None, dwi=None, adc=None, spacing=(2.0, 2.0, 5.0)):
    ctp = np.ones((3, *mask.shape), np.float32) if ctp is None else ctp
    return raw.Study(ctp, mask, np.diag([*spacing, 1.0]), dwi, adc)


def test_retained_slices():
    """A least area of brain, not 'the sum is not 0': one voxel is not enough, HU that cancel are."""
    mask = np.zeros((20, 20, 5), bool)
    mask[:10, :10, 1], mask[0, 0, 2], mask[:10, :5, 3], mask[:10, :10, 4] = True, True, True, True
    assert raw.retained_slices(study(mask), 200) == [1, 3, 4]
    assert raw.retained_slices(study(mask), 201) == [1, 4]
    assert raw.retained_slices(study(mask), 0) == [1, 2, 3, 4]
    ctp = np.ones((2, *mask.shape), np.float32)
    ctp[1, ..., 1] = -1  # adds up to 0
    ctp[..., 4] = 0  # nothing there
    dwi = np.ones(mask.shape, np.float32)
    dwi[..., 3] = 0
    assert raw.retained_slices(study(mask, ctp, dwi, np.ones_like(dwi)), 200) == [1]


def test_resample_time(raw_case):
    t = np.arange(10, dtype=np.float32).reshape(10, 1, 1) * np.ones((1, 2, 2), np.float32)
    np.testing.assert_allclose(raw.resample_time(t, 4)[:, 0, 0], [0, 3, 6, 9])
    np.testing.assert_allclose(raw.resample_time(t, 19)[:, 0, 0], np.arange(19) / 2)
    np.testing.assert_allclose(raw.resample_time(t, 4, 1.5)[:, 0, 0], [0, 1.5, 3, 4.5])
    np.testing.assert_allclose(raw.resample_time(t, 4, 4.0)[:, 0, 0], [0, 4, 8, 9])  # the last frame is held
    assert raw.resample_time(t[:1], 3).shape == (3, 2, 2) and raw.resample_time(t, 4).dtype == np.float32

    with pytest.raises(UserError, match="15 time points, 12 are needed.*--resample_time"):
        raw.read(raw_case, Rules(time_points=12))
    assert raw.read(raw_case, Rules(time_points=12, resample_time=True)).ctp.shape == (12, *SHAPE)
    with pytest.raises(UserError, match="gives no time between frames"):  # the phantom's header does not say
        raw.read(raw_case, Rules(time_points=12, resample_time=True, frame_s=2.0))


def test_frame_times_from_the_header(raw_case, tmp_path):
    import nibabel as nib

    image = nib.load(raw_case.files["ctp"])
    image.header.set_zooms((*image.header.get_zooms()[:3], 1500.0))
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, tmp_path / "ctp.nii.gz")
    assert raw.frame_seconds(tmp_path / "ctp.nii.gz") == 1.5
    moved = Source("x", "x", raw_case.files | {"ctp": tmp_path / "ctp.nii.gz"})
    ctp = raw.read(moved, Rules(time_points=7, resample_time=True, frame_s=3.0)).ctp
    np.testing.assert_array_equal(ctp, load(raw_case.files["ctp"].parent, "ctp")[:14:2])


def test_to_the_grid_of_the_ctp(raw_case, tmp_path):
    """DWI and ADC of another grid (registered, by their headers) come onto the CTP's; refused unless asked for."""
    files = dict(raw_case.files)
    for what in ("dwi", "adc", "lesion"):
        volume = nifti.load(files[what])
        fine = nifti.resample(volume, (3.0, 3.0, 16.0), order=0 if what == "lesion" else 1)
        files[what] = tmp_path / f"{what}.nii.gz"
        nifti.save(files[what], fine.data, fine.affine)
    moved = Source("case_0001", "case_0001", files)
    with pytest.raises(UserError, match="another grid than the CTP .*--to_ctp_grid"):
        raw.read(moved, Rules())
    plain, back = raw.read(raw_case, Rules()), raw.read(moved, Rules(to_ctp_grid=True, clip_lesion=True))
    assert back.dwi.shape == SHAPE and np.array_equal(back.affine, plain.affine)
    inside = plain.mask
    assert np.corrcoef(back.dwi[inside], plain.dwi[inside])[0, 1] > 0.9
    overlap = 2 * (back.lesion & plain.lesion).sum() / (back.lesion.sum() + plain.lesion.sum())
    assert overlap > 0.85


def test_common_grid(raw_case):
    """Another voxel size and grid about the brain: affine exact, everything still in place; no brain cut off."""
    plain = raw.read(raw_case, Rules())
    moved = raw.read(raw_case, Rules(spacing_mm=(5.0, 5.0, 16.0), shape=(40, 40, 8)))
    assert moved.mask.shape == (40, 40, 8) and moved.ctp.shape == (15, 40, 40, 8)
    np.testing.assert_allclose(moved.spacing_mm, [5, 5, 16])
    for name in ("mask", "lesion"):
        a, b = ((getattr(s, name), s.affine) for s in (plain, moved))
        centres = [affine[:3, :3] @ np.argwhere(data).mean(0) + affine[:3, 3] for data, affine in (a, b)]
        np.testing.assert_allclose(*centres, atol=1.5)
        volumes = [data.sum() * np.linalg.det(affine[:3, :3]) for data, affine in (a, b)]
        assert volumes[1] == pytest.approx(volumes[0], rel=0.15)
    assert np.median(moved.adc[moved.lesion]) < 620 < np.median(moved.adc[moved.mask & ~moved.lesion])
    only_shape = raw.read(raw_case, Rules(shape=(64, 0, 0)))
    assert only_shape.mask.shape == (64, 48, 8) and only_shape.mask.sum() == plain.mask.sum()
    np.testing.assert_allclose(only_shape.affine[:3, :3], plain.affine[:3, :3])
    with pytest.raises(UserError, match=r"of the brain falls outside the common grid.*--shape"):
        raw.read(raw_case, Rules(shape=(24, 48, 8)))


def test_masks_from_the_ct(raw_case):
    """Without a mask: soft tissue inside the skull; close to the true brain."""
    files = {what: path for what, path in raw_case.files.items() if what != "mask"}
    with pytest.raises(UserError, match="no mask in .*--make_masks"):
        raw.read(Source("a", "a", files), Rules())
    made = raw.read(Source("a", "a", files), Rules(make_masks=True, clip_lesion=True)).mask
    true = raw.read(raw_case, Rules()).mask
    assert 2 * (made & true).sum() / (made.sum() + true.sum()) > 0.93
    flat = nifti.Volume(np.full((2, 8, 8, 3), 30.0, np.float32), np.eye(4))
    with pytest.raises(UserError, match="no skull found"):
        raw.mask_from_ct(flat, np.ones(3))


def test_holes_of_masks(raw_case, tmp_path):
    mask = nifti.load(raw_case.files["mask"])
    lesion = nifti.load(raw_case.files["lesion"]).data > 0
    x, y, z = np.argwhere(lesion)[len(np.argwhere(lesion)) // 2]
    mask.data[x, y, z] = 0
    nifti.save(tmp_path / "mask.nii.gz", mask.data, mask.affine, dtype=np.uint8)
    holed = Source("a", "a", raw_case.files | {"mask": tmp_path / "mask.nii.gz"})
    with pytest.raises(UserError, match=r"1 of \d+ lesion voxels lie outside the brain mask.*--fill_holes"):
        raw.read(holed, Rules())
    assert raw.read(holed, Rules(fill_holes=True)).mask[x, y, z]
    cut = raw.read(holed, Rules(clip_lesion=True))
    assert not cut.lesion[x, y, z] and cut.lesion.sum() == lesion.sum() - 1
