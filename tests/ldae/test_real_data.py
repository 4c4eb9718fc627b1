"""The whole chain on real T1: 22 IXI subjects with age and sex, and one person at two times, at a small size.

Nobody here has dementia, and 22 subjects prove nothing about age or sex: what is tested is that every stage works on
real input, that probes report intervals, and that every output lies where its input lies.
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common import nifti
from ldae import codes, dataset
from ldae.scripts import build_table, check, generate, save_compressed_latent, save_semantic_latent, train_manipulation
from tests.helpers import run_main
from tests.ldae import stages

DATA = Path(os.environ.get("REAL_DATA_DIR", "")) / "brain_t1"
SCANS, LABELS, PAIR = DATA / "ixi_2mm", DATA / "ixi_2mm_dlmuse", DATA / "longitudinal_ms"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SCANS.is_dir() and LABELS.is_dir() and PAIR.is_dir()),
        reason="REAL_DATA_DIR names no folder with brain_t1/{ixi_2mm,ixi_2mm_dlmuse,longitudinal_ms}",
    ),
]
SHAPE, SPACING_MM = (24, 28, 24), 8.0
VOLUME = ["--shape", *SHAPE, "--spacing_mm", SPACING_MM, "--crop", "head", "--mask", "head"]
LOOP = "--val_size 0.2 --test_size 0.2 --val_every 4 --max_slices 28".split()


def run_stage(stage, root, *args):
    """A stage at the tests' tiny size, but for the volumes; diagnoses play no part."""
    words = [word for word in stages.command(stage)[1:] if stage == "ldae_repr_learn" or word != "--max_slices"]
    loop = LOOP if stage == "ldae_repr_learn" else LOOP[:-2]
    more = [] if stage == "aekl" else ["--set", "classes="]
    run_main(stages.run_cli, *words, *VOLUME, *loop, "--steps", 60, "--root", root, *more, *args)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder to table and split, then every stage, as the README lists them."""
    root = tmp_path_factory.mktemp("real")
    table = root / "data" / "dataset.csv"
    run_main(build_table, "--folder", SCANS, "--out", table, "--masks", LABELS, "--split", root / "split.json",
             "--val_size", 0.2, "--test_size", 0.2)  # fmt: skip
    run_stage("aekl", root)
    run_main(save_compressed_latent, "--root", root, *stages.COMMON)
    run_stage("ldae_pretrain", root)
    run_stage("ldae_repr_learn", root)
    run_main(save_semantic_latent, "--root", root, *stages.COMMON, "--with_controls")
    run_main(train_manipulation, "--root", root, "--preset", "tiny", "--targets", "age", "sex", "--cv_splits", "train",
             "val", "test")  # fmt: skip
    return root


def test_table_holds_everybody_with_age_and_sex(study):
    rows, people = dataset.read_table(study / "data/dataset.csv"), pd.read_csv(SCANS / "participants.csv")
    assert len(rows) == 22 and len({row.subject for row in rows}) == 22
    assert sorted(row.age for row in rows) == sorted(people.Age) and {row.sex for row in rows} == {"F", "M"}


def test_check_speaks_of_the_skull(study, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_main(check, "--csv_path", study / "data/dataset.csv", "--out", tmp_path / "report", "--shape", *SHAPE,
                 "--spacing_mm", SPACING_MM)  # fmt: skip
        raise SystemExit(0)
    assert stop.value.code in (0, None)
    text = "".join(path.read_text() for path in (tmp_path / "report").glob("*.csv"))
    assert "skull" in text  # IXI scans come with their heads


def test_probes_report_intervals_as_they_are(study):
    age, sex = (json.loads(path.read_text()) for path in (study / "probes/age.json", study / "probes/sex_F_vs_M.json"))
    found = age["cross_validation"]["metrics"]
    assert found["rmse"]["value"] >= found["mae"]["value"] > 0 and found["mae"]["ci95"][0] < found["mae"]["ci95"][1]
    assert set(age["controls"]) == {"untrained", "pooled_latents", "intensity_pca"}
    low, high = sex["cross_validation"]["metrics"]["auc"]["ci95"]
    assert 0 <= low < high <= 1 and high - low > 0.1  # 22 subjects: wide
    assert len(codes.load(study / "codes")) == 22


def test_two_times_of_one_person(study, tmp_path):
    """Reconstruction and interpolation of scans that no table names, each on its own grid."""
    scans = sorted(PAIR.glob("*_T1W.nii.gz"))
    model = ["--root", study, *stages.COMMON, "--steps", 4]
    run_main(generate, "reconstruct", *model, "--input", *scans, "--output_dir", tmp_path / "r")
    run_main(generate, "interpolate", *model, "--input", *scans, "--alphas", 0, 0.5, 1, "--output_dir", tmp_path / "i")
    made = sorted((tmp_path / "r").glob("*_encoded.nii.gz"))
    assert len(made) == 2 and len(list((tmp_path / "i").glob("*.nii.gz"))) == 3
    for source, path in zip(scans, made, strict=True):
        a, b = nifti.load(source), nifti.load(path)  # both in RAS+ order, whatever the file's
        assert a.shape == b.shape
        np.testing.assert_allclose(a.affine, b.affine, atol=1e-3)
        assert np.corrcoef(a.data.ravel(), b.data.ravel())[0, 1] > 0.5  # a coarse likeness, and in the right place
