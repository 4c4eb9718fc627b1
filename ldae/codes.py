"""Semantic codes of a table's scans on disk, and the controls that a probe of them is compared with.

A folder of codes: codes.npz (`codes` (N, n) float32 in the order of the table, `scans`, `sizes` of the files in bytes),
codes.csv (scan, subject, session, diagnosis, age, sex, split, path from here), codes.json (what made them, hashes of
encoder, split and codes). Nothing is pickled. While an export runs, parts/ holds one file per scan, so that it can
continue.

    maker             the code of a scan
    ema_encoder       y of the trained semantic encoder (averaged weights), in eval mode
    encoder           the same with the weights as the optimizer left them
    untrained         y of the same encoder with random weights: what its architecture alone gives
    pooled_latents    per channel of the autoencoder's latent: mean, SD and block means
    intensity_pca     principal components of the down-sampled volumes, fitted on the training subjects

Probes standardise every number of a code by itself; but principal components, which share a unit, all by one SD: the
many small ones are mostly noise, and would count like the few large ones.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint, runtime, training
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import progress, write_json

if TYPE_CHECKING:
    from ldae.data_split import Split
    from ldae.dataset import Row, Volumes
    from ldae.model import LDAE

COLUMNS = ("scan", "subject", "session", "diagnosis", "age", "sex", "split", "path")
SPLITS = ("train", "val", "test")
CONTROLS = ("untrained", "pooled_latents", "intensity_pca")
REMEDY = "delete the folder and run `python ldae/scripts/save_semantic_latent.py` again"
POOLED_BLOCKS = 4  # block means of a latent channel, per axis
PCA_VOXELS = 16  # of the shortest axis of a down-sampled volume


# ---- codes in memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeRow:
    """Whose code it is; what the table does not say is None."""

    scan: str
    subject: str
    session: int | None
    diagnosis: str | None
    age: float | None
    sex: str | None
    split: str
    path: str


@dataclass(frozen=True)
class Codes:
    """Codes (N, n) float32 with their rows in the order of the table, and the record of what made them."""

    values: np.ndarray
    rows: tuple[CodeRow, ...]
    record: dict

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def code_dim(self) -> int:
        return self.values.shape[1]

    @property
    def name(self) -> str:
        """What made them, such as "ema_encoder" or "untrained"."""
        return self.record["maker"]["name"]

    @property
    def one_scale(self) -> bool:
        """Whether the numbers of a code share a unit, so that their sizes say what they are worth."""
        return self.name == "intensity_pca"

    @property
    def encoder(self) -> str | None:
        """Hash of the LDAE whose y they are (a control has none: then it says what it is); None if not known."""
        return self.record["maker"]["encoder"]

    @property
    def hash(self) -> str:
        """Sixteen hex digits over scans and codes."""
        digest = hashlib.sha256(json.dumps([row.scan for row in self.rows]).encode())
        digest.update(np.ascontiguousarray(self.values, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def column(self, name: str) -> np.ndarray:
        """One column of the rows, (N,); ages are float64 with NaN where the table has none."""
        values = [getattr(row, name) for row in self.rows]
        if name == "age":
            return np.array([np.nan if v is None else v for v in values], np.float64)
        return np.array(values, object)

    def select(self, mask: np.ndarray) -> Codes:
        """The rows where `mask` (N,) is true."""
        index = np.flatnonzero(mask)
        return replace(self, values=self.values[index], rows=tuple(self.rows[i] for i in index))


# ---- what makes codes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maker:
    """How a scan becomes a code. record: all that the codes depend on, in plain values, with "name" and "encoder".

    feature: scan -> (m,) float32. finish: features (N, m) and which rows train (N,) -> codes (N, n); None if the
    features are the codes.
    """

    record: dict
    feature: Callable[[Row], np.ndarray]
    finish: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def semantic_maker(ldae: LDAE, volumes: Volumes) -> Maker:
    """Codes y (code_dim,) of the trained encoder."""

    def feature(row):
        return ldae.semantic(volumes.tensor(row)[None])[0].cpu().numpy()

    return Maker(_maker_record(ldae, "ema_encoder") | {"encoder": ldae.hash}, feature)


def raw_maker(ldae: LDAE, volumes: Volumes, last_path: Path) -> Maker:
    """Codes of the encoder as the optimizer left it, not averaged, from the resume state of stage 3."""
    state = checkpoint.load(last_path).get("learned", {})
    encoder = copy.deepcopy(ldae.encoder)
    own = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    checkpoint.load_weights(encoder, own, last_path)
    record = _maker_record(ldae, "encoder") | {"weights": checkpoint.weights_hash(own)}
    return Maker(record, semantic_maker(replace(ldae, encoder=encoder), volumes).feature)


def untrained_maker(ldae: LDAE, volumes: Volumes, seed: int, backbone_weights: str = "") -> Maker:
    """The same encoder with random weights of `seed`, or with its 2D backbone from a file of ImageNet weights."""
    from ldae.encoder import SemanticEncoder, load_backbone

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SemanticEncoder(**ldae.settings["encoder"])
    if backbone_weights:
        load_backbone(encoder, backbone_weights)
    encoder = runtime.frozen_network(encoder, ldae.rt)
    record = _maker_record(ldae, "untrained") | {"seed": seed, "weights": checkpoint.weights_hash(encoder.state_dict())}
    return Maker(record, semantic_maker(replace(ldae, encoder=encoder), volumes).feature)


def pooled_maker(ldae: LDAE, volumes: Volumes) -> Maker:
    """Per channel of z_0: mean, SD, and the means of POOLED_BLOCKS^3 blocks; (C (2 + POOLED_BLOCKS^3),)."""

    def feature(row):
        z = ldae.compress(volumes.tensor(row)[None])[0]  # (C, d, h, w)
        blocks = F.adaptive_avg_pool3d(z, POOLED_BLOCKS).flatten()
        moments = torch.cat([z.mean((1, 2, 3)), z.std((1, 2, 3), correction=0)])
        return torch.cat([moments, blocks]).cpu().numpy()

    return Maker(_maker_record(ldae, "pooled_latents") | {"blocks": POOLED_BLOCKS}, feature)


def pca_maker(ldae: LDAE, volumes: Volumes, split_hash: str, components: int) -> Maker:
    """Principal components of down-sampled intensities; the components are those of the training subjects' scans."""

    def feature(row):
        return downsampled(volumes.tensor(row)).numpy()

    def finish(features, train):
        return principal_components(features, train, components)

    record = _maker_record(ldae, "intensity_pca") | {"components": components, "voxels": PCA_VOXELS}
    return Maker(record | {"fitted_on": f"train of split {split_hash}"}, feature, finish)


def _maker_record(ldae, name):
    """`encoder` is the LDAE's hash only where an edit of these codes means something to it."""
    return {"name": name, "encoder": f"{name} (beside {ldae.hash})", "plane": ldae.plane,
            "preparation": ldae.preparation.to_dict()}  # fmt: skip


def downsampled(x: torch.Tensor) -> torch.Tensor:
    """Block means of a volume (1, D, H, W) whose shortest axis keeps PCA_VOXELS of them, as a vector."""
    factor = max(1.0, min(x.shape[1:]) / PCA_VOXELS)
    return F.adaptive_avg_pool3d(x, [max(1, round(n / factor)) for n in x.shape[1:]]).flatten()


def principal_components(features: np.ndarray, train: np.ndarray, components: int) -> np.ndarray:
    """Scores (N, k) of features (N, m); mean and axes come from the rows of `train` (N,), k is at most their rank."""
    features = features.astype(np.float64)
    centre = features[train].mean(0)
    _, size, axes = np.linalg.svd(features[train] - centre, full_matrices=False)
    rank = int((size > 1e-10 * size[0]).sum()) if len(size) and size[0] > 0 else 0
    if rank == 0:
        raise UserError("intensity_pca: the training volumes are all the same, or only one; check the table")
    return ((features - centre) @ axes[: min(components, rank)].T).astype(np.float32)


# ---- export ---------------------------------------------------------------------------------------------------------


def export(
    folder: Path, rows: list[Row], split: Split, maker: Maker, rt: runtime.Runtime, *, overwrite=False, **about
) -> Codes:
    """Write the codes of `rows`, in this order, to a folder; each rank takes its share. Returns what is then there.

    Codes of the same maker are kept as far as their scans' files have the same size, those of another are refused
    without `overwrite`. about: further entries of codes.json.
    """
    folder, record = Path(folder), {"maker": maker.record, "split": split.hash, **about}
    sizes = {row.scan: _file_size(row) for row in rows}
    table = [_code_row(row, split, folder) for row in rows]
    kept = claim_folder(folder, record, overwrite, rt)
    if is_complete(kept, record, table, sizes):
        rt.print(f"codes of {len(rows)} scans are complete in {folder}")
        return kept
    known = {} if kept is None or maker.finish else dict(zip(kept.column("scan"), kept.values, strict=True))
    known = {scan: code for scan, code in known.items() if kept.record["sizes"][scan] == sizes.get(scan)}

    # ---- loop over scans
    missing = [row for row in rows if row.scan not in known and _read_part(folder, row.scan, sizes[row.scan]) is None]
    rt.barrier()  # every rank has seen the same parts before any is added
    mine = rt.shard(missing)
    with progress(len(mine), 0, f"codes ({maker.record['name']})", enabled=rt.is_main) as bar:
        for row in mine:
            _save_part(folder, row.scan, maker.feature(row), sizes[row.scan])
            bar.update()

    # ---- finish
    rt.barrier()
    if rt.is_main:
        found = [known[r.scan] if r.scan in known else _read_part(folder, r.scan, sizes[r.scan]) for r in rows]
        values = np.stack(found)
        if maker.finish:
            values = maker.finish(values, np.array([row.split == "train" for row in table]))
        save(folder, Codes(values.astype(np.float32), tuple(table), record), sizes)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    rt.barrier()
    return load(folder)


def is_complete(kept: Codes | None, record: dict, table: list[CodeRow], sizes: dict[str, int]) -> bool:
    """Whether these codes are all that is asked for."""
    if kept is None or kept.record["sizes"] != sizes:
        return False
    return list(kept.rows) == table and all(kept.record.get(key) == value for key, value in record.items())


def claim_folder(folder: Path, record: dict, overwrite: bool, rt: runtime.Runtime) -> Codes | None:
    """Enter an export into codes.json; returns the codes of the same maker that are there already.

    UserError if the folder holds codes of another maker or files that are not ours; with `overwrite` the former go.
    """
    path, npz = record_path(folder), folder / "codes.npz"
    old = training.read_record(path, ("maker", "split", "complete"), REMEDY) if path.is_file() else None
    if old is None and npz.exists():
        raise UserError(f"{npz} was not written by save_semantic_latent.py; name another --output_dir")
    same = old is not None and old["maker"] == record["maker"] and old["split"] == record["split"]
    if old is not None and not same and not overwrite:
        before, now = ({**r["maker"], "split": r["split"]} for r in (old, record))
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        raise UserError(f"{folder} holds other codes (of {old['maker']['name']}; another {', '.join(keys)}): add "
                        "--overwrite or name another --output_dir")  # fmt: skip
    kept = load(folder) if same and old["complete"] else None
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main and not same:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        for name in ("codes.npz", "codes.csv"):
            (folder / name).unlink(missing_ok=True)
        write_json(path, record | {"complete": False})
    rt.barrier()
    return kept


def _file_size(row):
    try:
        return row.path.stat().st_size
    except OSError as error:
        raise UserError(f"{row.scan}: {row.path} cannot be read ({error.strerror}); correct the table") from error


def _code_row(row, split, folder):
    path = Path(os.path.relpath(row.path, folder)).as_posix()
    return CodeRow(row.scan, row.subject, row.session, row.diagnosis, row.age, row.sex, split.of(row.subject), path)


def _part_path(folder, scan):
    return folder / "parts" / f"{scan}.npz"


def _save_part(folder, scan, feature, size):
    if not np.isfinite(feature).all():
        raise UserError(f"the code of {scan} is not finite: check the scan and the network")
    buffer = io.BytesIO()
    np.savez(buffer, feature=feature, size=size)
    with replacing(_part_path(folder, scan)) as file:
        file.write(buffer.getvalue())


def _read_part(folder, scan, size):
    path = _part_path(folder, scan)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["feature"] if int(arrays["size"]) == size else None


# ---- files ----------------------------------------------------------------------------------------------------------


def record_path(folder: Path) -> Path:
    return Path(folder) / "codes.json"


def save(folder: Path, codes: Codes, sizes: dict[str, int] | None = None) -> None:
    """The three files of a folder of codes; codes.json says that they are complete only after all are there."""
    folder, scans = Path(folder), [row.scan for row in codes.rows]
    written = {key: value for key, value in codes.record.items() if key != "sizes"}
    write_json(record_path(folder), written | {"complete": False})
    buffer, text = io.BytesIO(), io.StringIO()
    sizes = sizes or dict.fromkeys(scans, -1)
    np.savez(buffer, codes=codes.values, scans=np.array(scans), sizes=np.array([sizes[scan] for scan in scans]))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([["" if getattr(row, c) is None else getattr(row, c) for c in COLUMNS] for row in codes.rows])
    for name, content in (("codes.npz", buffer.getvalue()), ("codes.csv", text.getvalue().encode())):
        with replacing(folder / name) as file:
            file.write(content)
    counts = {name: sum(row.split == name for row in codes.rows) for name in SPLITS}
    write_json(record_path(folder), written | {"complete": True, "hash": codes.hash, "scans": counts,
                                               "code_dim": codes.code_dim})  # fmt: skip


def load(folder: Path) -> Codes:
    """The codes of a folder; UserError if there are none, they are damaged, or their export has not ended."""
    folder = Path(folder)
    if not record_path(folder).is_file():
        raise UserError(f"no codes in {folder}; export them with `python ldae/scripts/save_semantic_latent.py`")
    record = training.read_record(record_path(folder), ("maker", "split", "complete"), REMEDY)
    if not record["complete"]:
        raise UserError(f"the export of codes to {folder} has not ended; run the same command again")
    try:
        with np.load(folder / "codes.npz", allow_pickle=False) as arrays:
            values, scans, sizes = (arrays[name] for name in ("codes", "scans", "sizes"))
        with open(folder / "codes.csv", encoding="utf-8", newline="") as file:
            rows = tuple(_parse_row(entry) for entry in csv.DictReader(file))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"the codes in {folder} are damaged ({error}); {REMEDY}") from error
    codes = Codes(values, rows, record | {"sizes": dict(zip(scans.tolist(), sizes.tolist(), strict=True))})
    if [row.scan for row in rows] != scans.tolist() or record.get("hash", codes.hash) != codes.hash:
        raise UserError(f"codes.npz, codes.csv and codes.json in {folder} do not belong together; {REMEDY}")
    return codes


def _parse_row(entry):
    session, age = entry["session"], entry["age"]
    return CodeRow(entry["scan"], entry["subject"], int(session) if session else None, entry["diagnosis"] or None,
                   float(age) if age else None, entry["sex"] or None, entry["split"], entry["path"])  # fmt: skip


# ---- the original's files -------------------------------------------------------------------------------------------


def import_embeddings(files: dict[str, Path], classes, *, trust_pickle=False) -> Codes:
    """Codes of the original's embedding files by split, {"train": FILE, "test": FILE}.

    A file is a dict of embeddings (N, n), labels (N,), age (N,), subject_id, path and session_number; `classes` are the
    diagnoses behind the labels, in alphabetical order. Files of tensors and plain values load safely, others only with
    `trust_pickle`. UserError for anything else.
    """
    names, values, rows = sorted(classes), [], []
    for split, path in files.items():
        content = checkpoint.load(Path(path), trust_pickle=trust_pickle)
        missing = [key for key in ("embeddings", "labels", "subject_id") if key not in content]
        if missing:
            raise UserError(f"{path} has no {', '.join(missing)}; give an embedding file of the original")
        part = np.asarray(content["embeddings"], np.float32)
        n = len(part)
        labels, ages, sessions, paths = (
            np.asarray(content[key]).tolist() if content.get(key) is not None else [None] * n
            for key in ("labels", "age", "session_number", "path")
        )
        subjects = list(content["subject_id"])
        if part.ndim != 2 or any(len(column) != n for column in (labels, ages, sessions, paths, subjects)):
            raise UserError(f"{path} has columns of unlike lengths; export it again")
        if any(not 0 <= label < len(names) for label in labels):
            raise UserError(f"{path} has labels up to {max(labels):g}, but --classes names {len(names)}: name them all")
        values.append(part)
        for i in range(n):
            session, age = sessions[i], ages[i]
            rows.append(CodeRow(f"{split}_{i:05d}", str(subjects[i]), None if session is None else int(session),
                                names[int(labels[i])], None if age is None or np.isnan(age) else float(age), None,
                                split, "" if paths[i] is None else Path(str(paths[i])).name))  # fmt: skip
    maker = {"name": "imported", "encoder": None, "files": {split: Path(path).name for split, path in files.items()}}
    record = {"maker": maker, "split": None, "complete": True}
    return Codes(np.concatenate(values), tuple(rows), record)
