"""MRI-only generation: the same file for a subject whatever the company, labels and guidance, samples, folders."""

import json
import shutil

import numpy as np
import pytest
import torch

from common import nifti, runtime
from common.cli import UserError
from il_cldm import aae, dataset, generate, ldm
from il_cldm.config import Config
from tests.il_cldm.conftest import call
from tests.il_cldm.test_pipeline import MRI, SYN, config_of, names, tree


def record(folder):
    return json.loads((folder / "generation.json").read_text())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.nii*")}


def test_same_bytes_again_in_any_order_and_company(study, trained, tmp_path):
    listed, expected = names(study, "test"), contents(trained / SYN)
    shutil.rmtree(study / SYN)
    call(study, "--gen")
    assert contents(study / SYN) == expected
    (study / "data_info" / "test.txt").write_text("\n".join(reversed([n.removesuffix(".nii.gz") for n in listed[1:]])))
    call(study, "--gen", "--out", tmp_path / "fewer", "--batch_size", 4)
    assert contents(tmp_path / "fewer") == {n: expected[n] for n in listed[1:]}
    call(study, "--gen", "--mri", study / MRI / listed[2], "--out", tmp_path / "one")
    assert contents(tmp_path / "one") == {listed[2]: expected[listed[2]]}
    call(study, "--gen", "--mri", study / MRI, "--out", tmp_path / "all")
    everything = contents(tmp_path / "all")
    assert {n: everything[n] for n in listed} == expected and len(everything) == 9
    assert len(set(everything.values())) == 9


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_samples_do_not_depend_on_their_number_or_batch(study, tmp_path, sampler):
    """Also for samplers that draw noise on the way."""
    mri = study / MRI / names(study, "test")[0]
    options = ("--gen", "--mri", mri, "--sampler", sampler, "--eta", 1.0)
    call(study, *options, "--out", tmp_path / "one")
    call(study, *options, "--out", tmp_path / "three", "--samples", 3, "--gen_batch", 3, "--keep_samples")
    call(study, *options, "--out", tmp_path / "two", "--samples", 2, "--gen_batch", 1, "--keep_samples")
    one, three, two = (contents(tmp_path / n) for n in ("one", "three", "two"))
    assert three[f"sample0/{mri.name}"] == two[f"sample0/{mri.name}"] == one[mri.name]
    assert three[f"sample1/{mri.name}"] == two[f"sample1/{mri.name}"] != one[mri.name]
    call(study, *options, "--out", tmp_path / "seed", "--seed", 1)
    assert contents(tmp_path / "seed")[mri.name] != one[mri.name]


def test_mean_and_standard_deviation_are_those_of_the_samples(study, tmp_path):
    name = names(study, "test")[0]
    call(study, "--gen", "--out", tmp_path, "--samples", 4, "--keep_samples")
    samples = np.stack([nifti.load(tmp_path / f"sample{j}" / name).data for j in range(4)])
    assert np.abs(nifti.load(tmp_path / name).data - samples.mean(0)).max() < 1e-6
    assert np.abs(nifti.load(tmp_path / "std" / name).data - samples.std(0, ddof=1)).max() < 1e-6
    assert samples.std(0).max() > 0.01
    assert np.array_equal(nifti.load(tmp_path / "std" / name).affine, nifti.load(study / MRI / name).affine)


def load_networks(root):
    config = config_of(root)
    with runtime.start("cpu") as rt:
        autoencoder, aae_hash = aae.load_autoencoder(config, rt)
        return rt, autoencoder, ldm.load_denoiser(config, rt, aae_hash)


def test_average_of_latents_is_decoded_once(study, tmp_path):
    name = names(study, "test")[0]
    call(study, "--gen", "--out", tmp_path / "latent", "--samples", 3, "--average", "latent")
    call(study, "--gen", "--out", tmp_path / "image", "--samples", 3)
    rt, autoencoder, trained = load_networks(study)
    cond = ldm.condition(trained.denoiser, torch.from_numpy(nifti.load(study / MRI / name).data)[None, None], rt)
    zs = [
        ldm.sample_latents(
            trained.denoiser, trained.schedule, cond, None, [runtime.generator(0, dataset.stem(name), j)],
            sampler="dpm", steps=4, rt=rt)
        for j in range(3)
    ]  # fmt: skip
    expected = ldm.decode(autoencoder, torch.cat(zs).mean(0, keepdim=True), trained.stats, rt)[0, 0].numpy()
    assert np.abs(nifti.load(tmp_path / "latent" / name).data - expected).max() < 1e-6
    assert np.abs(nifti.load(tmp_path / "image" / name).data - expected).max() > 1e-4
    assert contents(tmp_path / "latent")[f"std/{name}"] == contents(tmp_path / "image")[f"std/{name}"]


def sample(root, label, guidance, sampler="ddim", steps=3, **options):
    rt, _, trained = load_networks(root)
    name = names(root, "test")[0]
    cond = ldm.condition(trained.denoiser, torch.from_numpy(nifti.load(root / MRI / name).data)[None, None], rt)
    noise = [runtime.generator("guidance")]
    return ldm.sample_latents(
        trained.denoiser, trained.schedule, cond, label, noise, sampler=sampler, steps=steps, guidance=guidance, rt=rt,
        **options)  # fmt: skip


def test_no_label_and_every_class_differ(trained):
    found = [sample(trained, label, 1.0) for label in (None, 0, 1, 2, 3)]
    for i, a in enumerate(found):
        assert all((a - b).abs().max() > 1e-4 for b in found[:i])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_guidance_identities(trained, sampler):
    none, two = sample(trained, None, 1.0, sampler), sample(trained, 2, 1.0, sampler)
    assert torch.equal(sample(trained, 2, 0.0, sampler), none)  # scale 0: unconditional
    assert torch.equal(sample(trained, None, 3.0, sampler), none)  # nothing to guide with
    _, _, networks = load_networks(trained)
    assert networks.denoiser.null_label == 4
    assert torch.equal(sample(trained, 4, 1.0, sampler), none)  # "no label" is the learned null class
    # In one step the result is affine in the predicted noise, hence in the scale.
    once = {w: sample(trained, 2, w, "ddim", 1) for w in (0.0, 1.0, 2.5)}
    mixed = once[0.0] + 2.5 * (once[1.0] - once[0.0])
    assert torch.allclose(once[2.5], mixed, atol=1e-3 * float(mixed.abs().max()))
    assert not torch.allclose(once[2.5], two, atol=1e-3)


@pytest.mark.parametrize(("steps", "calls"), [(0, 999), (7, 7), (1, 1), (5000, 999)])
def test_steps_are_denoiser_calls_from_the_noisiest_step_on(trained, steps, calls):
    seen = []
    if calls > 100:  # a denoiser that costs nothing
        rt, _, networks = load_networks(trained)

        class Zero(torch.nn.Module):
            null_label, conv_out = None, networks.denoiser.conv_out

            def forward(self, z_t, cond_map, t, label):
                return torch.zeros_like(z_t)

        ldm.sample_latents(
            Zero(), networks.schedule, torch.zeros(1, 1, 2, 2, 2), None, [runtime.generator(0)], sampler="ddpm",
            steps=steps, rt=rt, callback=lambda i, t, x, x_0: seen.append(t))  # fmt: skip
    else:
        sample(trained, None, 1.0, steps=steps, callback=lambda i, t, x, x_0: seen.append(t))
    assert len(seen) == calls and seen[0] == 999
    assert seen == sorted(set(seen), reverse=True) and 0 not in seen
    assert calls == 1 or seen[-1] == 1


def test_labels_from_the_table_a_number_or_the_mri(study, tmp_path):
    table = dataset.read_labels(config_of(study))
    listed = names(study, "test")
    for label, flagged in (("csv", True), ("2", True), ("predicted", False), ("none", False)):
        call(study, "--gen", "--label", label, "--out", tmp_path / label, "--guidance", 2.0)
        found = record(tmp_path / label)
        assert found["true_label_used"] is flagged and found["label"] == label
        given = {
            "csv": {n: table[dataset.stem(n)] for n in listed},
            "2": dict.fromkeys(listed, 2),
            "none": dict.fromkeys(listed),
            "predicted": found["labels"],
        }[label]
        assert found["labels"] == given
    assert set(record(tmp_path / "predicted")["labels"].values()) <= {0, 1, 2, 3}
    assert contents(tmp_path / "2") != contents(tmp_path / "none")
    for label in ("4", "-1", "AD", "²"):
        with pytest.raises(UserError, match=f"--label {label}: give none, csv, predicted or a class from 0 to 3"):
            call(study, "--gen", "--label", label, "--out", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_predicted_labels_are_learned_from_the_current_table(study, tmp_path):
    call(study, "--gen", "--label", "predicted", "--out", tmp_path / "a")
    kept = (study / "result/exp_1/label_classifier.pt").read_bytes()
    call(study, "--gen", "--label", "predicted", "--out", tmp_path / "b")
    assert (study / "result/exp_1/label_classifier.pt").read_bytes() == kept
    path = study / "data_info" / "data_info.csv"
    train = names(study, "train")
    path.write_text("filename,label_id\n" + "".join(f"{n},3\n" for n in train))  # all alike: only class 3 is left
    call(study, "--gen", "--label", "predicted", "--out", tmp_path / "c", "--classifier_steps", 60)
    assert set(record(tmp_path / "c")["labels"].values()) == {3}


def test_finished_subjects_are_kept_and_lost_ones_come_back(study, trained):
    listed, before = names(study, "test"), tree(study / SYN)
    (study / SYN / listed[1]).unlink()
    call(study, "--gen")
    after = tree(study / SYN)
    for name in (listed[0], listed[2]):
        assert after[study / SYN / name] == before[study / SYN / name]
    assert contents(study / SYN) == contents(trained / SYN)


def test_other_settings_are_refused_and_overwrite_deletes_only_its_own(study, trained):
    out, listed = study / SYN, names(study, "test")
    shutil.copy(out / listed[0], out / "notes.nii.gz")
    (out / "std").mkdir()
    for file in (out / "std" / listed[0], out / "mine" / listed[0], out / "readme.txt"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"not yours")
    kept = contents(out)
    with pytest.raises(UserError, match=r"other settings \(steps 4 -> 5\); name another --out or add --overwrite"):
        call(study, "--gen", "--steps", 5)
    assert contents(out) == kept
    # a subset with other settings: nothing of the old settings may stay, or the record would be wrong
    (study / "data_info" / "test.txt").write_text(listed[0])
    call(study, "--gen", "--steps", 5, "--overwrite")
    now = contents(out)
    assert set(now) == {listed[0], "notes.nii.gz", f"std/{listed[0]}", f"mine/{listed[0]}"}
    assert now[listed[0]] != kept[listed[0]]
    assert all(now[name] == kept[name] for name in now.keys() - {listed[0]})
    assert (out / "readme.txt").read_bytes() == b"not yours"
    assert list(record(out)["labels"]) == [listed[0]] and record(out)["steps"] == 5


def test_files_that_gen_did_not_write_are_never_replaced(study, tmp_path):
    listed = names(study, "test")
    for out in (study / MRI, study / "data/process/whole_Abeta_112"):
        before = contents(out)
        for more in ((), ("--overwrite",)):
            with pytest.raises(UserError, match="was not written by --gen; name another --out"):
                call(study, "--gen", "--out", out, *more)
            with pytest.raises(UserError, match="was not written by --gen; name another --out"):
                call(study, "--gen", "--mri", study / MRI / listed[0], "--out", out, *more)
        assert contents(out) == before and not (out / "generation.json").exists()
    # also where the folder is ours, and for the companions of several samples
    new = study / MRI / "new.nii.gz"
    shutil.copy(study / MRI / listed[0], new)
    shutil.copy(new, study / SYN / "new.nii.gz")
    with pytest.raises(UserError, match="new.nii.gz was not written by --gen"):
        call(study, "--gen", "--mri", new)
    (tmp_path / "std").mkdir()
    shutil.copy(new, tmp_path / "std" / "new.nii.gz")
    with pytest.raises(UserError, match="was not written by --gen"):
        call(study, "--gen", "--mri", new, "--out", tmp_path, "--samples", 2)


def test_a_changed_label_is_another_setting(study, tmp_path):
    call(study, "--gen", "--label", "csv", "--out", tmp_path)
    name = names(study, "test")[0]
    old = record(tmp_path)["labels"][name]
    path = study / "data_info" / "data_info.csv"
    path.write_text(path.read_text().replace(f"{name},{old}", f"{name},{(old + 1) % 4}"))
    with pytest.raises(UserError, match=f"label of {name} {old} -> {(old + 1) % 4}"):
        call(study, "--gen", "--label", "csv", "--out", tmp_path)
    call(study, "--gen", "--label", "csv", "--out", tmp_path, "--overwrite")
    assert record(tmp_path)["labels"][name] == (old + 1) % 4


def test_bad_mri_is_found_before_anything_is_written(study, tmp_path):
    folder = tmp_path / "mri"
    good = nifti.load(study / MRI / names(study, "test")[0])
    nifti.save(folder / "a.nii.gz", good.data, good.affine)
    for name, data, message in (
        ("z.nii.gz", 100 * good.data, "z: values from .* run --prepare"),
        ("z.nii.gz", good.data[:-2], "z.nii.gz: shape .* no multiple of 4"),
        ("a.nii", good.data, "holds a as .nii and as .nii.gz"),
    ):
        nifti.save(folder / name, data, good.affine)
        with pytest.raises(UserError, match=message):
            call(study, "--gen", "--mri", folder, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (folder / name).unlink()
    for options, message in ((("--samples", 0), "--samples"), (("--mri", tmp_path / "no"), "no MRI at")):
        with pytest.raises(UserError, match=message):
            call(study, "--gen", "--out", tmp_path / "out", *options)


def test_native_output_lies_on_the_raw_grid(study, tmp_path):
    """A raw MRI in scanner units and another orientation: the PET comes back on its voxels."""
    good = nifti.load(study / MRI / names(study, "test")[0])
    data, affine = nifti.reorient(np.rint(800 * good.data), good.affine, "LPS")
    nifti.save(tmp_path / "raw.nii.gz", data, affine, dtype=np.int16)
    call(
        study, "--gen", "--native", "--mri", tmp_path / "raw.nii.gz", "--out", tmp_path / "out", "--label", "predicted"
    )
    out, raw = nifti.load(tmp_path / "out" / "raw.nii.gz"), nifti.load(tmp_path / "raw.nii.gz")
    assert out.shape == raw.shape and np.allclose(out.affine, raw.affine, atol=1e-4)
    assert 0 <= out.data.min() < out.data.max() <= 1


def test_batches_are_single_on_the_cpu(study, monkeypatch):
    """Batched convolutions round differently on a CPU; --gen_batch is for GPUs."""
    sizes = []
    original = ldm.sample_latents

    def spy(denoiser, schedule, cond_map, label, generators, **settings):
        sizes.append(len(generators))
        return original(denoiser, schedule, cond_map, label, generators, **settings)

    monkeypatch.setattr(ldm, "sample_latents", spy)
    rt, autoencoder, networks = load_networks(study)
    mri = torch.rand(1, 1, 16, 16, 16)
    config = Config(samples=3, gen_batch=2, steps=2)
    samples, mean = generate.synthesize(networks, autoencoder, mri, None, "x", config, rt)
    assert sizes == [1, 1, 1] and samples.shape == (3, 16, 16, 16)
    assert np.allclose(mean, samples.mean(0), atol=1e-7)
