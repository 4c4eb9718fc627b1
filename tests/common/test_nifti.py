"""Volume I/O and geometry: every header trap, and world coordinates kept by every operation."""

import errno
import gzip
import itertools
import os
import resource
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common import nifti
from common.cli import UserError

RNG = np.random.default_rng(0)
REAL = os.environ.get("REAL_DATA_DIR")


def rotation(x, y, z):
    """Rotation matrix of angles in degrees about the three axes."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad([x, y, z])):
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def affine_of(matrix, origin=(-20.0, 35.0, -7.5)):
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix, origin
    return out.astype(np.float32).astype(np.float64)  # as a file can hold it


AFFINES = {
    "ras": affine_of(np.diag([1.0, 1.5, 2.0])),
    "las": affine_of(np.diag([-1.0, 1.5, 2.0])),
    "sagittal psr": affine_of(np.array([[0, 0, 1.2], [-1.0, 0, 0], [0, 1.0, 0]])),
    "oblique": affine_of(rotation(12, -20, 30) @ np.diag([1.0, 1.5, 2.0])),
    "oblique left-handed": affine_of(rotation(-100, 70, 15) @ np.diag([0.9, -1.1, 2.5])),
    "sheared": affine_of(np.array([[1.0, 0.2, 0], [0, 1.1, 0.1], [0, 0, 1.3]])),
}
each_affine = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())


def blob(shape=(24, 20, 16), affine=AFFINES["ras"], centre=(0.55, 0.45, 0.5), sigma=2.0):
    """Gaussian blob at a fraction of the grid, and its volume."""
    grid = np.moveaxis(np.indices(shape), 0, -1)
    data = np.exp(-(((grid - np.array(centre) * (np.array(shape) - 1)) / sigma) ** 2).sum(-1) / 2)
    return nifti.Volume(data.astype(np.float32), affine)


def centroid(data, affine):
    """Intensity-weighted centre in world mm."""
    weight = np.asarray(data, np.float64)
    index = [(weight * grid).sum() / weight.sum() for grid in np.indices(weight.shape)]
    return affine[:3, :3] @ index + affine[:3, 3]


def write(path, data, affine, **fields):
    """A file as another program would write it, by nibabel, with header fields forced afterwards."""
    image = nib.Nifti1Image(data, affine)
    for form in ("sform", "qform"):
        getattr(image, f"set_{form}")(affine, 1)
    nib.save(image, path)
    if fields:
        raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        header = nib.Nifti1Header(bytes(raw[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        raw[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def refuse(path, text):
    with pytest.raises(UserError, match=text) as error:
        nifti.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- load


@pytest.mark.filterwarnings("ignore:.*sform and qform")  # nibabel writes a qform without the shear
@each_affine
def test_load_agrees_with_nibabel_canonical(tmp_path, affine):
    data = RNG.standard_normal((5, 6, 7)).astype(np.float32)
    path = write(tmp_path / "a.nii.gz", data, affine)
    volume, reference = nifti.load(path), nib.as_closest_canonical(nib.load(path))
    assert np.array_equal(volume.data, reference.get_fdata(dtype=np.float32))
    assert np.allclose(volume.affine, reference.affine, atol=1e-6)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S") and np.linalg.det(volume.affine[:3, :3]) > 0
    assert volume.data.dtype == np.float32 and volume.data.flags.c_contiguous and volume.path == path
    torch.from_numpy(volume.data).add_(1)  # writable
    shape, header_affine = nifti.header(path)
    assert shape == volume.shape and np.array_equal(header_affine, volume.affine)
    assert np.allclose(volume.spacing_mm, reference.header.get_zooms(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_every_dtype_and_byte_order(tmp_path, dtype, order):
    data = RNG.integers(0, 100, (3, 4, 5)).astype(order + dtype)
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(data, np.eye(4), nib.Nifti1Header(endianness=order), dtype=data.dtype)
    nib.save(image, path)
    assert path.read_bytes()[:4] == (348).to_bytes(4, {"<": "little", ">": "big"}[order])
    assert np.array_equal(nifti.load(path).data, data.astype(np.float32))
    assert np.array_equal(nifti.load_labels(path).data, data.astype(np.int32))
    assert nifti.header(path)[0] == (3, 4, 5)


def test_nifti2_and_upper_case_name(tmp_path):
    data = RNG.standard_normal((3, 4, 5)).astype(np.float32)
    nib.save(nib.Nifti2Image(data, AFFINES["las"]), tmp_path / "a.nii.gz")
    os.rename(tmp_path / "a.nii.gz", tmp_path / "A.NII.GZ")
    assert np.array_equal(nifti.load(tmp_path / "A.NII.GZ").data, data[::-1])


@pytest.mark.parametrize(
    "slope, inter, wanted",
    [(2.0, -10.0, (2, -10)), (0.5, 0.0, (0.5, 0)), (np.nan, 5.0, (1, 0)), (0.0, 5.0, (1, 0)), (np.inf, 5.0, (1, 0)),
     (np.nan, np.nan, (1, 0)), (-1.0, 7.0, (-1, 7))],
)  # fmt: skip
def test_scaling_fields(tmp_path, slope, inter, wanted):
    data = RNG.integers(-3000, 3000, (3, 4, 5)).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", data, np.eye(4), scl_slope=slope, scl_inter=inter)
    assert np.array_equal(nifti.load(path).data, (data * wanted[0] + wanted[1]).astype(np.float32))
    assert np.array_equal(nifti.load(path).data, nib.load(path).get_fdata(dtype=np.float32))


def test_scaling_with_a_bad_intercept_is_refused(tmp_path):
    data = np.ones((3, 4, 5), np.int16)
    refuse(write(tmp_path / "a.nii", data, np.eye(4), scl_slope=1, scl_inter=np.nan), "intercept")


def forms(path, sform, sform_code, qform, qform_code):
    image = nib.Nifti1Image(RNG.standard_normal((5, 5, 5)).astype(np.float32), None)
    image.set_sform(sform, sform_code)
    image.set_qform(qform, qform_code)
    nib.save(image, path)
    return path


def test_choice_between_sform_and_qform(tmp_path):
    nifti._warned.clear()
    s, q = AFFINES["oblique"], AFFINES["ras"]
    path = tmp_path / "a.nii"
    with pytest.warns(UserWarning, match="a.nii: sform and qform disagree"):
        chosen = nifti.load(forms(path, s, 1, q, 1)).affine
    assert np.allclose(chosen, s, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(nifti.load(forms(path, s, 4, q, 1)).affine, s, atol=1e-5)  # told once
        assert np.allclose(nifti.load(forms(path, s, 0, q, 1)).affine, q, atol=1e-5)
        assert np.allclose(nifti.load(forms(path, s, 2, q, 0)).affine, s, atol=1e-5)
        nifti._warned.clear()
        nifti.load(forms(path, q, 1, q, 1))
    turned = np.array([[0, 1.0, 0, 0], [1, 0, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1]])  # same corners, other axes
    with pytest.warns(UserWarning, match="disagree"):
        nifti.load(forms(path, np.eye(4), 1, turned, 1))


def test_both_codes_zero_is_the_fallback_of_nibabel_with_one_warning(tmp_path):
    nifti._warned.clear()
    path = forms(tmp_path / "a.nii", np.eye(4), 0, np.diag([2.0, 3, 4, 1]), 0)
    with pytest.warns(UserWarning, match="a.nii: sform and qform codes are 0"):
        volume = nifti.load(path)
    reference = nib.as_closest_canonical(nib.load(path))
    assert np.array_equal(volume.affine, reference.affine) and volume.spacing_mm == (2, 3, 4)
    assert np.array_equal(volume.data, reference.get_fdata(dtype=np.float32))  # stored x runs right to left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nifti.load(path)


def test_singleton_axes(tmp_path):
    data = RNG.standard_normal((3, 4, 5)).astype(np.float32)
    for extra in ((1,), (1, 1)):
        path = write(tmp_path / "a.nii.gz", data.reshape(data.shape + extra), np.eye(4))
        assert np.array_equal(nifti.load(path).data, data) and nifti.header(path)[0] == (3, 4, 5)
    assert nifti.load(write(tmp_path / "b.nii", data[:, :, :1], np.eye(4))).shape == (3, 4, 1)
    for wrong in (data[None], np.stack([data, data], -1), data[..., 0]):
        refuse(write(tmp_path / "c.nii", wrong, np.eye(4)), "not a 3D volume")


@each_affine
@pytest.mark.parametrize("n", [1, 4])
def test_series(tmp_path, affine, n):
    """(N, D, H, W) in memory, N last in the file, each volume in the place that it has alone."""
    data, path = RNG.standard_normal((n, 5, 6, 7)).astype(np.float32), tmp_path / "a.nii.gz"
    nifti.save(path, data, affine)
    image, volume = nib.load(path), nifti.load(path, series=True)
    assert image.shape == (5, 6, 7, n) and np.array_equal(image.affine, affine)
    assert int(image.header["qform_code"]) == (0 if affine is AFFINES["sheared"] else 2)
    assert np.array_equal(np.moveaxis(image.get_fdata(dtype=np.float32), 3, 0), data)
    assert volume.data.shape[0] == n and volume.data.flags.c_contiguous and volume.data.flags.writeable
    for i in range(n):
        nifti.save(tmp_path / "one.nii", data[i], affine)
        one = nifti.load(tmp_path / "one.nii")
        assert np.array_equal(volume.data[i], one.data) and np.array_equal(volume.affine, one.affine)
    assert nifti.load(tmp_path / "one.nii", series=True).shape == one.shape  # a 3D file stays 3D
    if n > 1:
        refuse(path, "not a 3D volume")
        with pytest.raises(UserError, match="not a 3D volume"):
            nifti.header(path)
    with pytest.raises(UserError, match="no voxels"):
        nifti.load(write(tmp_path / "none.nii", data[0], np.eye(4), dim=[4, 5, 6, 7, 0, 1, 1, 1]), series=True)
    with pytest.raises(UserError, match="not a 3D volume"):
        nifti.load(write(tmp_path / "5d.nii", np.zeros((2, 2, 2, 3, 3), np.float32), np.eye(4)), series=True)


def test_nan_and_inf(tmp_path):
    for value in (np.nan, np.inf, 1e300):
        data = np.zeros((3, 4, 5))
        data[1, 2, 3] = data[0, 0, 0] = value
        path = write(tmp_path / "a.nii.gz", data, np.eye(4))
        refuse(path, "2 voxels are NaN")
        assert not np.isfinite(nifti.load(path, allow_nonfinite=True).data[1, 2, 3])
    with pytest.raises(UserError, match="not int32 integers"):
        nifti.load_labels(path)


def test_labels(tmp_path):
    labels = RNG.integers(-2, 200, (3, 4, 5))
    path = write(tmp_path / "a.nii.gz", labels.astype(np.float32), AFFINES["las"])
    volume = nifti.load_labels(path)
    assert volume.data.dtype == np.int32 and np.array_equal(volume.data, labels[::-1])
    for wrong in (labels + 0.5, labels * 2.0**33):
        with pytest.raises(UserError, match="not int32 integers"):
            nifti.load_labels(write(tmp_path / "b.nii.gz", wrong, np.eye(4)))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_truncated_at_any_byte(tmp_path, name):
    path = write(tmp_path / name, RNG.standard_normal((6, 7, 8)).astype(np.float32), np.eye(4))
    raw = path.read_bytes()
    for keep in (0, 1, 3, 20, 200, 347, 348, 400, len(raw) // 2, len(raw) - 8, len(raw) - 1):
        path.write_bytes(raw[:keep])
        refuse(path, "truncated|not a usable NIfTI|corrupt")


def test_flipped_bit_in_gzip_is_found(tmp_path):
    path = write(tmp_path / "a.nii.gz", RNG.standard_normal((20, 20, 20)).astype(np.float32), np.eye(4))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)
    refuse(path, "corrupt")


def test_wrong_names_and_kinds(tmp_path):
    path = write(tmp_path / "a.nii", np.zeros((3, 4, 5), np.float32), np.eye(4))
    raw = path.read_bytes()
    for name, content, text in [
        ("plain.nii.gz", raw, "not gzip-compressed"),
        ("zipped.nii", gzip.compress(raw), "is gzip-compressed"),
        ("a.mgz", gzip.compress(raw), "not a NIfTI file name"),
        ("a.txt", b"hello", "not a NIfTI file name"),
        ("a.gz", gzip.compress(raw), "not a NIfTI file name"),
        ("text.nii", b"hello world" * 100, "not a usable NIfTI"),
        ("pair.nii", raw.replace(b"n+1", b"ni1"), "not a usable NIfTI"),
        ("analyze.nii", raw.replace(b"n+1", b"\0\0\0"), "not a usable NIfTI"),
    ]:
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, text)
        with pytest.raises(UserError, match=text):
            nifti.header(tmp_path / name)
    refuse(tmp_path / "missing.nii.gz", "file not found")
    (tmp_path / "folder.nii").mkdir()
    refuse(tmp_path / "folder.nii", "cannot be read")


def test_unusable_geometry_and_voxels(tmp_path):
    data, path = np.zeros((3, 4, 5), np.float32), tmp_path / "a.nii"
    refuse(write(path, data, np.eye(4), srow_x=[0, 0, 0, 0]), "singular")
    refuse(write(path, data, np.eye(4), srow_x=[0, 1, 0, 0]), "singular")
    refuse(write(path, data, np.eye(4), srow_y=[0, np.nan, 0, 0]), "not finite")
    refuse(write(path, data, np.eye(4), sform_code=0, quatern_b=2), "not a usable NIfTI header")
    refuse(write(path, data, np.eye(4), dim=[3, 3, 0, 5, 1, 1, 1, 1]), "no voxels")
    refuse(write(path, data, np.eye(4), dim=[3, 3, -4, 5, 1, 1, 1, 1]), "no voxels")
    refuse(write(path, data, np.eye(4), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "truncated")
    refuse(write(path, data, np.eye(4), datatype=9999), "not a usable NIfTI header")
    refuse(write(path, data.astype(np.complex64), np.eye(4)), "not real numbers")
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refuse(write(path, rgb, np.eye(4)), "not real numbers")


# ---- save


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@each_affine
def test_save_round_trip_and_header(tmp_path, affine, name):
    data = RNG.standard_normal((5, 6, 7)).astype(np.float32)
    nifti.save(tmp_path / "new" / name, data, affine)
    image = nib.load(tmp_path / "new" / name)
    header, sheared = image.header, affine is AFFINES["sheared"]
    assert np.array_equal(image.get_fdata(dtype=np.float32), data)
    assert np.array_equal(image.affine, affine) and np.array_equal(header.get_sform(), affine)  # exact, not close
    assert int(header["sform_code"]) == 2 and int(header["qform_code"]) == (0 if sheared else 2)
    assert sheared or np.allclose(header.get_qform(), affine, atol=1e-4)
    assert image.get_data_dtype() == np.float32 and header.get_xyzt_units()[0] == "mm"
    raw = (tmp_path / "new" / name).read_bytes()
    raw = nib.Nifti1Header((gzip.decompress(raw) if name.endswith("gz") else raw)[:348])
    assert (raw["scl_slope"], raw["scl_inter"], raw["vox_offset"]) == (1, 0, 352)  # nibabel hides them after load
    assert np.allclose(header.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0))
    volume = nifti.load(tmp_path / "new" / name)
    nifti.save(tmp_path / name, volume.data, volume.affine)
    again = nifti.load(tmp_path / name)
    assert np.array_equal(again.data, volume.data)
    assert np.array_equal(again.affine, volume.affine.astype(np.float32))
    assert os.listdir(tmp_path / "new") == [name]


def test_integer_scaled_input_does_not_leak_into_output(tmp_path):
    data = RNG.integers(0, 255, (3, 4, 5)).astype(np.int16)
    path = write(tmp_path / "in.nii.gz", data, np.eye(4), scl_slope=0.004, scl_inter=-7.0)
    result = RNG.random((3, 4, 5)).astype(np.float32)
    nifti.save(tmp_path / "out.nii.gz", result, nifti.load(path).affine)
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").get_fdata(dtype=np.float32), result)


@pytest.mark.parametrize("data_dtype", ["?", "u1", "i2", ">i2", "i4", "i8", "u8", "f2", "f4", ">f4", "f8", "g"])
def test_any_array_is_saved_as_the_asked_dtype(tmp_path, data_dtype):
    data, path = RNG.integers(0, 2, (3, 4, 5)).astype(data_dtype), tmp_path / "a.nii.gz"
    for dtype, stored in [(np.float32, "f4"), (np.float64, "f8"), (bool, "u1"), (np.uint8, "u1"), (np.float16, "f4"),
                          (np.int64, "i4"), (np.int16, "i2"), (">f4", "f4"), (data.dtype, None)]:  # fmt: skip
        if (dtype, data_dtype) == (data.dtype, "g"):
            continue  # a long double is no NIfTI dtype on every machine
        nifti.save(path, data, np.eye(4), dtype=dtype)
        image = nib.load(path)
        assert np.array_equal(np.asanyarray(image.dataobj), data.astype(np.float64))
        assert stored is None or image.get_data_dtype() == np.dtype(stored)
        assert nifti.load(path).data.dtype == np.float32
    nifti.save(path, torch.from_numpy(data.astype(np.float32)), np.eye(4))
    assert np.array_equal(nifti.load(path).data, data.astype(np.float32))


def test_save_refuses_what_would_be_changed(tmp_path):
    path, ones = tmp_path / "a.nii.gz", np.ones((3, 4, 5))
    with pytest.raises(UserError, match="a.nii.gz"):
        nifti.save(path, ones * np.nan, np.eye(4))
    for data, dtype in [(ones * 300, "u1"), (-ones, "u1"), (ones * 0.5, "i2"), (ones.astype(int) * 2**40, "i8"),
                        (ones.astype(int) * (2**24 + 1), "f4"), (ones * 1e39, "f4")]:  # fmt: skip
        with pytest.raises(UserError):
            nifti.save(path, data, np.eye(4), dtype=dtype)
    for affine in (np.diag([1, 1, 0, 1]), np.eye(4) * np.nan):
        with pytest.raises(UserError, match="singular or not finite"):
            nifti.save(path, ones, affine)
    with pytest.raises(UserError, match="no voxels"):
        nifti.save(path, ones[:0], np.eye(4))
    with pytest.raises(UserError, match="file name"):
        nifti.save(tmp_path / "a.mgz", ones, np.eye(4))
    for data in (ones[None, None], ones[0]):
        with pytest.raises(ValueError):
            nifti.save(path, data, np.eye(4))
    assert os.listdir(tmp_path) == []


def test_same_data_same_bytes(tmp_path):
    data = RNG.random((6, 7, 8)).astype(np.float32)
    for name, later in (("a.nii.gz", 0), ("b.nii.gz", 10**9)):
        nifti.save(tmp_path / name, data if later == 0 else np.asfortranarray(data), AFFINES["oblique"])
    first = (tmp_path / "a.nii.gz").read_bytes()
    assert first == (tmp_path / "b.nii.gz").read_bytes()
    assert first[3] == 0 and first[4:8] == bytes(4)  # no name, no time in the gzip header


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, code):
    path = tmp_path / "a.nii.gz"
    nifti.save(path, np.ones((3, 4, 5)), np.eye(4))
    before = path.read_bytes()

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="disk full" if code == errno.ENOSPC else "cannot write") as error:
        nifti.save(path, np.zeros((3, 4, 5)), np.eye(4))
    assert str(path) in str(error.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.nii.gz"]


def test_write_cut_off_by_the_system(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))  # the system lets 100 kB through, like a full disk
    try:
        with pytest.raises(UserError, match="disk full"):
            nifti.save(tmp_path / "a.nii", np.ones((64, 64, 64)), np.eye(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == []


# ---- geometry: a blob stays where it is in the world


@each_affine
def test_reorient_keeps_the_world(affine):
    volume = blob(affine=affine)
    where = centroid(volume.data, affine)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)):
        codes = "".join("LRPAIS"[2 * axis + sign] for axis, sign in zip(order, signs, strict=True))
        data, new = nifti.reorient(volume.data, affine, codes)
        assert "".join(nib.aff2axcodes(new)) == codes
        assert np.allclose(centroid(data, new), where, atol=1e-4)
        back, old = nifti.reorient(data, new, "".join(nib.aff2axcodes(affine)))
        assert np.array_equal(back, volume.data) and np.allclose(old, affine, atol=1e-10)
    channels, _ = nifti.reorient(np.stack([volume.data, -volume.data]), affine, "LPI")
    assert np.array_equal(channels[0], nifti.reorient(volume.data, affine, "LPI")[0])
    assert np.array_equal(channels[1], -channels[0])


@each_affine
@pytest.mark.parametrize("shape", [(20, 16, 12), (31, 25, 19), (18, 27, 16), (17, 15, 13)])
def test_crop_or_pad_keeps_the_world_and_comes_back(affine, shape):
    volume = blob(affine=affine, sigma=1.0)
    volume.data[volume.data < 1e-3] = 0  # the crop cuts nothing off
    out = nifti.crop_or_pad(volume, shape)
    assert out.shape == shape and np.allclose(centroid(out.data, out.affine), centroid(volume.data, affine), atol=1e-4)
    back = nifti.crop_or_pad(out, volume.shape)
    assert np.allclose(back.affine, affine, atol=1e-9) and np.array_equal(back.data, volume.data)
    restored = nifti.resample_to(out, volume.shape, affine)  # the same, by the general way
    assert np.array_equal(restored.data, volume.data)


def test_crop_around_a_centre_and_fill():
    volume = blob(shape=(20, 20, 20))
    volume.data[:] = 0
    volume.data[4, 9, 17] = 1
    out = nifti.crop_or_pad(volume, (7, 7, 7), centre=(4, 9, 17), fill=-1)
    assert out.data[3, 3, 3] == 1 and (out.data[:, :, 6] == -1).all() and (out.data[:, :, :6] >= 0).all()
    assert np.allclose(centroid(out.data > 0, out.affine), centroid(volume.data, volume.affine))
    assert volume.data.sum() == 1  # the input is untouched
    away = nifti.crop_or_pad(volume, (3, 3, 3), centre=(-50, 0, 90))
    assert (away.data == 0).all() and away.shape == (3, 3, 3)
    with pytest.raises(ValueError):
        nifti.crop_or_pad(volume, (0, 3, 3))


@each_affine
@pytest.mark.parametrize("spacing_mm", [0.7, 1.0, (2.0, 1.0, 3.3), 2.9])
def test_resample_keeps_the_world(affine, spacing_mm):
    volume = blob((32, 30, 28), affine, sigma=3.0)
    volume.data[volume.data < 1e-4] = 0
    out = nifti.resample(volume, spacing_mm)
    assert np.allclose(out.spacing_mm, spacing_mm, atol=1e-9) and out.data.dtype == np.float32
    assert np.allclose(centroid(out.data, out.affine), centroid(volume.data, affine), atol=0.05)
    middle = [(np.array([*(np.array(v.shape) - 1) / 2, 1]) @ v.affine.T)[:3] for v in (volume, out)]
    assert np.allclose(*middle)  # same centre
    extent = np.array(out.shape) * out.spacing_mm - np.array(volume.shape) * volume.spacing_mm
    assert (np.abs(extent) <= np.array(out.spacing_mm) / 2 + 1e-9).all()  # same field of view
    back = nifti.resample_to(out, volume.shape, affine, order=3)
    assert np.allclose(centroid(back.data, affine), centroid(volume.data, affine), atol=0.05)


def test_resample_to_an_oblique_grid_keeps_the_world():
    volume = blob((32, 30, 28), sigma=3.0)
    turn = np.eye(4)
    turn[:3, :3] = rotation(10, 25, -15) @ np.diag([1.3, 0.8, 1.0])
    where = centroid(volume.data, volume.affine)
    turn[:3, 3] = where - turn[:3, :3] @ [22, 31, 27]
    out = nifti.resample_to(volume, (44, 62, 55), turn)
    assert np.allclose(centroid(out.data, out.affine), where, atol=0.05)


def test_resample_edges_and_mean():
    flat = nifti.Volume(np.full((13, 17, 11), 3.0, np.float32), AFFINES["las"])
    for spacing_mm in (0.4, 0.9, 1.7, 3.1, 9.0):
        assert np.allclose(nifti.resample(flat, spacing_mm).data, 3.0, atol=1e-5)  # no dark rim
    noise = nifti.Volume(RNG.random((32, 32, 32)).astype(np.float32), np.eye(4))
    assert abs(float(nifti.resample(noise, 2).data.mean() - noise.data.mean())) < 1e-6
    assert nifti.resample(noise, 1).data is not noise.data
    assert np.array_equal(nifti.resample(noise, 1).data, noise.data)


def test_linear_ramp_is_reproduced_exactly():
    x = np.arange(24, dtype=np.float32)
    ramp = nifti.Volume(np.broadcast_to(x[:, None, None] * 2 + 1, (24, 8, 8)).copy(), np.eye(4))
    for spacing_mm, inner in ((0.5, 1), (2.0, 3)):  # away from the ends, where the value is held or reflected
        out = nifti.resample(ramp, (spacing_mm, 1, 1))
        world = out.affine[0, 0] * np.arange(out.shape[0]) + out.affine[0, 3]
        assert np.allclose(out.data[inner:-inner, 3, 3], (2 * world + 1)[inner:-inner], atol=1e-4)


def test_down_sampling_does_not_alias():
    stripes = np.zeros((64, 16, 16), np.float32)
    stripes[::2] = 1  # 1 mm stripes are beyond a 3 mm grid and must become grey
    out = nifti.resample(nifti.Volume(stripes, np.eye(4)), (3, 1, 1)).data
    assert np.abs(out[2:-2] - 0.5).max() < 0.05
    line = np.zeros((63, 9, 9), np.float32)
    line[31] = 1
    for factor in (2, 3, 5):  # the point spread is the Gaussian that widens one voxel to `factor` (full width)
        step = nifti.strided_affine(np.eye(4), (factor, 1, 1))
        step[0, 3] = 31 - factor * 8
        out = nifti.resample_to(nifti.Volume(line, np.eye(4)), (17, 9, 9), step).data[:, 4, 4]
        variance = (factor**2 - 1) / (8 * np.log(2))
        assert out[8] == out.max() and abs(out[9] / out[8] - np.exp(-(factor**2) / (2 * variance))) < 1e-4


def test_resample_labels():
    labels = RNG.integers(0, 207, (12, 14, 10)).astype(np.int32)
    volume = nifti.Volume(labels, AFFINES["oblique"])
    out = nifti.resample(volume, np.array(volume.spacing_mm) / 3, order=0)
    assert out.data.dtype == np.int32
    assert np.array_equal(out.data, labels.repeat(3, 0).repeat(3, 1).repeat(3, 2))
    assert np.array_equal(nifti.resample_to(out, labels.shape, volume.affine, order=0).data, labels)


def test_outside_the_field_of_view():
    volume = nifti.Volume(np.ones((6, 6, 6), np.float32), np.eye(4))
    shifted = np.eye(4)
    shifted[:3, 3] = -3
    out = nifti.resample_to(volume, (12, 12, 12), shifted, fill=-2).data
    inside = np.zeros((12, 12, 12), bool)
    inside[3:9, 3:9, 3:9] = True
    assert (out[inside] == 1).all() and (out[~inside] == -2).all()
    fine = nifti.resample_to(volume, (24, 24, 24), nifti.strided_affine(shifted, 0.5)).data
    assert np.array_equal(fine, inside.repeat(2, 0).repeat(2, 1).repeat(2, 2))  # the half voxel at the rim is inside
    with pytest.raises(UserError, match="singular"):
        nifti.resample_to(volume, (2, 2, 2), np.zeros((4, 4)))


def test_float32_affine_noise_does_not_blur():
    affine = affine_of(rotation(3, 5, 7) * 1.1, (-91.234567, 107.654321, -63.111111))
    volume = nifti.Volume(RNG.random((40, 40, 40)).astype(np.float32), affine)
    crop = nifti.crop_or_pad(volume, (30, 30, 30))
    stored = nifti.Volume(crop.data, crop.affine.astype(np.float32).astype(np.float64))  # as it comes from a file
    assert np.array_equal(nifti.crop_or_pad(volume, (30, 30, 30)).data,
                          nifti.resample_to(volume, (30, 30, 30), stored.affine).data)  # fmt: skip


@each_affine
@pytest.mark.parametrize("factor", [4, (2, 4, 1)])
def test_strided_affine_keeps_corner_and_centre_of_mass(affine, factor):
    coarse, step = RNG.random((6, 5, 4)), np.broadcast_to(factor, 3)
    new = nifti.strided_affine(affine, factor)
    corner = [-0.5, -0.5, -0.5, 1]
    assert np.allclose(new @ corner, affine @ corner)
    assert np.allclose(np.linalg.norm(new[:3, :3], axis=0), step * np.linalg.norm(affine[:3, :3], axis=0))
    fine = coarse.repeat(step[0], 0).repeat(step[1], 1).repeat(step[2], 2)
    assert np.allclose(centroid(coarse, new), centroid(fine, affine), atol=1e-9)


def test_whole_preparation_and_back_through_files(tmp_path):
    """Raw oblique scan -> RAS, 2 mm, cropped -> file -> back onto the scanner's grid, compared in the world."""
    raw = blob((40, 36, 30), AFFINES["oblique left-handed"], sigma=4.0)
    path = write(tmp_path / "raw.nii.gz", (raw.data * 1000).astype(np.int16), raw.affine, scl_slope=0.001)
    volume = nifti.load(path)
    where = centroid(volume.data, volume.affine)
    ready = nifti.crop_or_pad(nifti.resample(volume, 2.0), (24, 24, 24))
    nifti.save(tmp_path / "out.nii.gz", ready.data, ready.affine)
    out = nib.load(tmp_path / "out.nii.gz")
    assert np.allclose(centroid(out.get_fdata(), out.affine), where, atol=0.1)
    back = nifti.resample_to(nifti.load(tmp_path / "out.nii.gz"), *nifti.header(path))
    assert back.shape == volume.shape and np.allclose(back.affine, volume.affine)
    assert np.allclose(centroid(back.data, back.affine), where, atol=0.1)
    assert np.corrcoef(back.data.ravel(), volume.data.ravel())[0, 1] > 0.99


@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR is not set")
def test_real_volumes(tmp_path):
    files = sorted(Path(REAL or ".").glob("brain_t1/**/*.nii.gz"))[:12]
    assert files
    for path in files:
        volume, image = nifti.load(path), nib.load(path)
        reference = nib.as_closest_canonical(image)
        assert np.array_equal(volume.data, reference.get_fdata(dtype=np.float32))
        assert np.allclose(volume.affine, reference.affine, atol=1e-5)
        nifti.save(tmp_path / "out.nii.gz", volume.data, volume.affine)
        out = nib.load(tmp_path / "out.nii.gz")
        where = centroid(image.get_fdata().clip(0).squeeze(), image.affine)
        assert np.allclose(centroid(out.get_fdata().clip(0), out.affine), where, atol=1e-2)
