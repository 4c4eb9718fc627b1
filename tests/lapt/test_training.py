"""All stages: the same result however a run is cut, killed, resumed or shared by ranks; what training may change."""

import random
import shutil
import signal
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch

from common import checkpoint, runtime, training
from common.cli import UserError
from common.lpips import LPIPS
from lapt import data_split, ldm, losses, main, segmentation, vqgan
from lapt.config import CONFIGS, PRESETS, merge
from lapt.diffusion import fold, load_model
from tests.helpers import ROOT, assert_same_tensors, run_main, two_ranks
from tests.lapt.rank_stages import STAGES as SHARED
from tests.lapt.stages import (
    FULL,
    SHORT,
    STAGES,
    again,
    best,
    earlier,
    interrupted,
    last,
    log_rows,
    of_another_split,
    trained,
    words,
)

RT = runtime.Runtime(torch.device("cpu"))
DIFFUSION = ("ldm", "lapt", "ldm3d", "lapt3d")
NETWORK = {"vqgan": "vqgan", "guide": "guide"} | dict.fromkeys(DIFFUSION, "learned")


@pytest.fixture(scope="session")
def runs(prepared):
    return trained(prepared)


@pytest.fixture(scope="session")
def whole(prepared, runs, tmp_path_factory):
    """Runs of SHORT steps that were left alone, to compare others with."""
    folder = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        if stage in FULL:
            again(stage, prepared, runs, folder)
        else:
            shutil.copytree(runs / stage, folder / stage)
    return folder


def options(stage, prepared, runs, *more):
    """The resolved options of a tiny stage."""
    values = [w for w in words(stage, prepared, runs) if "=" in w]
    return CONFIGS[stage](**merge([], [f"stage={stage}", *values, *earlier(runs, stage), *more])[1], device="cpu")


def assert_same_run(a, b, stage):
    """Weights, average, optimizer, RNG, best checkpoint and logs agree bit by bit."""
    assert_same_tensors(last(a, stage), last(b, stage))
    assert_same_tensors(best(a, stage), best(b, stage))
    assert log_rows(a, stage) == log_rows(b, stage)
    for kind in ("train", "val"):
        assert (a / stage / f"{kind}.csv").read_bytes() == (b / stage / f"{kind}.csv").read_bytes()


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_cut_and_continued_in_the_middle_of_an_epoch_and_of_a_log_interval(prepared, runs, whole, tmp_path, stage):
    """Fact 15: N steps + the same command again are the run that was left alone, bit by bit, data order included."""
    again(stage, prepared, runs, tmp_path, "--max_steps", 1)
    assert checkpoint.load(last(tmp_path, stage))["step"] == 1
    assert best(tmp_path, stage).is_file()  # usable although nothing was validated yet
    again(stage, prepared, runs, tmp_path)
    assert_same_run(whole, tmp_path, stage)
    before = last(tmp_path, stage).read_bytes()
    again(stage, prepared, runs, tmp_path)  # it is complete: nothing happens
    assert last(tmp_path, stage).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_at_any_moment(prepared, runs, whole, tmp_path, stage):
    """Fact 16: SIGKILL at a random moment, during writing too, leaves a checkpoint that continues bit-identically."""
    command = words(stage, prepared, tmp_path, *earlier(runs, stage), "training.save_every=1")
    delay_s = random.uniform(0, 0.05)
    assert interrupted(stage, tmp_path, command, signal.SIGKILL, 2, delay_s) == -signal.SIGKILL
    assert 1 <= checkpoint.load(last(tmp_path, stage))["step"] <= SHORT
    again(stage, prepared, runs, tmp_path, "training.save_every=1")
    assert_same_run(whole, tmp_path, stage)


@pytest.mark.parametrize("stage", ["vqgan", "lapt"])
def test_signal(prepared, runs, tmp_path, stage):
    """Fact 16: SIGTERM in mid-epoch ends a run cleanly: its own exit status, what was done is saved."""
    command = words(stage, prepared, tmp_path, *earlier(runs, stage), "training.steps=400", "training.val_every=99")
    assert interrupted(stage, tmp_path, command, signal.SIGTERM, 2) == 128 + signal.SIGTERM
    assert 2 <= checkpoint.load(last(tmp_path, stage))["step"] < 400


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(prepared, runs, tmp_path):
    """Losses that are not finite end the run in one line, and never reach a file."""
    for stage in ("vqgan", "ldm"):
        again(stage, prepared, runs, tmp_path, "--max_steps", 2)
        with pytest.raises(UserError, match="diverged"):
            again(stage, prepared, runs, tmp_path / "bad", "training.lr=1e30", "training.save_every=1",
                  "training.log_every=100", "training.grad_clip=0", "training.lr_schedule=constant")  # fmt: skip
        state = checkpoint.load(last(tmp_path / "bad", stage))
        assert all(torch.isfinite(value).all() for value in state[NETWORK[stage]].values())


@pytest.mark.parametrize("stage", ["vqgan", "guide", "lapt"])
def test_other_options_are_refused_and_restart_begins_anew(prepared, runs, whole, tmp_path, stage):
    shutil.copytree(whole / stage, tmp_path / stage)
    with pytest.raises(UserError, match="lr: 0.002 before, 0.003 now.*--restart"):
        again(stage, prepared, runs, tmp_path, "training.lr=3e-3")
    with pytest.raises(UserError, match="seed: 23 before, 5 now"):
        again(stage, prepared, runs, tmp_path, "-s", 5)
    again(stage, prepared, runs, tmp_path, "training.lr=3e-3", "--restart", "--max_steps", 1)
    assert checkpoint.load(last(tmp_path, stage))["step"] == checkpoint.load(best(tmp_path, stage))["step"] == 1


@pytest.mark.slow
def test_two_ranks_train_as_one(prepared, runs, tmp_path):
    """The same global batch on two ranks: same losses, scores and weights to float tolerance, in every trainer."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--max_steps", 2, "training.log_every=1", "training.lr=1e-3"]
    for stage in SHARED:
        again(stage, prepared, runs, one, *more)
    done = two_ranks(["-m", "tests.lapt.rank_stages", prepared, runs, two, *map(str, more)], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in SHARED:
        for row_1, row_2 in zip(log_rows(one, stage), log_rows(two, stage), strict=True):
            for key, value in row_1.items():
                same = value if key == "kind" or value is None else pytest.approx(value, rel=5e-3, abs=5e-3)
                assert row_2[key] == same, (stage, key)
        a, b = (checkpoint.load(last(folder, stage))[NETWORK[stage]] for folder in (one, two))
        assert a.keys() == b.keys()
        for key in a:  # Adam makes a full step of an entry whose gradient is rounding noise
            assert (a[key].float() - b[key].float()).abs().mean() < 2e-4, (stage, key)


@pytest.mark.parametrize("stage", ["vqgan", "lapt"])
def test_micro_batches_do_not_change_the_step(prepared, runs, tmp_path, stage):
    """With accumulation and recomputed activations the same losses, gradient norms and one average per step."""
    how = ("--max_steps", 2, "training.log_every=1", "training.batch_size=6", "loss.disc_start=9", "data.augment=none")
    how = [w for w in how if stage == "vqgan" or not str(w).startswith("loss")]
    again(stage, prepared, runs, tmp_path / "a", *how)
    again(stage, prepared, runs, tmp_path / "b", *how, "training.accumulate=3", "training.checkpointing=true")
    a, b = (checkpoint.load(last(tmp_path / name, stage)) for name in "ab")
    assert a["ema"]["step"] == b["ema"]["step"] == 2
    for row_a, row_b in zip(log_rows(tmp_path / "a", stage), log_rows(tmp_path / "b", stage), strict=True):
        for key in row_a.keys() - {"kind"}:
            assert row_b[key] == (row_a[key] and pytest.approx(row_a[key], rel=2e-3, abs=1e-4)), key


@pytest.mark.parametrize("stage", ["vqgan", "guide", "ldm", "lapt3d"])
def test_bf16_trains_nearly_the_same_with_weights_in_float32(prepared, runs, whole, tmp_path, stage):
    again(stage, prepared, runs, tmp_path, "--precision", "bf16", "--max_steps", 2)
    half, full = (log_rows(folder, stage, "train")[0] for folder in (tmp_path, whole))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.1) and half["loss"] != full["loss"]
    weights = checkpoint.load(last(tmp_path, stage))[NETWORK[stage]].values()
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in weights)


def test_perceptual_term_of_two_channels_from_a_file(prepared, runs, tmp_path):
    """DWI and ADC each go through the network by themselves; untrained weights stand for the pretrained ones."""
    file = tmp_path / "vgg.pth"
    torch.manual_seed(0)
    torch.save(LPIPS("vgg").state_dict(), file)
    how = ("--max_steps", 1, "training.log_every=1", "training.batch_size=2", f"paths.perceptual_weights=[{file}]")
    for weight in (0, 10):
        again("vqgan", prepared, runs, tmp_path / str(weight), *how, f"loss.perceptual_weight={weight}")
    without, with_term = (log_rows(tmp_path / name, "vqgan", "train")[0] for name in ("0", "10"))
    assert without["rec"] == with_term["rec"]
    assert with_term["perceptual"] > 0
    assert with_term["loss"] - without["loss"] == pytest.approx(10 * with_term["perceptual"], rel=1e-3)
    a, b = (checkpoint.load(last(tmp_path / name, "vqgan"))["vqgan"] for name in ("0", "10"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


# ---- what training must do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_best_last_config_and_metrics(runs, stage):
    """Facts 11 and 17: files of a finished run; safe loading; no path of this machine in what is written."""
    for path in (best(runs, stage), last(runs, stage)):
        checkpoint.load(path)  # weights_only
    folder = runs / stage
    names = ("config.json", "manifest.json", "log.jsonl", "train.csv", "val.csv", f"configs/{stage}.yaml")
    assert all((folder / name).is_file() for name in names)
    assert not list(folder.rglob("*.pkl"))
    for name in ("config.json", f"configs/{stage}.yaml"):
        assert str(runs.parent) not in (folder / name).read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_are_drawn_and_change_nothing(prepared, runs, whole, tmp_path, stage):
    """Also of a single held-out item; the weights are those of the run that drew none, bit by bit."""
    again(stage, prepared, runs, tmp_path, "training.sample_every=1")
    image = plt.imread(tmp_path / stage / "samples" / "latest.png")
    assert image.shape[0] > 100 and image.std() > 0.05
    assert_same_tensors(last(whole, stage), last(tmp_path, stage))


SCORES = {  # of two validations, by stage: what selects, and which is the better one
    "vqgan": (vqgan, "evaluate", [({"rec": 0.3}, []), ({"rec": 0.4}, [])], {"": 0}),
    "guide": (segmentation, "evaluate", [({"iou": 0.1}, []), ({"iou": 0.2}, [])], {"": 1}),
    "ldm": (ldm, "validate", [{"loss": 0.3, "score": 0.9}, {"loss": 0.4, "score": 0.8}],
            {"training.select=loss": 0, "training.select=lesion": 1, "training.select=last": 1}),
    "lapt": (ldm, "validate", [{"loss": 0.4, "score": 0.8}, {"loss": 0.3, "score": 0.9}], {"": 0}),
}  # fmt: skip


@pytest.mark.parametrize("stage", SCORES)
def test_best_is_the_best_validation_and_patience_ends_the_run(prepared, runs, tmp_path, monkeypatch, stage):
    """best.ckpt holds the weights of the step that the stage's criterion prefers; post-training: the lesion score."""
    module, name, scores, wanted = SCORES[stage]
    for number, (select, best_one) in enumerate(wanted.items()):
        out, given = tmp_path / str(number), iter(scores)
        monkeypatch.setattr(module, name, lambda *args, given=given: next(given))
        size = 5 if stage == "guide" else 40  # two steps an epoch
        how = [f"training.batch_size={size}", *([select] if select else [])]
        how += ["diffusion.floor_steps=0"] if stage == "lapt" else []
        again(stage, prepared, runs, out, *how)
        assert checkpoint.load(best(out, stage))["step"] == (2, 4)[best_one], select
        if best_one == 0:  # the second validation is one without improvement
            given = iter(scores)
            monkeypatch.setattr(module, name, lambda *args, given=given: next(given))
            again(stage, prepared, runs, out / "patient", *how, "training.steps=8", "training.patience=1")
            assert checkpoint.load(last(out / "patient", stage))["step"] == 4


def test_losses_fall_by_half(runs):
    """Fact 11: reconstruction error of the autoencoder, noise error of the LDM."""
    for stage, name in (("vqgan", "rec"), ("ldm", "noise")):
        values = [row[name] for row in log_rows(runs, stage, "train")]
        assert values[-1] <= 0.5 * values[0], (stage, values[0], values[-1])


def test_autoencoder_step_by_hand(prepared, runs):
    """Loss and gradients of both networks from the formulas of specification 5.1, and the L2 term."""
    config = options("vqgan", prepared, runs, "loss.l2_weight=3", "loss.codebook_weight=0.7", "loss.disc_weight=0.4")
    torch.manual_seed(3)
    model, discriminator = vqgan.build_vqgan(config), vqgan.build_discriminator(config).eval()
    x = torch.rand(2, 2, 48, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    found = vqgan.vqgan_step(model, training.RealAndFake(discriminator), x, config)
    gradients = [{n: p.grad.clone() for n, p in network.named_parameters()} for network in (model, discriminator)]
    model.zero_grad()
    discriminator.zero_grad()

    x_hat, codebook = model(x)
    rec, l2, adversarial = (x - x_hat).abs().mean(), (x - x_hat).square().mean(), -discriminator(x_hat).mean()
    norms = [torch.autograd.grad(term, model.last_layer, retain_graph=True)[0].norm() for term in (rec, adversarial)]
    d = 0.4 * norms[0] / (norms[1] + 1e-4)
    loss = rec + 3 * l2 + 0.7 * codebook + d.detach() * adversarial
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5) and d > 0
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for (name, gradient), value in zip(gradients[0].items(), expected, strict=True):
        assert torch.allclose(gradient, value, rtol=1e-4, atol=1e-7), name
    real, fake = discriminator(x), discriminator(x_hat.detach())
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    hinge.backward()
    assert found["discriminator"].item() == pytest.approx(hinge.item(), rel=1e-5)
    for name, p in discriminator.named_parameters():
        assert torch.allclose(gradients[1][name], p.grad, rtol=1e-4, atol=1e-7), name


def test_the_discriminator_takes_part_from_its_step_on(prepared, runs, tmp_path):
    """loss.disc_start counts optimizer steps: untouched for so many, then trained, and felt by the autoencoder."""
    states = []
    for steps in (1, 2, 3):
        again("vqgan", prepared, runs, tmp_path, "--max_steps", steps, "loss.disc_start=2", "training.log_every=1")
        states.append(checkpoint.load(last(tmp_path, "vqgan"))["discriminator"])
    name = "conv_out.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[1][name], states[2][name])
    rows = log_rows(tmp_path, "vqgan", "train")
    assert [bool(row["d_weight"]) for row in rows] == [False, False, True]
    assert [row["discriminator"] is None for row in rows] == [True, True, False]


def test_revived_codes_are_used(prepared, runs):
    """training.revive_every: entries that no latent is nearest to move onto latents; those in use stay."""
    config = options("vqgan", prepared, runs)
    intensity = vqgan.Intensity.of_folder(prepared)
    data, model = vqgan.open_slices(config, "train", intensity), vqgan.build_vqgan(config)
    before = model.codebook.embedding.weight.clone()
    used = vqgan.evaluate(model, data, list(range(len(data))), RT)[0]["codes_used"]
    vqgan.revive_codes(model, data, 0, config, RT)
    kept = (model.codebook.embedding.weight == before).all(1).float().mean()
    assert 0 < kept <= used < 0.5
    assert vqgan.evaluate(model, data, list(range(len(data))), RT)[0]["codes_used"] > 0.9


def test_frozen_means_frozen(prepared, runs):
    """Fact 13: a step of post-training changes conditioner and U-Net; autoencoder and guide store no gradient."""
    config = options("lapt3d", prepared, runs)
    torch.manual_seed(0)
    model = ldm.start_model(config, RT)
    guide = segmentation.load_guide(config.guide, RT)
    frozen = [checkpoint.weights_hash(network.state_dict()) for network in (model.autoencoder, guide.model)]
    learned = ldm.learned_parts(model, config)
    before = {name: value.clone() for name, value in learned.state_dict().items()}
    optimizer = torch.optim.SGD(learned.parameters(), lr=1.0)
    one_step(model, config, guide, prepared)["loss"].backward()
    optimizer.step()
    assert frozen == [checkpoint.weights_hash(network.state_dict()) for network in (model.autoencoder, guide.model)]
    for network in (model.autoencoder, guide.model):
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    after = learned.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"conditioner", "unet"}
    # And in the files of whole runs.
    states = {stage: checkpoint.load(best(runs, stage))["state_dict"] for stage in ("ldm", "lapt", "ldm3d", "lapt3d")}
    original = checkpoint.load(best(runs, "vqgan"))["state_dict"]
    for state in states.values():
        assert all(torch.equal(state[f"autoencoder.{name}"], value) for name, value in original.items())


def one_step(model, config, guide, prepared, lesion=True, t=None):
    """Losses of one batch of post-training."""
    data = ldm.open_items(config, "train", model)
    has = [i for i in range(len(data)) if bool(data[i]["lesion"].any()) == lesion][: 2 if config.volumes else 4]
    item = torch.utils.data.default_collate([data[i] for i in has])
    item = {name: item[name] for name in ("mri", "ctp", "mask", "lesion")}
    g = torch.Generator().manual_seed(1)
    shape = model.latent_shape(fold(item["mri"]))
    noise = torch.randn((len(has), shape[0] // len(has), *shape[1:]), generator=g)
    t = torch.full((len(has),), 100) if t is None else t
    table = ldm.pixel_weights(model, config)
    denoiser = ldm.Denoiser(model.conditioner, model.unet)
    return ldm.training_losses(denoiser, model, item, t, noise, torch.rand((len(has), 2), generator=g), config, table,
                               guide)  # fmt: skip


@pytest.mark.parametrize("weighting", ["snr", "range"])
@pytest.mark.parametrize(("stage", "target"), [("lapt", "real"), ("lapt", "recon"), ("lapt3d", "real")])
def test_the_objective_by_hand(prepared, runs, stage, target, weighting):
    """Every term and the gradient from the formulas, item by item: what is decoded, compared with what, weighted how.

    The second item has no lesion, the third a timestep at which weighting range has no pixel terms.
    """
    weights = {"noise": 1.0, "image": 0.3, "lesion": 0.7} | ({"guide": 0.2} if stage == "lapt3d" else {})
    how = [f"loss.target={target}", f"loss.weighting={weighting}", "loss.t_max=600", "loss.w_img=0.3", "loss.w_les=0.7"]
    how += ["loss.w_seg=0.2", "loss.lesion_share=1"] if "guide" in weights else []
    config = options(stage, prepared, runs, *how)
    model = ldm.start_model(config, RT)
    guide = segmentation.load_guide(config.guide, RT) if "guide" in weights else None
    data = ldm.open_items(config, "train", model)
    kinds = {True: [], False: []}
    for i in range(len(data)):
        kinds[bool(data[i]["lesion"].any())].append(i)
    chosen = [data[kinds[True][0]], data[kinds[False][0]], data[kinds[True][3]]]
    items = {name: torch.stack([item[name] for item in chosen]) for name in ("mri", "ctp", "mask", "lesion")}
    g, t = torch.Generator().manual_seed(2), torch.tensor([150, 400, 800])
    slices, size = model.slices or 1, config.window if model.slices else 1
    noise = torch.randn((3, slices, *model.latent_shape(fold(items["mri"]))[1:]), generator=g)
    u = torch.rand((3, 2), generator=g)
    parameters = [p for p in ldm.learned_parts(model, config).parameters() if p.requires_grad]
    found = ldm.training_losses(ldm.Denoiser(model.conditioner, model.unet), model, items, t, noise, u, config,
                                ldm.pixel_weights(model, config), guide)  # fmt: skip

    expected = dict.fromkeys(weights, 0.0)
    for i, item in enumerate(chosen):
        x, mask, lesion = (fold(item[name][None]) for name in ("mri", "mask", "lesion"))
        bar = model.schedule.alphas_bar[t[i]].float()
        z_0, c = model.encode(x), model.condition(fold(item["ctp"][None]))
        z_t = bar.sqrt() * z_0 + (1 - bar).sqrt() * noise[i]
        eps = model.unet(torch.cat([z_t, c], 1), t[i].repeat(slices))
        start = ldm.choose_windows(items["lesion"][i : i + 1], u[i : i + 1], config)[0] if model.slices else 0
        part = slice(start, start + size)
        x_hat = model.decode((z_t / bar.sqrt() - (1 / bar - 1).sqrt() * eps)[part])
        e = (x_hat - (x if target == "real" else model.decode(z_0))[part]) ** 2
        snr = bar / (1 - bar)
        w = min(snr.item(), 5) / 5 if weighting == "snr" else float(t[i] < 600)
        expected["noise"] += (eps - noise[i]).square().mean() / 3
        expected["image"] += w * (e * mask[part]).sum() / mask[part].sum() / 3
        expected["lesion"] += w * (e * lesion[part]).sum() / lesion[part].sum().clamp(min=1) / 3
        if guide:
            seen = torch.where(mask[part] > 0, x_hat.clamp(-1, 1), -1.0).permute(1, 2, 3, 0)[None]
            truth, rule = lesion[part].permute(1, 2, 3, 0)[None], dict(alpha=0.1, beta=0.9, gamma=3.0, smooth=1.0)
            expected["guide"] += w * losses.guide_loss(guide.model(seen), truth, **rule) / 3
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name
    total = sum(weights[name] * value for name, value in expected.items())
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-4) and min(found[n] for n in expected) > 0
    for ours, by_hand in zip(*(torch.autograd.grad(x, parameters) for x in (found["loss"], total)), strict=True):
        assert torch.allclose(ours, by_hand, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("stage", ["lapt", "lapt3d"])
def test_a_batch_without_lesion(prepared, runs, stage, reduction):
    """Fact 12: the lesion term is 0, loss and gradients are finite, and with a lesion the term is positive."""
    config = options(stage, prepared, runs, f"loss.reduction={reduction}", "loss.weighting=none")
    model = ldm.start_model(config, RT)
    guide = segmentation.load_guide(config.guide, RT) if stage == "lapt3d" else None
    learned = ldm.learned_parts(model, config)
    terms = one_step(model, config, guide, prepared, lesion=False)
    terms["loss"].backward()
    assert terms["lesion"].item() == 0 and terms["image"].item() > 0
    assert all(torch.isfinite(p.grad).all() for p in learned.parameters())
    assert one_step(model, config, guide, prepared)["lesion"].item() > 0


def test_pixel_terms_reach_only_timesteps_with_weight(prepared, runs):
    """Weighting range: nothing is decoded at or above t_max; snr: the weight falls with the noise."""
    config = options("lapt", prepared, runs, "loss.weighting=range", "loss.t_max=300")
    model = ldm.start_model(config, RT)
    late = one_step(model, config, None, prepared, t=torch.tensor([300, 500, 700, 999]))
    assert late["image"] == late["lesion"] == 0 and late["loss"] == late["noise"]
    both = one_step(model, config, None, prepared, t=torch.tensor([100, 500, 100, 999]))
    assert both["image"] > 0
    table = ldm.pixel_weights(model, options("lapt", prepared, runs, "loss.weighting=snr"))
    assert table[0] == 1 and table[999] < 1e-4 and (table.diff() <= 0).all()
    assert ldm.pixel_weights(model, options("lapt", prepared, runs, "loss.w_img=0", "loss.w_les=0")) is None


def test_post_training_starts_from_the_average(prepared, runs):
    """Fact 14: bit-equal to the LDM's averaged weights; the upstream preset starts from the raw ones."""
    saved = checkpoint.load(best(runs, "ldm"))
    raw = saved["state_dict"] | saved["raw_state_dict"]
    averaged = {name.split(".")[0] for name, value in saved["state_dict"].items() if not torch.equal(raw[name], value)}
    assert averaged == {"conditioner", "unet"}  # one average over all that is trained
    for how, expected in (("average", saved["state_dict"]), (PRESETS["lapt"]["upstream"]["init_weights"], raw)):
        model = ldm.start_model(options("lapt", prepared, runs, f"training.init_weights={how}"), RT)
        state = model.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_plain_continuation_sees_what_post_training_sees(prepared, runs, tmp_path):
    """Fact 18's condition: same data order, timesteps, noise and start, whatever the weights of the terms."""
    how = ("--max_steps", 1, "training.log_every=1")
    again("lapt", prepared, runs, tmp_path / "lapt", *how)
    again("lapt", prepared, runs, tmp_path / "plain", *how, "loss.w_img=0", "loss.w_les=0")
    a, b = (log_rows(tmp_path / name, "lapt", "train")[0] for name in ("lapt", "plain"))
    assert a["noise"] == b["noise"] == b["loss"] and a["loss"] > a["noise"] and "image" not in b


def test_volume_model_starts_as_the_slice_model(prepared, runs):
    """Fact 3, of the trainer: before its first step ldm3d predicts, slice by slice, what the 2D LDM predicts."""
    config = options("ldm3d", prepared, runs)
    model, flat = ldm.start_model(config, RT), load_model(runs / "ldm", RT)
    item = ldm.open_items(config, "val", model)[0]
    ctp = fold(item["ctp"][None])
    z = torch.randn(model.latent_shape(ctp), generator=torch.Generator().manual_seed(0))
    t = torch.full((len(z),), 500)
    with torch.no_grad():
        c, c_flat = model.condition(ctp), flat.condition(ctp)
        assert torch.equal(c, c_flat)
        assert (model.denoiser(c)(z, t) - flat.denoiser(c_flat)(z, t)).abs().max() <= 1e-5
    assert torch.equal(model.latent_std, flat.latent_std) and model.intensity == flat.intensity


def test_only_the_layers_between_slices(prepared, runs):
    """model.trainable: part of the U-Net can be frozen, also with recomputed activations."""
    config = options("ldm3d", prepared, runs, "model.trainable=inter_slice", "training.checkpointing=true")
    model = ldm.start_model(config, RT)
    learned = ldm.learned_parts(model, config)
    one_step_ldm(model, config, prepared)["loss"].backward()
    trained_names = [name for name, p in learned.named_parameters() if p.grad is not None]
    assert trained_names and all("across" in name for name in trained_names)


def one_step_ldm(model, config, prepared):
    item = torch.utils.data.default_collate([ldm.open_items(config, "train", model)[0]])
    item = {name: item[name] for name in ("mri", "ctp", "mask", "lesion")}
    noise = torch.randn(1, *model.latent_shape(fold(item["mri"])))
    denoiser = ldm.Denoiser(model.conditioner, model.unet)
    return ldm.training_losses(denoiser, model, item, torch.tensor([300]), noise, torch.rand(1, 2), config)


@pytest.mark.parametrize("stage", ["vqgan", "guide", "lapt"])
def test_the_test_pass_refuses_another_split(prepared, runs, tmp_path, stage):
    """Somebody splits anew after the training: patients who trained the network would be tested."""
    data = of_another_split(prepared, tmp_path / "data")
    run_main(data_split, "--data", data, "--keep_lists")
    copy = shutil.copytree(runs / stage, tmp_path / stage)
    with pytest.raises(UserError, match="was trained with split .*paths.data"):
        run_main(main, "-r", copy, f"paths.data={data}", "--device", "cpu")
    assert not (copy / "test.json").exists() and not (copy / "samples" / "2").exists()


# ---- latents, validation, floor -------------------------------------------------------------------------------------


def test_latents_have_unit_scale_and_are_cached_without_augmentation(prepared, runs, tmp_path):
    """Scale: mean and SD of the whole training set; the cache gives what the encoder gives."""
    config = options("ldm", prepared, runs, "data.augment=none", f"paths.cache={tmp_path / 'cache'}")
    model = ldm.start_model(config, RT)
    data = ldm.open_items(config, "train", model)
    items = ldm.open_latents(config, model, data, {}, RT)
    z = torch.cat([model.encode(data[i]["mri"][None]) for i in range(len(data))])
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert torch.equal(model.normalise(items[5, 0]["z"][None]), z[5:6])
    saved = checkpoint.load(best(runs, "ldm"))["state_dict"]
    assert torch.equal(saved["latent_std"], model.latent_std)  # augmented training measures the same
    assert (model.latent_std - 1).abs().min() > 0.1  # so what follows sees the scale
    x = data[5]["mri"][None]
    assert torch.allclose(model.decode(model.encode(x)), model.autoencoder(x)[0], atol=1e-5)
    upstream = ldm.start_model(options("ldm", prepared, runs, "diffusion.latent_scale=none"), RT)
    assert upstream.latent_std.tolist() == [1.0] * 3 and upstream.latent_mean.tolist() == [0.0] * 3


def test_a_model_of_v_is_trained_sampled_and_followed(prepared, runs, tmp_path):
    """diffusion.prediction=v is written into the run, and the stages after it go on from there."""
    for stage, more in (("ldm", ["diffusion.prediction=v"]), ("lapt", [f"paths.ldm={tmp_path / 'ldm'}"])):
        again(stage, prepared, runs, tmp_path, "--max_steps", 1, *more)
        model = load_model(tmp_path / stage, RT)
        assert model.schedule.prediction == "v"
    c, z_T = torch.zeros(1, model.ctp_channels, 8, 8), torch.randn(1, 3, 8, 8)
    with torch.no_grad():  # one step of DDIM from the last timestep is the one-step estimate
        v, last = model.denoiser(c)(z_T, torch.tensor([999])), model.schedule.alphas_bar[999]
    assert torch.allclose(model.sample(c, z_T, 1), (last.sqrt() * z_T - (1 - last).sqrt() * v).float(), atol=1e-5)


def test_validation_is_the_same_every_time(prepared, runs):
    """A fixed table of timesteps and noise over the whole schedule; the lesion-aware score is brain plus lesion."""
    config = options("lapt", prepared, runs)
    model = load_model(runs / "lapt", RT)
    data = ldm.open_items(config, "val", model)
    a, b = (ldm.validate(model, data, [0, 4, 9], config, RT) for _ in range(2))
    assert a == b and a["score"] == a["brain"] + a["lesion"]
    times = sorted(t for n in range(8) for t in ldm.fixed_times(n, 4, 1000))
    assert len(set(times)) == 32 and times[0] < 60 and times[-1] > 940
    assert max(later - earlier for earlier, later in pairwise(times)) < 80


def test_floor_is_measured_stored_and_warned_about(prepared, runs, capsys, monkeypatch):
    """Fact 19: the autoencoder's lesion error beside that of the LDM; a warning if it is more than half of it."""
    config = options("lapt", prepared, runs)
    model = load_model(runs / "ldm", RT)
    data = ldm.open_items(config, "val", model)
    report = ldm.measure_floor(model, data, list(range(len(data))), config, RT)
    out = capsys.readouterr().out
    assert "floor of the autoencoder: lesion L1" in out
    assert ("warning" in out) == (report["autoencoder"]["lesion"] > 0.5 * report["ldm"]["lesion"])
    assert checkpoint.load(best(runs, "lapt"))["floor"]["autoencoder"]["lesion"] > 0
    # A floor far below the LDM's error: no warning. One item: first the autoencoder's errors, then the LDM's.
    errors = iter([(torch.tensor(0.1), torch.tensor(0.01)), (torch.tensor(0.1), torch.tensor(0.2))])
    monkeypatch.setattr(ldm, "image_errors", lambda *args: next(errors))
    ldm.measure_floor(model, data, [0], config, RT)
    assert "warning" not in capsys.readouterr().out


def test_windows_of_decoded_slices(prepared, runs):
    """Every lesion can be reached, at both ends of the volume too; without lesion every window can."""
    config = options("lapt3d", prepared, runs, "loss.lesion_share=1")
    lesion = torch.zeros(1, 1, 4, 4, 8)
    lesion[..., 7] = 1
    u = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    starts = ldm.choose_windows(lesion.expand(64, -1, -1, -1, -1), u, config)
    assert set(starts) == {4}
    assert set(ldm.choose_windows(torch.zeros(64, 1, 4, 4, 8), u, config)) == {0, 1, 2, 3, 4}
