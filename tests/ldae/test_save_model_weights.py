"""Exported weights: what each stage gives, both kinds of file and of names, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common import checkpoint, runtime
from common.cli import UserError
from ldae import latents, model, supervised, upstream, weights
from ldae.autoencoder import AutoencoderKL
from ldae.encoder import SemanticEncoder
from ldae.scripts import save_model_weights
from ldae.unet import ShiftUNet, UNet
from tests.helpers import ROOT, run_main, run_script
from tests.ldae import stages
from tests.ldae.test_supervised import run as run_supervised


@pytest.fixture(scope="session")
def done(cohort):
    return stages.trained(cohort)


def export(*args):
    run_main(save_model_weights, *args)


def pointers(state):
    return [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]


def digests(content):
    """Hashes of all tensors in a checkpoint that are large enough to be unlike each other by nature."""
    if isinstance(content, torch.Tensor):
        if content.numel() > 64 and content.double().std() > 0:
            yield checkpoint.weights_hash({"": content})
    elif isinstance(content, dict):
        for item in content.values():
            yield from digests(item)


def test_stage_one_exports_the_bare_autoencoder(done, tmp_path):
    """Facts 28 and 34: safetensors and JSON, which later stages read in place of the checkpoint."""
    best = stages.best(done, "aekl")
    export("--config", "aekl", "--root", done, "--output_folder", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoderkl.json", "autoencoderkl.safetensors"]
    saved, state = checkpoint.load(best), load_file(tmp_path / "autoencoderkl.safetensors")
    assert state.keys() == saved["state_dict"].keys()
    assert all(torch.equal(state[name], value) for name, value in saved["state_dict"].items())
    about = json.loads((tmp_path / "autoencoderkl.json").read_text())
    assert about["network"] == "ldae aekl" and about["hash"] == saved["hash"] and about["split"] == saved["split"]
    with runtime.start("cpu") as rt:
        ours = latents.load_aekl(tmp_path / "autoencoderkl.safetensors", rt)
        first = latents.load_aekl(best, rt)
    assert (ours.hash, ours.preparation, ours.latent_shape) == (first.hash, first.preparation, first.latent_shape)


def test_stage_three_exports_three_networks(done, tmp_path):
    """Each is one network alone, with what rebuilds it; together they are the checkpoint's tensors, once each."""
    best = stages.best(done)
    export("--ckpt", best, "--config", "ldae_repr_learn", "--output_folder", tmp_path)
    with runtime.start("cpu") as rt:
        ldae = model.load_ldae(best, rt)
    files = {name: weights.load(tmp_path / f"{name}.safetensors") for name in ("autoencoderkl", "encoder", "decoder")}
    aekl = AutoencoderKL(**files["autoencoderkl"]["config"])
    encoder = SemanticEncoder(**files["encoder"]["config"])
    settings = dict(files["decoder"]["config"])
    own = {name: settings.pop(name) for name in ("code_dim", "image_size")}
    decoder = ShiftUNet(UNet(**settings), **own)
    for name, network, whole in (
        ("autoencoderkl", aekl, ldae.aekl), ("encoder", encoder, ldae.encoder), ("decoder", decoder, ldae.decoder)
    ):  # fmt: skip
        network.load_state_dict(files[name]["state_dict"])  # strict
        assert checkpoint.weights_hash(network.state_dict()) == checkpoint.weights_hash(whole.state_dict())
        assert files[name]["source_hash"] == ldae.hash and files[name]["preparation"] == ldae.preparation.to_dict()
    count = sum(len(file["state_dict"]) for file in files.values())
    assert count == len(checkpoint.load(best)["state_dict"])


def test_checkpoints_hold_no_tensor_twice(done):
    """Fact 28: plain tensors, readable with pickle disabled; nothing frozen is stored twice or in the resume state."""
    for stage in stages.STAGES:
        for path in (stages.best(done, stage), stages.last(done, stage)):
            torch.load(path, weights_only=True)
    state = checkpoint.load(stages.best(done))["state_dict"]
    assert len(set(pointers(state))) == len(pointers(state))
    seen = [digest for value in state.values() for digest in digests(value)]
    assert len(set(seen)) == len(seen) > 50
    frozen = {d for name, value in state.items() if name.startswith(("aekl.", "prior.")) for d in digests(value)}
    assert frozen and not frozen & set(digests(checkpoint.load(stages.last(done, "ldae_repr_learn"))))


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_the_originals_names(done, tmp_path, form, capsys):
    """Key names as the original's programs expect them; our importer reads them back strictly."""
    export("--ckpt", stages.best(done), "--format", form, "--names", "original", "--output_folder", tmp_path)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(warned) == 2 and f"decoder.{form} pools all three axes" in warned[0]
    assert f"decoder.{form} has an estimator with a linear image" in warned[1]
    found = {}
    for name in ("autoencoderkl", "encoder", "decoder"):
        path = tmp_path / f"{name}.{form}"
        found[name] = torch.load(path, weights_only=True) if form == "pth" else load_file(path)
    assert {"quant_conv_mu.conv.weight", "encoder.blocks.0.conv.weight"} <= found["autoencoderkl"].keys()
    assert {"time_embed.0.weight", "label_emb.weight", "shift_out.0.weight"} <= found["decoder"].keys()
    assert "slice_distributed.module.backbone.features.0.0.weight" in found["encoder"]
    with runtime.start("cpu") as rt:
        ldae = model.load_ldae(stages.best(done), rt)
    settings = ldae.settings
    for name, network, whole in (
        ("autoencoderkl", AutoencoderKL(**settings["aekl"]), ldae.aekl),
        ("encoder", SemanticEncoder(**settings["encoder"]), ldae.encoder),
        ("decoder", model.build_decoder(settings), ldae.decoder),
    ):
        upstream.load(network, found[name])
        assert checkpoint.weights_hash(network.state_dict()) == checkpoint.weights_hash(whole.state_dict())
    if form == "safetensors":
        with runtime.start("cpu") as rt:
            again = latents.load_aekl(tmp_path / "autoencoderkl.safetensors", rt)
        assert again.hash == checkpoint.weights_hash(ldae.aekl.state_dict())


def test_prior_and_baselines(done, study, tmp_path):
    export("--config", "ldae_pretrain", "--root", done, "--output_folder", tmp_path)
    about = weights.load(tmp_path / "prior.safetensors")
    UNet(**about["config"]).load_state_dict(about["state_dict"])
    assert about["latents"]["std"] and about["aekl"]
    run_supervised("classification", study, "--steps", 1)
    export("--config", "classification", "--root", study, "--output_folder", tmp_path)
    about = weights.load(tmp_path / "classifier.safetensors")
    target = supervised.Diagnosis(**about["target"])
    supervised.with_head(SemanticEncoder(**about["config"]), target).load_state_dict(about["state_dict"])


def test_pairs_that_do_not_fit_are_refused(done, tmp_path):
    export("--config", "aekl", "--root", done, "--output_folder", tmp_path)
    path = tmp_path / "autoencoderkl.safetensors"
    good, about = path.read_bytes(), path.with_suffix(".json").read_text()
    with runtime.start("cpu") as rt:
        for damage in (good[:-10], b"x" * 100):
            path.write_bytes(damage)
            with pytest.raises(UserError, match="is damaged"):
                latents.load_aekl(path, rt)
        path.write_bytes(good)
        path.with_suffix(".json").write_text(about.replace(json.loads(about)["hash"], "0" * 16))
        with pytest.raises(UserError, match="another hash"):
            latents.load_aekl(path, rt)
        path.with_suffix(".json").unlink()
        with pytest.raises(UserError, match="no .*autoencoderkl.json; weights of this kind are a pair"):
            latents.load_aekl(path, rt)
        path.with_suffix(".json").write_text(about.replace("ldae aekl", "ldae prior"))
        with pytest.raises(UserError, match="holds prior, not aekl"):
            latents.load_aekl(path, rt)


def test_nothing_is_replaced_and_mistakes_are_named(done, tmp_path):
    export("--config", "aekl", "--root", done, "--output_folder", tmp_path)
    with pytest.raises(UserError, match="exists: add --overwrite"):
        export("--config", "aekl", "--root", done, "--output_folder", tmp_path)
    export("--config", "aekl", "--root", done, "--output_folder", tmp_path, "--overwrite")
    with pytest.raises(UserError, match="of stage aekl, classification of classification: give a matching pair"):
        export("--ckpt", stages.best(done, "aekl"), "--config", "classification", "--output_folder", tmp_path / "a")
    with pytest.raises(UserError, match="is no best.ckpt of a stage"):
        export("--ckpt", stages.last(done, "aekl"), "--output_folder", tmp_path / "a")
    with pytest.raises(UserError, match="does not exist"):
        export("--config", "regression", "--root", done, "--output_folder", tmp_path / "a")
    with pytest.raises(UserError, match="nothing to export"):
        export("--output_folder", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_as_a_user_runs_it(done, tmp_path):
    """Fact 38: the documented command, from another folder."""
    root = shutil.copytree(done, tmp_path / "study")
    words = ["ldae/scripts/save_model_weights.py", "--config", ROOT / "ldae/config/aekl.yaml", "--root", root]
    done = run_script(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (root / "models/autoencoderkl.safetensors").is_file() and "parameters" in done.stdout
