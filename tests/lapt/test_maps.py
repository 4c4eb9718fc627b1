"""Further images as channels: perfusion maps beside the frames of a CTP or instead of it, from raw files to samples."""

import csv
import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from common import nifti
from common.cli import UserError
from lapt import dataset, diffusion, inference, isles, ldm, preprocessing, raw, sample
from lapt.config import CONFIGS
from lapt.dataset import Intensity
from tests.helpers import run_main
from tests.lapt import stages
from tests.lapt.untrained import RT, STATS, untrained_model

MAPS = ("cbf", "delay")


def prepare(source, out, *more):
    run_main(preprocessing, "--input_dir", source, "--output_dir", out, "--val_size", 0.15, "--test_size", 0.2,
             "--num_workers", 1, *more)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def with_maps(cohort, tmp_path_factory):
    """The cohort of `prepared` with two of its maps."""
    return prepare(cohort / "raw", tmp_path_factory.mktemp("maps") / "data", "--maps", *MAPS)


@pytest.fixture(scope="module")
def model_run(with_maps, prepared):
    """An LDM on frames and maps, on an autoencoder that was trained with the data prepared without maps."""
    runs = with_maps.parent / "runs"
    stages.run("ldm", with_maps, runs, f"paths.vqgan={stages.trained(prepared) / 'vqgan'}")
    return runs / "ldm"


# ---- prepared data and network input --------------------------------------------------------------------------------


def test_maps_follow_the_frames_and_are_measured_in_the_training_set(with_maps, prepared, cohort):
    pooled = {name: [] for name in MAPS}
    for case, before in zip(dataset.read_cases(with_maps), dataset.read_cases(prepared), strict=True):
        assert case.time_points == before.time_points == 15 and case.maps == MAPS and before.maps == ()
        channels = case.volume("ctp")
        np.testing.assert_array_equal(channels[:15], before.volume("ctp"))
        for name, image in zip(MAPS, channels[15:], strict=True):
            np.testing.assert_array_equal(image, nifti.load(cohort / "raw" / case.name / f"{name}.nii.gz").data)
    for case in dataset.read_cases(with_maps, "train"):
        for name, image in zip(MAPS, case.volume("ctp")[15:], strict=True):
            pooled[name].append(image[case.volume("mask") > 0])
    found = Intensity.of_folder(with_maps).maps
    assert tuple(found) == MAPS
    for name, window in found.items():
        values = np.concatenate(pooled[name])
        np.testing.assert_allclose(window, np.quantile(values, raw.QUANTILES), atol=1e-3 * np.ptp(values))
    with open(with_maps / "manifest.csv", newline="") as file:
        assert {row["maps"] for row in csv.DictReader(file)} == {"cbf delay"}


def test_every_map_is_scaled_by_its_own_window():
    intensity = Intensity("quantile", "training", STATS, (0.0, 100.0), 2, maps={"cbf": (0.0, 60.0), "tmax": (2, 12)})
    ctp, mask = np.array([[0, 50, 50], [100, 300, 50], [30, 90, 30], [2, 12, 7]], np.float32), np.array([1, 1, 0])
    np.testing.assert_allclose(intensity.normalise_ctp(ctp, mask), [[-1, 0, -1], [1, 1, -1], [0, 1, -1], [-1, 1, -1]])
    assert intensity.channels == 4
    assert Intensity.from_dict(json.loads(json.dumps(intensity.to_dict()))) == intensity


def test_networks_of_before_there_were_maps_load():
    known = Intensity("quantile", "training", STATS, (0.0, 200.0), 4).to_dict()
    assert "maps" not in known and Intensity.from_dict(known).maps == {}


def test_a_table_of_cases_names_the_maps(cohort, with_maps, tmp_path):
    rows = [{"case": path.name} | {what: path / f"{what}.nii.gz" for what in (*raw.IMAGES, *MAPS)}
            for path in sorted((cohort / "raw").iterdir())]  # fmt: skip
    with open(tmp_path / "cases.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run_main(preprocessing, "--cases", tmp_path / "cases.csv", "--output_dir", tmp_path / "out", "--maps", *MAPS,
             "--val_size", 0.15, "--test_size", 0.2, "--num_workers", 1)  # fmt: skip
    for case, other in zip(dataset.read_cases(tmp_path / "out"), dataset.read_cases(with_maps), strict=True):
        np.testing.assert_array_equal(case.volume("ctp"), other.volume("ctp"))
    with pytest.raises(UserError, match="no column tmax; add it: case, patient, ctp, .*, tmax"):
        raw.read_table(tmp_path / "cases.csv", ("tmax",))


def test_maps_on_another_grid_are_resampled_where_that_is_allowed(raw_cases):
    path = raw_cases / "case_0001" / "cbf.nii.gz"
    coarse = nifti.resample(nifti.load(path), (8, 8, 16))
    nifti.save(path, coarse.data, coarse.affine)
    source, rules = raw.find(raw_cases, MAPS)[0], raw.Rules(maps=MAPS)
    with pytest.raises(UserError, match="another grid than the CTP .*cbf.nii.gz"):
        raw.read(source, rules)
    study = raw.read(source, dataclasses.replace(rules, to_ctp_grid=True))
    fine = raw.read(raw.find(raw_cases, ("delay",))[0], raw.Rules(maps=("delay",)))
    assert study.ctp.shape == (17, *study.mask.shape) and study.time_points == 15
    np.testing.assert_array_equal(study.ctp[16], fine.ctp[15])


def test_bad_maps(raw_cases, tmp_path, capsys):
    out = ("--input_dir", raw_cases, "--output_dir", tmp_path / "out", "--num_workers", 1)
    for words, message in (
        (("--maps", "ctp"), "'ctp' must be the name of a further image"),
        (("--maps", "ctp_mask"), "'ctp_mask' must be"), (("--maps", "a/b"), "'a/b' must be"),
        (("--maps", "cbf", "cbf"), "'cbf' must be the name of a further image, once"),
        (("--maps", "tmax", "cbf"), "3 of 3 cases cannot be used"),
        (("--maps_only",), "--maps_only needs --maps"),
        (("--maps_only", "--maps", "cbf", "--make_masks"), "makes brain masks from a CTP, which maps alone have not"),
        (("--maps_only", "--maps", "cbf", "--time_points", 15), "without a CTP there are no"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(preprocessing, *out, *words)
    assert "no tmax in" in capsys.readouterr().err  # of each case
    image = nifti.load(raw_cases / "case_0002" / "cbf.nii.gz")
    nifti.save(raw_cases / "case_0002" / "cbf.nii.gz", 0 * image.data + 3, image.affine)
    with pytest.raises(UserError, match="case_0002: every voxel of the brain has the value 3, .*cbf.nii.gz"):
        run_main(preprocessing, *out, "--maps", "cbf")
    assert not (tmp_path / "out").exists()


def test_isles_maps_enter_the_table(tmp_path):
    folder = tmp_path / "derivatives" / "sub-1" / "ses-01" / "perfusion-maps"
    folder.mkdir(parents=True)
    for what in ("ctp", "tmax", "cbf"):
        (folder / f"sub-1_ses-01_space-ncct_{what}.nii.gz").touch()
    (row,), _ = isles.table(tmp_path, isles.PATTERNS)
    assert row["tmax"].name == "sub-1_ses-01_space-ncct_tmax.nii.gz" and row["cbf"].name.endswith("_cbf.nii.gz")
    assert row["mtt"] == ""


# ---- training and sampling ------------------------------------------------------------------------------------------


def test_the_ldm_takes_the_maps_of_the_data_and_the_autoencoder_need_not_know_them(model_run, with_maps):
    model = diffusion.load_model(model_run, RT)
    assert model.ctp_channels == 17 and model.intensity == Intensity.of_folder(with_maps)
    planned = ldm.assumed_settings(CONFIGS["ldm"](data=str(with_maps), vqgan="not yet"))  # of --dry_run
    assert planned["conditioner"]["in_channels"] == 17 and planned["unet"]["in_channels"] == 3 + 17


def test_prepared_and_raw_cases_give_the_same_sample_and_every_channel_counts(model_run, with_maps, cohort, tmp_path):
    case = dataset.read_cases(with_maps, "test")[0]
    folder = cohort / "raw" / case.name
    common = ("-r", model_run, "--device", "cpu", "--steps", 2, "--outdir")
    run_main(sample, *common, tmp_path / "prepared", "--dataroot", with_maps)
    files = ("--ctp", folder / "ctp.nii.gz", "--mask", folder / "mask.nii.gz", "--maps")
    run_main(sample, *common, tmp_path / "raw", *files, folder / "cbf.nii.gz", folder / "delay.nii.gz")
    run_main(sample, *common, tmp_path / "swapped", *files, folder / "delay.nii.gz", folder / "cbf.nii.gz")
    read = {out: nib.load(tmp_path / out / case.name / "adc_sample_0.nii.gz").get_fdata()
            for out in ("prepared", "raw", "swapped")}  # fmt: skip
    np.testing.assert_array_equal(read["raw"], read["prepared"])
    assert np.abs(read["swapped"] - read["raw"]).max() > 1
    record = json.loads((tmp_path / "raw" / case.name / "sample.json").read_text())
    assert [*record["inputs"]][:3] == ["ctp", "cbf", "delay"] and not record["findings"]
    assert list(record["settings"]["normalisation"]["maps"]) == list(MAPS)
    record = json.loads((tmp_path / "swapped" / case.name / "sample.json").read_text())
    assert "median of delay inside the mask" in " ".join(record["findings"])

    for words, message in ((files[:4], "this model takes --ctp --maps CBF DELAY: give these files, in this order"),
                           ((*files, folder / "cbf.nii.gz"), "takes --ctp --maps CBF DELAY"),
                           ((*files[2:], folder / "cbf.nii.gz", folder / "delay.nii.gz"), "takes --ctp --maps"),
                           ((*files, folder / "cbf.nii.gz", folder / "gone.nii.gz"), "no delay at .*gone.nii.gz"),
                           (("--input_dir", cohort / "labels"), "holds no case")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(sample, *common, tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_studies_is_sampled_with_its_maps(model_run, raw_cases, tmp_path):
    words = ("-r", model_run, "--device", "cpu", "--steps", 1, "--input_dir", raw_cases, "--outdir")
    run_main(sample, *words, tmp_path / "out", "--end_idx", 1)
    assert (tmp_path / "out" / "case_0001" / "sample.json").is_file()
    (raw_cases / "case_0002" / "cbf.nii.gz").unlink()
    with pytest.raises(UserError, match="case_0002: no cbf at .*; sampling needs CTP and cbf and delay and a brain"):
        run_main(sample, *words, tmp_path / "out")


def test_maps_alone(cohort, raw_cases, tmp_path):
    """No CTP at all: neither read nor needed, from preparation to sample."""
    for path in raw_cases.glob("*/ctp.nii.gz"):
        path.unlink()
    prepare(raw_cases, tmp_path / "data", "--maps", *MAPS, "--maps_only")
    case = dataset.read_cases(tmp_path / "data", "train")[0]
    assert case.time_points == 0 and case.volume("ctp").shape == (2, *case.shape)
    intensity = Intensity.of_folder(tmp_path / "data")
    diffusion.save_model(tmp_path / "model.ckpt", untrained_model(time_points=2, intensity=intensity))
    folder = raw_cases / case.name
    files = ("--mask", folder / "mask.nii.gz", "--maps", folder / "cbf.nii.gz", folder / "delay.nii.gz")
    common = ("-r", tmp_path / "model.ckpt", "--device", "cpu", "--steps", 2, "--outdir")
    run_main(sample, *common, tmp_path / "raw", *files)
    run_main(sample, *common, tmp_path / "prepared", "--dataroot", tmp_path / "data", "--split", "train")
    made = [nifti.load(tmp_path / out / case.name / "dwi_sample_0.nii.gz").data for out in ("raw", "prepared")]
    np.testing.assert_array_equal(*made)
    with pytest.raises(UserError, match="makes brain masks from a CTP"):
        run_main(sample, *common, tmp_path / "x", *files[2:], "--make_masks")
    with pytest.raises(UserError, match="this model takes --maps CBF DELAY"):
        run_main(sample, *common, tmp_path / "x", "--ctp", folder / "cbf.nii.gz", *files)
    with pytest.raises(UserError, match="no cbf in .*case"):
        (folder / "cbf.nii.gz").unlink()
        prepare(raw_cases, tmp_path / "again", "--maps", *MAPS, "--maps_only")


def test_networks_and_data_of_other_maps_do_not_meet(model_run, with_maps, prepared):
    intensity = Intensity.of_folder(with_maps)
    with pytest.raises(UserError, match="no maps, the network takes maps cbf delay; prepare the data with these"):
        dataset.Slices(prepared, "val", intensity)
    with pytest.raises(UserError, match="maps cbf delay, the network takes no maps"):
        dataset.Slices(with_maps, "val", Intensity.of_folder(prepared))
    dataset.Slices(with_maps, "val", Intensity.of_folder(prepared), with_ctp=False)  # an autoencoder does not care
    study = inference.prepared_studies(prepared, "test")[0][1]()
    with pytest.raises(UserError, match="no maps, the model was trained with maps cbf delay"):
        inference.check_study(study, diffusion.load_model(model_run, RT))


def test_items_hold_the_maps_with_their_geometry(with_maps):
    """Augmentation turns frames and maps alike: the maps of an item are those of the item without frames."""
    intensity = Intensity.of_folder(with_maps)
    item = dataset.Slices(with_maps, "train", intensity, augment="plausible", seed=3)[2, 7]
    assert item["ctp"].shape[0] == 17 and torch.isfinite(item["ctp"]).all()
    outside = item["mask"][0] == 0
    assert (item["ctp"][:, outside] == dataset.CTP_BACKGROUND).all() and item["ctp"][15:].max() > 0
    volume = dataset.Volumes(with_maps, "train", intensity, size=(48, 48, 8))[0]
    assert volume["ctp"].shape == (17, 48, 48, 8)
