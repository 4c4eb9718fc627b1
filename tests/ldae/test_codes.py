"""Codes on disk: one per scan in the order of the table, written once, continued after a stop, foreign ones refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import runtime
from common.cli import UserError
from ldae import codes, data_split, dataset
from tests.ldae.stages import CODE_DIM, untrained_ldae


@pytest.fixture(scope="module")
def rt():
    with runtime.start("cpu", "fp32") as rt:
        yield rt


@pytest.fixture(scope="module")
def study(cohort, rt):
    """Table, split, volumes and an LDAE of random weights, none of them to be changed."""
    rows = dataset.read_table(cohort / "data" / "dataset.csv")[::-1]  # not sorted by anything
    split, _ = data_split.make(rows, 0.2, 0.2, 0)
    ldae = untrained_ldae(rt=rt)
    return rows, split, dataset.Volumes(ldae.preparation, None), ldae


@pytest.fixture(scope="module")
def exported(study, rt, tmp_path_factory):
    rows, split, volumes, ldae = study
    folder = tmp_path_factory.mktemp("codes") / "codes"
    codes.export(folder, rows, split, codes.semantic_maker(ldae, volumes), rt, model_name="m")
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, exported.parent / tmp_path.name)


def counting(maker, calls, fail_after=None):
    """The maker, noting whose code is asked for; fails after some."""

    def feature(row):
        if fail_after is not None and len(calls) == fail_after:
            raise KeyboardInterrupt
        calls.append(row.scan)
        return maker.feature(row)

    return replace(maker, feature=feature)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_codes_are_those_of_the_encoder_in_table_order(study, exported):
    """Fact 29: (N, code_dim), row order = table order, every split in it, with a column that says which."""
    rows, split, volumes, ldae = study
    found = codes.load(exported)
    assert found.values.shape == (len(rows), CODE_DIM) and found.values.dtype == np.float32
    assert [row.scan for row in found.rows] == [row.scan for row in rows]
    for i, row in enumerate(rows):
        kept = found.rows[i]
        assert torch.equal(torch.from_numpy(found.values[i]), ldae.semantic(volumes.tensor(row)[None])[0])
        assert (kept.subject, kept.session, kept.diagnosis, kept.age, kept.sex) == (
            row.subject, row.session, row.diagnosis, row.age, row.sex)  # fmt: skip
        assert kept.split == split.of(row.subject) and (exported / kept.path).resolve() == row.path.resolve()
    assert set(found.column("split")) == {"train", "val", "test"}
    assert not ldae.encoder.training and np.ptp(found.values, axis=0).max() > 0.1  # eval mode; scans differ
    record = json.loads((exported / "codes.json").read_text())
    assert record["hash"] == found.hash and record["split"] == split.hash and record["complete"]
    assert record["maker"]["encoder"] == ldae.hash == found.encoder and found.name == "ema_encoder"
    assert record["scans"] == {s: sum(split.of(r.subject) == s for r in rows) for s in ("train", "val", "test")}
    assert not (exported / "parts").exists()


def test_columns_and_selection(exported):
    found = codes.load(exported)
    assert found.column("age").dtype == np.float64 and np.isfinite(found.column("age")).all()
    part = found.select(found.column("diagnosis") == "AD")
    assert 0 < len(part) < len(found) and {row.diagnosis for row in part.rows} == {"AD"}
    assert part.hash != found.hash and part.values.shape[0] == len(part.rows)


def test_a_stopped_export_continues_to_the_same_bytes(study, exported, rt, tmp_path):
    rows, split, volumes, ldae = study
    maker, calls = codes.semantic_maker(ldae, volumes), []
    folder = exported.parent / "again"  # beside the other, so that relative paths are alike
    with pytest.raises(KeyboardInterrupt):
        codes.export(folder, rows, split, counting(maker, calls, fail_after=20), rt, model_name="m")
    assert len(list((folder / "parts").iterdir())) == 20
    with pytest.raises(UserError, match="the export of codes to .* has not ended; run the same command again"):
        codes.load(folder)
    codes.export(folder, rows, split, counting(maker, calls), rt, model_name="m")
    assert calls == [row.scan for row in rows]  # nothing twice
    assert files(folder) == files(exported)


def test_finished_codes_are_kept(study, copy, rt, capsys):
    rows, split, volumes, ldae = study
    before, calls = files(copy), []
    codes.export(copy, rows, split, counting(codes.semantic_maker(ldae, volumes), calls), rt, model_name="m")
    assert calls == [] and files(copy) == before and "are complete" in "".join(capsys.readouterr())


def test_new_and_changed_scans_alone_are_encoded(study, copy, rt, tmp_path):
    rows, split, volumes, ldae = study
    maker, calls = codes.semantic_maker(ldae, volumes), []
    fewer = codes.export(copy, rows[3:], split, counting(maker, calls), rt)
    assert calls == [] and [row.scan for row in fewer.rows] == [row.scan for row in rows[3:]]
    more = codes.export(copy, rows, split, counting(maker, calls), rt)
    assert calls == [row.scan for row in rows[:3]] and len(more) == len(rows)
    other = tmp_path / rows[0].path.name
    other.write_bytes(rows[0].path.read_bytes() + b"\0\0")  # gzip ignores what follows
    codes.export(copy, [replace(rows[0], path=other), *rows[1:]], split, counting(maker, calls), rt)
    assert calls[3:] == [rows[0].scan]


def test_codes_of_another_maker_are_refused(study, copy, rt):
    rows, split, volumes, ldae = study
    before = files(copy)
    other = replace(ldae, hash="3" * 16)
    with pytest.raises(UserError, match=r"holds other codes \(of ema_encoder; another encoder\): add --overwrite"):
        codes.export(copy, rows, split, codes.semantic_maker(other, volumes), rt)
    moved = replace(split, subjects=split.subjects | {"train": split.subjects["val"], "val": split.subjects["train"]})
    with pytest.raises(UserError, match=r"another split"):
        codes.export(copy, rows, moved, codes.semantic_maker(ldae, volumes), rt)
    assert files(copy) == before
    found = codes.export(copy, rows, split, codes.semantic_maker(other, volumes), rt, overwrite=True)
    assert found.encoder == "3" * 16 and set(files(copy)) == set(before)


def test_foreign_files_are_not_touched(study, rt, tmp_path):
    rows, split, volumes, ldae = study
    (tmp_path / "codes.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match="was not written by save_semantic_latent.py; name another --output_dir"):
        codes.export(tmp_path, rows, split, codes.semantic_maker(ldae, volumes), rt, overwrite=True)
    assert files(tmp_path) == {"codes.npz": b"mine"}


def test_damaged_codes(copy, tmp_path):
    with pytest.raises(UserError, match="no codes in .*; export them with `python ldae/scripts/save_semantic_latent"):
        codes.load(tmp_path / "nothing")
    table = (copy / "codes.csv").read_text()
    (copy / "codes.csv").write_text("\n".join(table.splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="do not belong together; delete the folder and run"):
        codes.load(copy)
    (copy / "codes.csv").write_text(table)
    (copy / "codes.npz").write_bytes((copy / "codes.npz").read_bytes()[:-50])
    with pytest.raises(UserError, match="are damaged"):
        codes.load(copy)
    (copy / "codes.json").write_text("{}")
    with pytest.raises(UserError, match="is no record of this program"):
        codes.load(copy)


def test_a_code_that_is_not_finite_is_an_error(study, rt, tmp_path):
    rows, split, _, _ = study
    maker = codes.Maker({"name": "x", "encoder": None}, lambda row: np.array([1.0, np.nan], np.float32))
    with pytest.raises(UserError, match=f"the code of {rows[0].scan} is not finite"):
        codes.export(tmp_path / "codes", rows, split, maker, rt)
    gone = replace(rows[0], path=Path("gone.nii.gz"))
    with pytest.raises(UserError, match="gone.nii.gz cannot be read"):
        codes.export(tmp_path / "codes", [gone], split, maker, rt)


# ---- controls


def test_untrained_encoder(study):
    rows, _, volumes, ldae = study
    makers = [codes.untrained_maker(ldae, volumes, seed) for seed in (0, 0, 1)]
    a, b, c = (maker.feature(rows[0]) for maker in makers)
    assert a.shape == (CODE_DIM,) and np.array_equal(a, b) and not np.allclose(a, c)
    trained = codes.semantic_maker(ldae, volumes)
    assert not np.allclose(a, trained.feature(rows[0])) and makers[0].record == makers[1].record != makers[2].record
    assert makers[0].record["encoder"].startswith("untrained")  # an edit of such codes means nothing to the decoder


def test_pretrained_backbone_as_control(study, tmp_path):
    rows, _, volumes, ldae = study
    path = tmp_path / "imagenet.pth"
    torch.save({k: torch.randn_like(v) * 0.1 for k, v in ldae.encoder.backbone.state_dict().items()}, path)
    plain, pretrained = (codes.untrained_maker(ldae, volumes, 0, str(p)) for p in ("", path))
    assert plain.record["weights"] != pretrained.record["weights"]
    assert not np.allclose(plain.feature(rows[0]), pretrained.feature(rows[0]))


def test_pooled_latents(study):
    rows, _, volumes, ldae = study
    found = codes.pooled_maker(ldae, volumes).feature(rows[0])
    z = ldae.compress(volumes.tensor(rows[0])[None])[0].numpy()  # (2, 4, 5, 4)
    C = len(z)
    assert found.shape == (C * (2 + 4**3),)
    assert np.allclose(found[:C], z.mean((1, 2, 3)), atol=1e-6)
    assert np.allclose(found[C : 2 * C], z.std((1, 2, 3)), atol=1e-6)
    assert np.allclose(found[2 * C], z[0, 0, :2, 0].mean(), atol=1e-6)  # 5 voxels in 4 blocks: the first two


def test_pca_is_that_of_the_training_subjects(study, rt, tmp_path):
    """As scikit-learn's, fitted on training rows; test scans do not change it."""
    from sklearn.decomposition import PCA

    rows, split, volumes, ldae = study
    maker = codes.pca_maker(ldae, volumes, split.hash, 5)
    found = codes.export(tmp_path / "pca", rows, split, maker, rt)
    train = found.column("split") == "train"
    features = np.stack([maker.feature(row) for row in rows]).astype(np.float64)
    expected = PCA(5, svd_solver="full").fit(features[train]).transform(features)
    signs = np.sign((expected * found.values).sum(0))
    assert np.allclose(found.values, expected * signs, atol=1e-4)
    changed = features.copy()
    changed[~train] *= 3
    assert np.allclose(maker.finish(changed, train)[train], found.values[train], atol=1e-5)
    assert maker.finish(features[:4], np.array([True] * 3 + [False])).shape == (4, 2)  # 3 scans span two directions
    with pytest.raises(UserError, match="training volumes are all the same, or only one"):
        maker.finish(features[:2], np.array([True, False]))
    calls = []
    codes.export(tmp_path / "pca", rows, split, counting(maker, calls), rt)
    assert calls == []


def test_down_sampling():
    x = torch.arange(32 * 40 * 32, dtype=torch.float32).reshape(1, 32, 40, 32)
    found = codes.downsampled(x)
    assert found.shape == (16 * 20 * 16,) and torch.isclose(found[0], x[0, :2, :2, :2].mean())
    assert torch.equal(codes.downsampled(x[:, :10, :10, :10]), x[0, :10, :10, :10].flatten())


# ---- the original's files


def embeddings(n, labels, plain=True):
    subjects = [f"s{i // 2}" for i in range(n)]
    values, ages = torch.randn(n, 8), torch.tensor([70.0] * (n - 1) + [float("nan")])
    content = {"embeddings": values, "labels": torch.tensor(labels, dtype=torch.float32), "age": ages,
               "subject_id": subjects, "path": [f"scans/{s}.nii" for s in subjects],
               "session_number": [None, *range(1, n)]}  # fmt: skip
    return content if plain else content | {"embeddings": values.numpy(), "age": ages.numpy()}


def test_embeddings_of_the_original(tmp_path):
    torch.save(embeddings(4, [0, 1, 2, 0]), tmp_path / "train.pt")
    torch.save(embeddings(2, [1, 1], plain=False), tmp_path / "test.pt")
    parts = {"train": tmp_path / "train.pt", "test": tmp_path / "test.pt"}
    with pytest.raises(UserError, match="holds pickled objects.*--trust_pickle"):
        codes.import_embeddings(parts, ("AD", "CN", "MCI"))
    found = codes.import_embeddings(parts, ("MCI", "AD", "CN"), trust_pickle=True)
    assert [row.diagnosis for row in found.rows] == ["AD", "CN", "MCI", "AD", "CN", "CN"]
    assert list(found.column("split")) == ["train"] * 4 + ["test"] * 2 and found.encoder is None
    assert found.rows[0].session is None and found.rows[1].session == 1 and found.rows[3].age is None
    codes.save(tmp_path / "codes", found)
    again = codes.load(tmp_path / "codes")
    assert np.array_equal(again.values, found.values) and again.rows == found.rows
    with pytest.raises(UserError, match="has labels up to 2, but --classes names 2"):
        codes.import_embeddings({"train": tmp_path / "train.pt"}, ("AD", "CN"))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="has no embeddings, labels, subject_id; give an embedding file"):
        codes.import_embeddings({"train": tmp_path / "other.pt"}, ("AD", "CN"))
