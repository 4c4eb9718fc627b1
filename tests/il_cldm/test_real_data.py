"""Real T1 from raw file to synthetic PET on its own grid. The PET is simulated on the subjects' own label maps."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from common import figures, nifti, phantom
from tests.helpers import run_script
from tests.il_cldm.tools import SHORT, TINY, captured

DATA = Path(os.environ.get("REAL_DATA_DIR", "")) / "brain_t1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "ixi_2mm").is_dir(), reason="REAL_DATA_DIR names no folder with brain_t1/ixi_2mm"),
]
SHAPE, SPACING = (28, 32, 28), 6.0
SUBJECTS = 10


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Raw T1 with skull, their label maps, and PET simulated on these, prepared as a user would."""
    root = tmp_path_factory.mktemp("real")
    for folder, ending in (("ixi_2mm", "_T1.nii.gz"), ("ixi_2mm_dlmuse", "_T1_DLMUSE.nii.gz")):
        (root / folder).mkdir()
        for path in sorted((DATA / folder).glob(f"*{ending}"))[:SUBJECTS]:
            shutil.copy(path, root / folder)
    done = run_script(["il_cldm/make_phantom.py", "--from_labels", root / "ixi_2mm_dlmuse", "--out", root])
    assert done.returncode == 0, done.stderr
    done = captured("--root", root, "--prepare", "--raw_mri", root / "ixi_2mm", "--raw_mask", root / "ixi_2mm_dlmuse",
                    "--raw_pet", root / "raw/pet", "--shape", *SHAPE, "--spacing_mm", SPACING)  # fmt: skip
    assert done.status == 0, done.err
    return root


def test_prepared_brains_are_whole_and_the_simulated_pet_follows_them(study):
    assert captured("--root", study, "--check", "--device", "cpu").status == 0
    record = json.loads((study / "data_info/prepare.json").read_text())
    regions = record["target_labels"], record["reference_labels"]
    truth = [row.split(",") for row in (study / "truth.csv").read_text().split()[1:]]
    assert len(truth) == SUBJECTS == len(record["subjects"])
    suvrs = []
    for name, label, _, _, measured in truth:
        folder = study / "data/process"
        mri, pet = (nifti.load(folder / f / name) for f in ("whole_MRI_112", "whole_Abeta_112"))
        labels = nifti.load_labels(folder / "regions_112" / name)
        fine = nifti.load_labels(study / "ixi_2mm_dlmuse" / f"{name[:-7]}_T1_DLMUSE.nii.gz")
        millilitres = [(v.data > 0).sum() * np.prod(v.spacing_mm) / 1000 for v in (labels, fine)]
        assert millilitres[0] == pytest.approx(millilitres[1], rel=0.03) and 1100 < millilitres[1] < 2000
        assert mri.shape == pet.shape == SHAPE and (mri.data[labels.data == 0] > 0).mean() < 0.05  # no skull
        white, fluid = (np.isin(labels.data, phantom.codes(phantom.MUSE, n)) for n in (("white_matter",), ("csf",)))
        assert mri.data[white].mean() > 1.3 * mri.data[fluid].mean()  # the tissues lie under their labels
        assert pet.data[white].mean() > 1.3 * pet.data[fluid].mean()
        suvrs.append((phantom.composite_suvr(pet.data, labels.data, *regions), float(measured), int(label)))
    at_6mm, at_2mm, label = np.array(suvrs).T
    assert np.corrcoef(at_6mm, at_2mm)[0, 1] > 0.95 and np.corrcoef(label, at_2mm)[0, 1] > 0.7


def test_mri_only_synthesis_overlays_the_raw_t1(study, tmp_path):
    base = ["--root", study, *TINY, *SHORT]
    done = captured(*base, "--train_aae", "--enc", "--train_ldm", "--aae_steps", 100, "--ldm_steps", 400)
    assert done.status == 0, done.err
    test = (study / "data_info/test.txt").read_text().split()
    (tmp_path / "mri").mkdir()
    for name in test:
        shutil.copy(study / "ixi_2mm" / f"{name[:-7]}_T1.nii.gz", tmp_path / "mri")
    for folder in ("data", "raw"):
        shutil.rmtree(study / folder)  # MRI, mask and checkpoints are all that synthesis needs
    done = captured(*base, "--gen", "--native", "--mri", tmp_path / "mri", "--raw_mask", study / "ixi_2mm_dlmuse",
                    "--out", tmp_path / "out", "--samples", 4, "--gen_batch", 4, "--steps", 15)  # fmt: skip
    assert done.status == 0, done.err
    for path in sorted((tmp_path / "mri").iterdir()):
        t1, made = nifti.load(path), nifti.load(tmp_path / "out" / path.name)
        assert made.shape == t1.shape
        np.testing.assert_allclose(made.affine, t1.affine, atol=1e-4)
        inside = nifti.load_labels(study / "ixi_2mm_dlmuse" / path.name.replace("_T1", "_T1_DLMUSE")).data > 0
        bright = made.data > np.quantile(made.data, 1 - inside.mean())  # as many voxels as the brain has
        dice = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
        figures.overlay(tmp_path / f"{path.stem}.png", t1.data, made.data, spacing_mm=t1.spacing_mm, threshold=0.15)
        # This little training gives hardly more than the mean brain, whose position in the head varies by a centimetre.
        print(path.name, f"Dice {dice:.3f}")
        assert dice > 0.75
