"""The store keeps slices without loss and is written whole or not at all; split, loading and augmentation."""

import json
import pickle
import shutil
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import torch

from common.cli import UserError
from common.runtime import generator
from mgdcr import dataset, geometry, lmdb_writer, make_phantom, store
from mgdcr.intensity import Scale
from tests.helpers import run_main

RANK_0 = SimpleNamespace(is_main=True)


def cine(data):
    return geometry.Cine(np.asarray(data, np.float32), geometry.Grid(np.diag([2.0, 2, 8, 1]), data.shape[1:]))


def integers(seed, shape=(3, 4, 10, 12)):
    return cine(np.random.default_rng(seed).integers(0, 2048, shape))


@pytest.fixture(scope="module")
def slices(cohort, tmp_path_factory):
    """Root folder with the store of the cohort's three subjects."""
    root = tmp_path_factory.mktemp("slices")
    run_main(lmdb_writer, "--root", root, "--input", cohort)
    return root / "datasets" / "cardiac_cine_128.lmdb"


def test_A25_integers_come_back_bit_exact_as_float16(tmp_path):
    given = {name: integers(seed) for seed, name in enumerate(("a", "b"))}
    assert store.write(tmp_path / "s.lmdb", given.items()) == 24
    read = store.Store(tmp_path / "s.lmdb")
    assert len(read) == 24 and read.subjects == ("a", "b")
    for key in read.keys:
        name, frame, number = key.split("/")
        assert (len(frame), len(number)) == (3, 3)
        assert read[key].dtype == np.float16
        expected = given[name].data[int(frame), int(number)]
        assert read[key].tobytes() == expected.astype(np.float16).tobytes()
        np.testing.assert_array_equal(read[key].astype(np.float32), expected)
    np.testing.assert_array_equal(read.grid("a").affine, given["a"].grid.affine)


def test_A25_count_is_kept_under_length(slices):
    env = lmdb.open(str(slices), readonly=True, lock=False)
    with env.begin() as txn:
        keys = [key for key in txn.cursor().iternext(values=False) if key not in (b"length", b"meta")]
        assert int(txn.get(b"length")) == len(keys) == 3 * 4 * 11
        meta = json.loads(txn.get(b"meta"))
    env.close()
    subject = meta["subjects"]["subject_001"]
    assert subject["shape"] == [11, 64, 64] and subject["frames"] == 4 and len(subject["source_hash"]) == 16
    assert set(subject["limits"]) == {"low", "high"}


def test_values_beyond_float16_are_kept_as_float32(slices, sax):
    read = store.Store(slices)
    assert read.meta["subject_001"]["dtype"] == "float32"
    np.testing.assert_array_equal(read["subject_001/002/005"], sax.data[2, 5])


def test_A25_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "s.lmdb"
    store.write(path, [("a", integers(0))])
    before = store.Store(path).hash
    with pytest.raises(UserError, match="--overwrite"):
        store.write(path, [("a", integers(1))])
    assert store.Store(path).hash == before
    store.write(path, [("a", integers(1))], overwrite=True)
    assert store.Store(path).hash != before  # an environment that is open follows the new store
    np.testing.assert_array_equal(store.Store(path)["a/000/000"], integers(1).data[0, 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.lmdb"]


def test_a_failure_leaves_the_old_store(tmp_path):
    path = tmp_path / "s.lmdb"
    store.write(path, [("a", integers(0))])

    def broken():
        yield "b", integers(1)
        raise UserError("file is truncated")

    with pytest.raises(UserError, match="truncated"):
        store.write(path, broken(), overwrite=True)
    assert store.Store(path).subjects == ("a",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.lmdb"]


def test_a_folder_that_is_no_store_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is no store"):
        store.write(tmp_path / "mine", [("a", integers(0))], overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_slices_without_content_are_left_out_and_numbers_kept(tmp_path):
    given = integers(0)
    given.data[1, 2] = 0
    assert store.write(tmp_path / "s.lmdb", [("a", given)]) == 11
    keys = store.Store(tmp_path / "s.lmdb").keys
    assert "a/001/002" not in keys and "a/001/003" in keys


def test_same_slices_same_hash_and_a_large_store_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAP_SIZE", 1 << 16)
    for name in ("x.lmdb", "y.lmdb"):
        store.write(tmp_path / name, [("a", integers(0, (20, 6, 40, 40)))])
    assert store.Store(tmp_path / "x.lmdb").hash == store.Store(tmp_path / "y.lmdb").hash


def _read_one(source):
    return float(source["subject_001/000/003"].sum())


def test_store_is_picklable_and_survives_a_fork(slices):
    source = store.Store(slices)
    expected = _read_one(source)
    assert _read_one(pickle.loads(pickle.dumps(source))) == expected
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_read_one, [source] * 4) == [expected] * 4
    assert _read_one(source) == expected


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_stores(tmp_path, slices, damage):
    path = tmp_path / "s.lmdb"
    if damage != "missing":
        shutil.copytree(slices, path)
    if damage == "truncated":
        content = (path / "data.mdb").read_bytes()
        (path / "data.mdb").write_bytes(content[: len(content) // 2])
    if damage == "other":
        shutil.rmtree(path)
        with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
            txn.put(b"0000001", b"jpeg")
    with pytest.raises(UserError, match="s.lmdb"):
        store.Store(path)


# ---- writer ----------------------------------------------------------------------------------------------------------


def test_layouts(tmp_path):
    for place in ("img/MR_Heart_7_crop_sa.nii.gz", "flat.nii.gz", "seven/sax.nii.gz"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
        assert list(lmdb_writer.find_cines(tmp_path)) in (["MR_Heart_7"], ["seven"])
    (tmp_path / "img" / "MR_Heart_7.nii.gz").touch()
    shutil.rmtree(tmp_path / "seven")
    with pytest.raises(UserError, match="two files of subject MR_Heart_7"):
        lmdb_writer.find_cines(tmp_path)


def test_large_slices_are_cut_and_the_grid_follows(tmp_path, cohort, sax):
    run_main(lmdb_writer, "--out", tmp_path / "s.lmdb", "--input", cohort, "--size", 48)
    read = store.Store(tmp_path / "s.lmdb")
    np.testing.assert_array_equal(read["subject_001/001/004"], sax.data[1, 4, 8:56, 8:56])
    np.testing.assert_allclose(read.grid("subject_001").world([0, 0, 4]), sax.grid.world([8, 8, 4]))


# ---- split -----------------------------------------------------------------------------------------------------------


def test_split_depends_on_names_and_seed_alone():
    names = [f"s{n}" for n in range(20)]
    split = dataset.make_split(names, 0.1, 0.2, 3)
    assert split == dataset.make_split(names[::-1], 0.1, 0.2, 3) != dataset.make_split(names, 0.1, 0.2, 4)
    assert (len(split.train), len(split.val), len(split.test)) == (14, 2, 4)
    assert sorted(split.train + split.val + split.test) == sorted(names)
    assert split.part(split.val[0]) == "val"
    assert dataset.make_split(["a", "b"], 0.1, 0.1, 0).test == ()
    with pytest.raises(UserError, match="at least two"):
        dataset.make_split(["a"], 0.1, 0.1, 0)


def config(path, **more):
    return SimpleNamespace(
        **({"store": str(path), "split": "", "val_size": 0.3, "test_size": 0.3, "split_seed": 0} | more)
    )


def test_a_missing_split_is_made_once(tmp_path, slices):
    path = tmp_path / "split.json"
    _, split = dataset.open_store(config(slices, split=str(path)), RANK_0)
    assert [len(part) for part in (split.train, split.val, split.test)] == [1, 1, 1]
    _, again = dataset.open_store(config(slices, split=str(path), split_seed=9), RANK_0)
    assert again == split and again.hash == split.hash  # the file decides


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read"),
        ("[]", "lists of subjects"),
        ('{"train": ["subject_001"], "val": ["subject_001"]}', "listed twice"),
        ('{"train": ["subject_001"], "val": []}', "validate"),
        ('{"train": ["subject_001"], "val": ["nobody"]}', "nobody"),
    ],
)
def test_unusable_splits(tmp_path, slices, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(UserError, match=message):
        dataset.open_store(config(slices, split=str(tmp_path / "split.json")), RANK_0)


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_slices_are_normalised_by_subject_and_padded(slices, sax):
    source = store.Store(slices)
    data = dataset.Slices(source, ["subject_001"], 72)
    assert len(data) == 44 and set(data.subjects) == {"subject_001"}
    number = data.keys.index("subject_001/001/004")
    x = data[number]
    assert x.shape == (1, 72, 72) and x.dtype == torch.float32
    expected = Scale.of(sax.data).normalise(sax.data[1, 4])
    np.testing.assert_array_equal(x[0, 4:68, 4:68].numpy(), expected)
    assert (x[0, :4] == -1).all() and (x[0, :, -4:] == -1).all()
    with pytest.raises(UserError, match="no slices"):
        dataset.Slices(source, [], 64)


def test_training_slices_depend_on_seed_and_position_alone(slices):
    source = store.Store(slices)
    make = lambda seed: dataset.TrainingSlices(source, ["subject_001"], 64, "plausible", seed)  # noqa: E731
    data = make(0)
    assert torch.equal(data[3, 100], make(0)[3, 100])
    assert not torch.equal(data[3, 100], data[3, 101]) and not torch.equal(data[3, 100], make(1)[3, 100])
    plain = dataset.TrainingSlices(source, ["subject_001"], 64, "none", 0)
    assert torch.equal(plain[3, 100], dataset.Slices(source, ["subject_001"], 64)[3])


def no_change(**more):
    return replace(dataset.Augment(flip=0, rotate_deg=0, zoom=0, shift=0, gamma=1, bias=0), **more)


def image():
    """A smooth blob off the middle."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    return (2 * torch.exp(-(((x - 0.3) / 0.25) ** 2) - ((y + 0.1) / 0.4) ** 2) - 1)[None]


def test_augmentation_without_ranges_changes_nothing():
    torch.testing.assert_close(no_change()(image(), generator(0)), image(), rtol=0, atol=1e-5)


def test_every_change_stays_in_its_range():
    x, moved = image(), set()
    for n in range(40):
        changed = dataset.Augment()(x, generator(n))
        assert changed.shape == x.shape and changed.min() >= -1 and changed.max() <= 1
        moved.add(round(float(changed.mean()), 3))
        for flips in ([], [1], [2], [1, 2]):
            flipped = no_change(flip=0.5)(x, generator(n))
            if torch.allclose(flipped, x.flip(flips) if flips else x, atol=1e-5):
                break
        else:
            raise AssertionError("a flip is something else")
        grey = (no_change(gamma=1.25)(x, generator(n)) + 1) / 2
        base = ((x + 1) / 2).clamp(0, 1)
        inside = (base > 0.05) & (base < 0.95)
        exponent = (grey[inside].log() / base[inside].log()).mean()
        assert 0.8 <= exponent <= 1.25
        ratio = ((no_change(bias=0.15)(x, generator(n)) + 1) / base.mul(2))[inside]
        assert 0.85 - 1e-4 <= ratio.min() and ratio.max() <= 1.15 + 1e-4
    assert len(moved) > 30


def centre_of(x):
    weight = (x[0] + 1).double()
    rows, columns = torch.meshgrid(*[torch.arange(64.0, dtype=torch.float64)] * 2, indexing="ij")
    return torch.stack([(weight * rows).sum(), (weight * columns).sum()]) / weight.sum()


def test_shift_and_turn_are_as_large_as_said():
    x = image()
    shifts = torch.stack([centre_of(no_change(shift=6 / 128)(x, generator(n))) - centre_of(x) for n in range(40)])
    assert 2.0 < shifts.abs().max() <= 3.1  # 6 of 128 pixels are 3 of 64
    middle = torch.full((2,), 31.5, dtype=torch.float64)
    away = centre_of(x) - middle
    for n in range(20):
        turned = centre_of(no_change(rotate_deg=15.0)(x, generator(n))) - middle
        angle = torch.rad2deg(torch.atan2(turned[0], turned[1]) - torch.atan2(away[0], away[1]))
        assert abs(float(angle)) <= 15.5
        assert torch.linalg.norm(turned) == pytest.approx(float(torch.linalg.norm(away)), rel=0.05)


def test_phantom_values_fit_the_default_limits(slices):
    low, high = (store.Store(slices).meta["subject_001"]["limits"][k] for k in ("low", "high"))
    assert (
        0.04 < low < 0.1
        and 0.85 < high < make_phantom.image(np.ones(6), 0.0, *make_phantom.dense_points()).max() + 0.03
    )
