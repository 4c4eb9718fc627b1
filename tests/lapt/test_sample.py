"""CT-only sampling with untrained networks: geometry, units, seeds, windows of volumes, files, bad input."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from common import nifti, runtime, schedulers
from common.cli import UserError
from lapt import diffusion, inference, sample
from lapt.inference import Settings, Study
from lapt.ldm import noise_loss
from tests.helpers import kill_and_resume, run_script, two_ranks
from tests.lapt.untrained import RT, STATS, untrained_model

T, SHAPE = 4, (20, 22, 6)  # neither in-plane size is a multiple of 8
STEPS = ("--steps", 2)
CPU = ("--device", "cpu", "--num_workers", 0)


def run_main(*args):
    """`python lapt/sample.py args...` in this process."""
    options = sample.cli.parse(sample.Options, [sample.SHORT.get(str(a), str(a)) for a in args], description="")
    with runtime.start("cpu", "fp32", options.seed) as rt:
        sample.sample(options, rt)


def study(name="case-1", shape=SHAPE, seed=0, spacing=(10.0, 10.0, 12.0)):
    """A head-sized ellipsoid with a bolus; the first and last slice hold no brain."""
    rng = np.random.default_rng(seed)
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    mask = x[:, None, None] ** 2 + y[:, None] ** 2 + (0.8 * z) ** 2 < 0.8
    mask[..., [0, -1]] = False
    bolus = np.array([0, 15, 30, 8], np.float32)[:, None, None, None]
    ctp = (35 + bolus + rng.normal(0, 3, (T, *shape))).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -80, -100, -30
    return Study(name, ctp, mask, affine)


def write_study(folder, made, axes="RAS", mask_name="mask.nii.gz"):
    """CTP and mask as files, in any order of the axes; returns the CTP's path."""
    data, affine = nifti.reorient(made.ctp, made.affine, axes)
    nifti.save(folder / "ctp.nii.gz", data, affine)
    data, affine = nifti.reorient(made.mask, made.affine, axes)
    nifti.save(folder / mask_name, data, affine, dtype=np.uint8)
    return folder / "ctp.nii.gz"


@pytest.fixture(scope="module")
def model():
    return untrained_model()


@pytest.fixture(scope="module")
def volume_model():
    return untrained_model(slices=4)


@pytest.fixture
def exported(model, tmp_path):
    """The 2D model as a single file."""
    path = tmp_path / "model" / "lapt.ckpt"
    diffusion.save_model(path, model)
    return path


@pytest.fixture
def studies(tmp_path):
    """A folder of three studies with nothing but CTP and mask."""
    for number in range(3):
        write_study(tmp_path / "raw" / f"p{number}", study(f"p{number}", seed=number))
    return tmp_path / "raw"


def sample_one(model_file, folder, out, *args):
    """Sample the study whose files lie in a folder."""
    files = ("--ctp", folder / "ctp.nii.gz", "--mask", folder / "mask.nii.gz")
    run_main("-r", model_file, *files, "--outdir", out, *STEPS, *CPU, *args)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.nii.gz"))}


# ---- the sampler's mathematics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_one_step_estimate_with_the_true_noise_is_the_clean_latent(prediction):
    """Fact 6, and the same where v is predicted; that output has no loss."""
    model = untrained_model(prediction=prediction)
    g = torch.Generator().manual_seed(0)
    z_0, eps = (torch.randn(9, 3, 5, 6, generator=g) for _ in range(2))
    t = torch.arange(9) * 112
    z_t = schedulers.q_sample(model.schedule, z_0, t, eps)
    output = eps if prediction == "eps" else schedulers.v_from_eps(model.schedule, z_t, t, eps)
    assert (model.predict_clean(z_t, t, output) - z_0).abs().max() <= 1e-4
    assert noise_loss(model, output, z_0, t, eps) <= 1e-8 < noise_loss(model, output + 1, z_0, t, eps)


def test_default_steps_start_at_pure_noise_and_the_originals_do_not(model):
    """Fact 5: S = 2 visits 999 and 499 by default, 501 and 1 as the original, ending at alpha-bar of t = 0."""
    assert inference.timesteps(model, Settings(steps=2)) == ([999, 499], "clean")
    assert inference.timesteps(model, Settings(steps=2, spacing="upstream")) == ([501, 1], "first")
    own = untrained_model(spacing="leading", offset=1, final="first")
    given = inference.timesteps(model, Settings(steps=250, spacing="upstream"))
    assert inference.timesteps(own, Settings(steps=250)) == given and given[0][0] == 997
    assert inference.timesteps(own, Settings(steps=2, spacing="trailing")) == ([999, 499], "clean")


def test_a_known_noise_gives_the_known_image(model):
    """A denoiser that knows the clean latent leads there with both samplers: what is decoded is that latent."""
    z_0 = model.encode(torch.rand(3, 2, 24, 24) * 2 - 1)
    for sampler in inference.SAMPLERS:
        settings = Settings(steps=5, sampler=sampler)
        times, final = inference.timesteps(model, settings)

        def denoise(z_t, t):
            return schedulers.eps_from_x0(model.schedule, z_t, t, z_0)

        found = inference.SAMPLERS[sampler](denoise, torch.randn(z_0.shape), model.schedule, times, final=final)
        assert torch.allclose(found, z_0, atol=1e-5)


def test_case_seeds_are_the_originals():
    """Golden case case_seeds."""
    cases = [(42, "ldm3d", "P001__20200101__S1"), (42, "ldm3d", "P001__20200101__S2"), (0, "lapt", "a__b__c"),
             (7, "ldm3d", "\ud658\uc790__2021-02-03__x_y")]  # fmt: skip
    expected = [1599459794, 1626782030, 781638279, 1062879543]
    assert [inference.case_seed(*case) for case in cases] == expected


# ---- seeds and batches ----------------------------------------------------------------------------------------------


def test_batch_of_one_and_of_eight_agree(model, monkeypatch):
    """Fact 7, as a GPU would group the slices."""
    made = study(shape=(24, 24, 8))
    ctp = torch.from_numpy(model.intensity.normalise_ctp(made.ctp, made.mask)).movedim(3, 0)
    noise = inference.draw_noise(Settings(), "a", 0, list(range(8)), (3, 6, 6))
    found = []
    for batch in (1, 8):
        monkeypatch.setattr(inference, "CPU_BATCH", batch)
        found.append(inference.sample_stack(model, ctp, noise, Settings(steps=3)))
    assert found[0].shape == (8, 2, 24, 24) and found[0].std() > 0.05
    assert (found[0] - found[1]).abs().max() <= 1e-5


def test_same_seed_same_bytes_whatever_the_batch_and_the_company(exported, studies, tmp_path):
    """Fact 7: --batch_size, the other cases, and a second run change no byte; another seed or model id does."""
    base = ("-r", exported, "--input_dir", studies, *STEPS, *CPU)
    run_main(*base, "--outdir", tmp_path / "a", "--batch_size", 1)
    run_main(*base, "--outdir", tmp_path / "b", "--batch_size", 8)
    first = contents(tmp_path / "a")
    assert len(first) == 9 and first == contents(tmp_path / "b")
    sample_one(exported, studies / "p1", tmp_path / "c")
    assert contents(tmp_path / "c") == {k: v for k, v in first.items() if k.startswith("p1/")}
    for change in (("--seed", 1), ("--model_id", "other")):
        out = tmp_path / change[0]
        run_main(*base, "--outdir", out, "--start_idx", 1, "--end_idx", 2, *change)
        assert list(contents(out)) == list(contents(tmp_path / "c"))
        assert contents(out)["p1/dwi_sample_0.nii.gz"] != first["p1/dwi_sample_0.nii.gz"]


def test_noise_of_slices_is_their_own_or_shared():
    own = inference.draw_noise(Settings(), "a", 0, [0, 1, 2], (3, 4, 4))
    assert torch.equal(own[1:], inference.draw_noise(Settings(), "a", 0, [1, 2], (3, 4, 4)))
    assert not torch.equal(own[0], own[1])
    shared = inference.draw_noise(Settings(slice_noise="shared"), "a", 0, [0, 1, 2], (3, 4, 4))
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])
    for other in (inference.draw_noise(Settings(), "b", 0, [0], (3, 4, 4)),
                  inference.draw_noise(Settings(), "a", 1, [0], (3, 4, 4))):  # fmt: skip
        assert not torch.equal(own[:1], other)


def test_shared_noise_takes_the_flicker_out_of_equal_slices(model):
    made = study()
    made.ctp[:] = made.ctp[..., 2:3]
    made.mask[:] = made.mask[..., 2:3]
    own, shared = (
        inference.sample_study(model, made, Settings(steps=2, slice_noise=kind)).adc[0]
        for kind in ("independent", "shared")
    )
    inside = made.mask[..., 1:]
    assert np.abs(np.diff(shared, axis=2))[inside].max() < 1e-2 < np.abs(np.diff(own, axis=2))[inside].mean()


# ---- volumes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slices", "size", "overlap"), [(4, 4, -1), (10, 4, -1), (11, 4, 0), (33, 32, 8), (9, 8, 7)])
def test_windows_cover_every_slice_and_overlap(slices, size, overlap):
    starts = inference.window_starts(slices, size, overlap)
    assert starts[0] == 0 and starts[-1] == slices - size
    shared = [a + size - b for a, b in zip(starts, starts[1:], strict=False)]
    assert all(s >= (size // 2 if overlap < 0 else overlap) for s in shared)


def test_one_window_is_the_network_itself(volume_model):
    made = study(shape=(16, 16, 4))
    ctp = torch.from_numpy(volume_model.intensity.normalise_ctp(made.ctp, made.mask)).movedim(3, 0)
    noise = torch.randn(4, 3, 4, 4)
    expected = volume_model.decode(volume_model.sample(volume_model.condition(ctp), noise, 3))
    found = inference.sample_stack(volume_model, ctp, noise, Settings(steps=3))
    assert torch.allclose(found, expected, atol=1e-5)


def test_without_layers_between_slices_windows_change_nothing(model):
    """Blended windows of a volume network that treats slices alone are exactly the 2D result, seams included."""
    from lapt.unet import inflate

    volumes = untrained_model(slices=4)
    volumes.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("unet.")}, strict=False)
    plain = diffusion.build_model(volumes.settings, volumes.intensity, RT)
    inflate(model.unet.state_dict(), plain.unet)
    volumes.unet = plain.unet.eval().requires_grad_(False)
    made = study(shape=(16, 16, 11))
    settings = Settings(steps=3)
    flat, deep = (inference.sample_study(m, made, settings) for m in (model, volumes))
    assert flat.adc.std() > 10 and np.abs(flat.adc - deep.adc).max() < 1e-5 * 2300
    assert np.abs(flat.dwi - deep.dwi).max() < 1e-5 * 900


def test_windows_are_blended_at_every_step(volume_model):
    """The prediction of a stack is the weighted mean of those of the windows, with more weight in their middle."""
    ctp, z_t, t = torch.rand(6, T, 16, 16), torch.randn(6, 3, 4, 4), torch.full((6,), 500)
    conditions = {s: volume_model.condition(ctp[s : s + 4]) for s in (0, 2)}
    found = inference.blended_denoiser(volume_model, conditions, 6)(z_t, t)
    parts = [volume_model.denoiser(conditions[s])(z_t[s : s + 4], t[:4]) for s in (0, 2)]
    assert torch.allclose(found[:2], parts[0][:2], atol=1e-6) and torch.allclose(found[4:], parts[1][2:], atol=1e-6)
    assert torch.allclose(found[2], (2 * parts[0][2] + parts[1][0]) / 3, atol=1e-6)
    assert torch.allclose(found[3], (parts[0][3] + 2 * parts[1][1]) / 3, atol=1e-6)
    assert not torch.allclose(parts[0][2], parts[1][0], atol=1e-3)  # neighbours matter: blending does something


@pytest.mark.parametrize("slices", [3, 4, 9])
def test_volumes_of_any_number_of_slices(volume_model, slices):
    """Fact 20: fewer slices than the network sees are padded, more are windowed; the output has the input's."""
    made = study(shape=(20, 22, slices))
    made.mask[..., 0] = made.mask[..., slices // 2]  # brain up to the edge
    found = inference.sample_study(volume_model, made, Settings(steps=2, n_samples=2))
    assert found.dwi.shape == found.adc.shape == (2, 20, 22, slices) and found.probability.shape == (20, 22, slices)
    assert found.adc[0][made.mask].std() > 10 and (found.adc[0][made.mask] > 0).all()
    assert not found.adc[:, ~made.mask].any() and not found.dwi[:, ~made.mask].any()


# ---- units and grids ------------------------------------------------------------------------------------------------


def test_values_are_the_decoded_ones_in_physical_units(model):
    """Fact 20: ADC in 1e-6 mm^2/s and DWI in the training set's units, 0 outside the mask, unpadded in place."""
    made = study()
    settings = Settings(steps=2)
    found = inference.sample_study(model, made, settings)
    numbers = [1, 2, 3, 4]
    ctp = torch.from_numpy(model.intensity.normalise_ctp(made.ctp, made.mask)).movedim(3, 0)[numbers]
    padded = torch.full((4, T, 24, 24), -1.0)
    padded[..., 2:22, 1:23] = ctp
    noise = inference.draw_noise(settings, made.name, 0, numbers, (3, 6, 6))
    images = inference.sample_stack(model, padded, noise, settings)[..., 2:22, 1:23].clamp(-1, 1).numpy()
    for channel, (name, volumes) in enumerate((("dwi", found.dwi), ("adc", found.adc))):
        low, high = STATS[name]["low"], STATS[name]["high"]
        expected = (images[:, channel] + 1) / 2 * (high - low) + low
        expected = np.moveaxis(expected, 0, -1) * made.mask[..., numbers]
        assert np.allclose(volumes[0][..., numbers], expected, rtol=1e-5, atol=1e-3)
        assert not volumes[..., [0, 5]].any()  # slices without brain


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_output_lies_on_the_grid_of_the_file(exported, tmp_path, axes):
    """Facts 20 and 21: shape, affine and spacing of the input's first three dimensions, in any axis order."""
    made = study("p")
    turn = np.array([[0.995, -0.0999, 0], [0.0999, 0.995, 0], [0, 0, 1]])
    made.affine[:3, :3] = turn @ made.affine[:3, :3]  # oblique
    ctp = write_study(tmp_path / "p", made, axes)
    sample_one(exported, tmp_path / "p", tmp_path / "out", "-n", 2)
    given, mask = nib.load(ctp), nib.load(tmp_path / "p" / "mask.nii.gz").get_fdata() > 0
    names = {f"{m}_{w}.nii.gz" for m in ("dwi", "adc") for w in ("sample_0", "sample_1", "mean", "sd")}
    assert {p.name for p in (tmp_path / "out" / "p").iterdir()} == names | {"lesion_probability.nii.gz", "sample.json"}
    for name in names | {"lesion_probability.nii.gz"}:
        image = nib.load(tmp_path / "out" / "p" / name)
        assert image.shape == given.shape[:3] and np.allclose(image.affine, given.affine, atol=1e-4)
        assert np.allclose(image.header.get_zooms(), given.header.get_zooms()[:3])
        assert not image.get_fdata()[~mask].any()
    adc = nib.load(tmp_path / "out" / "p" / "adc_sample_0.nii.gz").get_fdata()[mask]
    assert adc.min() >= 300 and adc.max() <= 2300.1 and adc.std() > 10
    record = json.loads((tmp_path / "out" / "p" / "sample.json").read_text())
    assert record["shape"] == list(given.shape[:3]) and np.allclose(record["affine"], given.affine, atol=1e-4)
    assert record["slices_with_brain"] == [1, 2, 3, 4]


def test_sidecar_tells_everything_that_made_the_sample(exported, model, tmp_path):
    """Fact 20."""
    write_study(tmp_path / "p", study("p"))
    sample_one(exported, tmp_path / "p", tmp_path / "out", "--seed", 7, "--sampler", "dpmpp_2m")
    text = (tmp_path / "out" / "p" / "sample.json").read_text()
    record = json.loads(text)
    settings = record["settings"]
    assert settings["model"] == diffusion.load_model(exported, RT).hash and settings["stage"] == "lapt"
    assert (settings["seed"], settings["steps"], settings["sampler"]) == (7, 2, "dpmpp_2m")
    assert (settings["weights"], settings["precision"]) == ("average", "float32")
    assert settings["timesteps"] == [999, 499] and settings["final"] == "clean"
    assert settings["normalisation"] == model.intensity.to_dict() | {"ctp_window": [0.0, 200.0]}
    assert settings["lesion"] == "ADC < 620e-6 mm^2/s" and record["units"]["adc"] == "1e-6 mm^2/s"
    assert "research use only" in record["notice"] and record["case_seed"] == inference.case_seed(7, "lapt", "p")
    assert record["inputs"]["ctp"]["file"] == "ctp.nii.gz" and record["findings"] == []
    assert str(tmp_path) not in text
    assert not (tmp_path / "out" / "p" / "adc_mean.nii.gz").exists()  # of one sample there is none


def test_mean_sd_and_probability_are_those_of_the_samples(exported, tmp_path):
    write_study(tmp_path / "p", study("p"))
    sample_one(exported, tmp_path / "p", tmp_path / "out", "-n", 3, "--lesion_threshold", 1300)
    load = lambda name: nifti.load(tmp_path / "out" / "p" / f"{name}.nii.gz").data  # noqa: E731
    mask = nifti.load(tmp_path / "p" / "mask.nii.gz").data > 0
    for name in ("dwi", "adc"):
        samples = np.stack([load(f"{name}_sample_{j}") for j in range(3)])
        assert np.allclose(load(f"{name}_mean"), samples.mean(0), atol=1e-3)
        assert np.allclose(load(f"{name}_sd"), samples.std(0, ddof=1), atol=1e-3)
        assert load(f"{name}_sd")[mask].min() >= 0 and load(f"{name}_sd")[mask].mean() > 1
    adc = np.stack([load(f"adc_sample_{j}") for j in range(3)])
    probability = load("lesion_probability")
    assert np.allclose(probability, ((adc < 1300) & mask).mean(0), atol=1e-6)
    assert 0 < probability[mask].mean() < 1


def test_guide_gives_the_probability(model):
    class Threshold:
        """Stands for a trained guide: certain where ADC is low."""

        intensity = model.intensity

        def probability(self, dwi, adc, mask, stats):
            assert stats is None and dwi.shape == SHAPE
            return 0.9 * (adc < 1300) * mask

    made = study()
    found = inference.sample_study(model, made, Settings(steps=2, n_samples=2), guide=Threshold())
    assert np.allclose(found.probability, 0.9 * ((found.adc < 1300) & made.mask).mean(0))


def test_other_voxel_sizes_come_back_to_the_grid(model):
    """--spacing_mm: the network sees other voxels, the files have the input's; background does not bleed in."""
    made = study(spacing=(8.0, 8.0, 12.0))
    found = inference.sample_study(model, made, Settings(steps=2, spacing_mm=(10.0, 10.0, 12.0)))
    assert found.adc.shape == (1, *SHAPE) and not found.adc[0][~made.mask].any()
    inside = found.adc[0][made.mask]
    assert (inside[inside > 0] >= 299.9).all() and (inside > 0).mean() > 0.95
    same = inference.sample_study(model, made, Settings(steps=2, spacing_mm=(8.0, 8.0, 12.0)))
    assert np.allclose(same.adc, inference.sample_study(model, made, Settings(steps=2)).adc, atol=0.1)


# ---- what a user meets ----------------------------------------------------------------------------------------------


def test_ct_alone_is_enough(exported, tmp_path):
    """Facts 17 and 21, as a user runs it: a folder with nothing but CTP and mask, and a model file without its runs."""
    folder = tmp_path / "patient"
    write_study(folder, study("patient"))
    words = ["--ctp", "ctp.nii.gz", "--mask", "mask.nii.gz", "--outdir", "out", *STEPS, *CPU]
    done = run_script(["lapt/sample.py", "-r", exported, *words], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "research use only" in done.stdout
    assert sorted(p.name for p in (folder / "out" / "patient").iterdir()) == [
        "adc_sample_0.nii.gz", "dwi_sample_0.nii.gz", "lesion_probability.nii.gz", "sample.json"]  # fmt: skip


def test_finished_cases_are_kept_and_lost_ones_come_back(exported, studies, tmp_path):
    base = ("-r", exported, "--input_dir", studies, "--outdir", tmp_path / "out", *STEPS, *CPU)
    run_main(*base)
    before = contents(tmp_path / "out")
    (tmp_path / "out/p0/sample.json").unlink()
    (tmp_path / "out/p1/adc_sample_0.nii.gz").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "p2").iterdir()}
    run_main(*base)
    assert contents(tmp_path / "out") == before
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_other_settings_are_refused_and_overwrite_deletes_only_its_own(exported, studies, tmp_path):
    base = ("-r", exported, "--input_dir", studies, "--outdir", tmp_path / "out", *CPU)
    run_main(*base, *STEPS, "-n", 2)
    (tmp_path / "out/p0/notes.nii.gz").write_bytes(b"mine")
    before = contents(tmp_path / "out")
    other = diffusion.load_model(exported, RT)
    other.latent_std += 1
    diffusion.save_model(tmp_path / "other.ckpt", other)
    for options, what in (((*STEPS, "-n", 2, "--seed", 1), "seed 42 -> 1"), (("--steps", 3, "-n", 2), "steps 2 -> 3"),
                          ((*STEPS, "-n", 2, "-r", tmp_path / "other.ckpt"), "model .* -> ")):  # fmt: skip
        with pytest.raises(UserError, match=f"other settings .*{what}.*; name another --outdir or add --overwrite"):
            run_main(*base, *options)
    assert contents(tmp_path / "out") == before
    run_main(*base, *STEPS, "--seed", 1, "--overwrite")
    now = contents(tmp_path / "out")
    assert now["p0/notes.nii.gz"] == b"mine" and len(now) == 10
    assert not any("sample_1" in name or "mean" in name for name in now)


def test_a_changed_input_is_no_finished_case(exported, studies, tmp_path):
    base = ("-r", exported, "--input_dir", studies, "--outdir", tmp_path / "out", *STEPS, *CPU)
    run_main(*base)
    before = contents(tmp_path / "out")
    write_study(studies / "p1", study("p1", seed=9))
    with pytest.raises(UserError, match="p1 holds samples of other inputs; name another --outdir or add --overwrite"):
        run_main(*base)
    run_main(*base, "--overwrite")
    now = contents(tmp_path / "out")
    changed = {name for name in now if now[name] != before[name]}
    assert {"p1/dwi_sample_0.nii.gz", "p1/adc_sample_0.nii.gz"} <= changed
    assert all(name.startswith("p1/") for name in changed)


def test_foreign_files_are_not_overwritten(exported, studies, tmp_path):
    (tmp_path / "out" / "p0").mkdir(parents=True)
    (tmp_path / "out/p0/dwi_sample_0.nii.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match="dwi_sample_0.nii.gz was not written by this run"):
        run_main("-r", exported, "--input_dir", studies, "--outdir", tmp_path / "out", *STEPS, *CPU)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p0"]


@pytest.mark.slow
def test_killed_and_on_two_ranks(exported, studies, tmp_path):
    """SIGKILL while sampling and the same command again, and two ranks: the same bytes."""
    command = ["lapt/sample.py", "-r", exported, "--input_dir", studies, *CPU, "--steps", 40, "--outdir"]
    run_main(*command[1:-3], "--steps", 40, "--outdir", tmp_path / "reference")
    expected = contents(tmp_path / "reference")
    killed = tmp_path / "killed"
    environment = {"OMP_NUM_THREADS": "1"}
    done = kill_and_resume([*command, killed], lambda kill: len(list(killed.rglob("sample.json"))) > kill, kills=1,
                           max_delay_s=0.1, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(killed) == expected
    done = two_ranks([*command, tmp_path / "ranks"])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "ranks") == expected


# ---- bad input ------------------------------------------------------------------------------------------------------


def spoil_mask_grid(folder, made):
    nifti.save(folder / "mask.nii.gz", made.mask, np.diag([10.0, 10.0, 11.0, 1.0]), dtype=np.uint8)


def spoil_empty_mask(folder, made):
    nifti.save(folder / "mask.nii.gz", np.zeros(SHAPE), made.affine, dtype=np.uint8)


def spoil_time(folder, made):
    nifti.save(folder / "ctp.nii.gz", made.ctp[:3], made.affine)


def spoil_units(folder, made):
    nifti.save(folder / "ctp.nii.gz", made.ctp + 1024, made.affine)


def spoil_truncated(folder, made):
    path = folder / "ctp.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(("spoil", "message"), [
    (spoil_mask_grid, "another grid than the CTP.*--to_ctp_grid"),
    (spoil_empty_mask, "mask is empty.*--make_masks"),
    (spoil_time, "3 time points, 4 are needed.*--resample_time"),
    (spoil_units, "a CT in HU about 35"),
    (spoil_truncated, "truncated or corrupt"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_no_case(exported, tmp_path, spoil, message):
    made = study("p")
    write_study(tmp_path / "p", made)
    spoil(tmp_path / "p", made)
    with pytest.raises(UserError, match=message) as caught:
        sample_one(exported, tmp_path / "p", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "p").exists()


def test_a_folder_without_any_sample_takes_other_settings(exported, tmp_path):
    """A run that stopped at its first input has claimed nothing."""
    made = study("p")
    write_study(tmp_path / "p", made)
    whole = (tmp_path / "p" / "ctp.nii.gz").read_bytes()
    spoil_truncated(tmp_path / "p", made)
    with pytest.raises(UserError, match="truncated"):
        sample_one(exported, tmp_path / "p", tmp_path / "out")
    (tmp_path / "p" / "ctp.nii.gz").write_bytes(whole)
    sample_one(exported, tmp_path / "p", tmp_path / "out", "--seed", 5)
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]["seed"] == 5


def test_missing_files_and_impossible_settings(exported, studies, tmp_path, capsys):
    base = ("-r", exported, "--outdir", tmp_path / "out", *CPU)
    shutil.rmtree(studies / "p2")
    (studies / "p1" / "mask.nii.gz").unlink()
    with pytest.raises(UserError, match="p1: no mask at p1/mask.nii.gz"):
        run_main(*base, "--input_dir", studies, *STEPS)
    with pytest.raises(UserError, match="no ctp at nowhere.nii.gz"):
        run_main(*base, "--ctp", "nowhere.nii.gz", "--mask", studies / "p0/mask.nii.gz", *STEPS)
    one = ("--ctp", studies / "p0/ctp.nii.gz", "--mask", studies / "p0/mask.nii.gz")
    with pytest.raises(UserError, match="1001 sampling steps: choose 1 to 1000"):
        run_main(*base, *one, "--steps", 1001)
    with pytest.raises(UserError, match="1000 sampling steps with offset 1"):  # as the original, which crashes there
        run_main(*base, *one, "--steps", 1000, "--spacing", "upstream")
    with pytest.raises(UserError, match="--n_samples 0"):
        run_main(*base, *one, "-n", 0)
    with pytest.raises(UserError, match="spacing_mm .*three positive numbers"):
        run_main(*base, *one, "--spacing_mm", 4, 4)
    with pytest.raises(UserError, match="spacing_mm .*0.2 to 40 mm"):
        run_main(*base, *one, "--spacing_mm", 0.001, 4, 4)
    with pytest.raises(UserError, match="--overlap -3"):
        run_main(*base, *one, "--overlap", -3)
    for name in ("../p", "a/b", ".."):  # files would be written beside --outdir
        with pytest.raises(UserError, match="cannot be the name of a folder.*--case"):
            run_main(*base, *one, "--case", name)
    assert not (tmp_path / "out").exists()
    for words, message in ((("--ctp", "x.nii.gz"), "--ctp and --mask belong together"), ((), "name a trained model")):
        with pytest.raises(SystemExit) as left:
            run_main(*(("-r", exported) if words else ()), *words)
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_volume_models_refuse_what_they_cannot_do(volume_model):
    with pytest.raises(UserError, match="--slice_noise shared"):
        inference.check_settings(Settings(slice_noise="shared"), volume_model)
    with pytest.raises(UserError, match="--overlap 4: must be less than the 4 slices"):
        inference.check_settings(Settings(overlap=4), volume_model)


def test_unusual_input_is_told(model):
    """What the training never showed is said in words: HU, bolus, size of the mask, time points."""
    assert inference.check_study(study(), model) == []
    still = study()
    still.ctp[:] = 5.0
    words = " ".join(inference.check_study(still, model))
    assert "is the CTP in Hounsfield units?" in words and "no contrast bolus" in words
    small = study(spacing=(2.0, 2.0, 2.0))
    assert "is it a brain mask?" in inference.check_study(small, model)[0]
    odd = study()
    odd.inputs.update(time_points=30, mask_made=True)
    found = inference.check_study(odd, model)
    assert found[0] == "the CTP has 30 time points, interpolated to the 4 of the training" and "made from" in found[1]
    with pytest.raises(UserError, match="case-1: the CTP has 3 time points, the model was trained with 4"):
        inference.check_study(Study("case-1", odd.ctp[:3], odd.mask, odd.affine), model)


def test_another_number_of_time_points_can_be_interpolated(exported, tmp_path):
    made = study("p")
    ctp = write_study(tmp_path / "p", made)
    nifti.save(ctp, np.repeat(made.ctp, 2, axis=0), made.affine)
    sample_one(exported, tmp_path / "p", tmp_path / "out", "--resample_time")
    record = json.loads((tmp_path / "out" / "p" / "sample.json").read_text())
    assert record["inputs"]["time_points"] == 8 and "8 time points, interpolated" in record["findings"][0]
