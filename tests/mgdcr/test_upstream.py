"""The original's checkpoints. "A<n>" is an acceptance fact of the specification; outputs: tests/test_golden.py."""

import pytest
import torch

from common import checkpoint
from common.cli import UserError
from mgdcr import upstream
from mgdcr.diffusion import decode, invert
from mgdcr.latent_net import MLPSkipNet
from mgdcr.model import DiffAE, UncondUNet
from tests.mgdcr.test_model import PAPER, PAPER_ENCODER, SMALL, SMALL_ENCODER, drawn, randomised, small

LATENT = {"num_channels": 12, "num_hid_channels": 16, "num_layers": 4, "skip_layers": [1, 3]}


def lightning(network, average, image_size=16):
    """A checkpoint as the original's trainer leaves it: raw weights, their average, and the noise of its pictures."""
    state = {f"model.{key}": value for key, value in upstream.to_upstream(network).items()}
    state |= {f"ema_model.{key}": value for key, value in upstream.to_upstream(average).items()}
    return {"epoch": 438, "global_step": 756789, "state_dict": state | {"x_T": drawn(2, 1, image_size, image_size)},
            "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": []}  # fmt: skip


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- keys


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: DiffAE(**SMALL, **SMALL_ENCODER), (
            "time_embed.time_embed.2.bias", "input_blocks.0.0.weight", "input_blocks.2.0.in_layers.2.weight",
            "input_blocks.3.0.cond_emb_layers.1.weight", "input_blocks.3.1.qkv.weight", "middle_block.1.proj_out.bias",
            "output_blocks.1.2.out_layers.3.weight", "output_blocks.3.0.skip_connection.weight", "out.2.weight",
            "encoder.input_blocks.1.0.in_layers.0.weight", "encoder.middle_block.2.in_layers.2.bias",
            "encoder.out.0.weight", "encoder.out.3.weight",
        )),
        (lambda: DiffAE(**SMALL, **SMALL_ENCODER, resblock_updown=False), (
            "input_blocks.2.0.op.weight", "output_blocks.1.2.conv.weight", "encoder.input_blocks.2.0.op.bias",
        )),
        (lambda: UncondUNet(**SMALL), ("time_embed.0.weight", "input_blocks.1.0.emb_layers.1.weight")),
        (lambda: MLPSkipNet(**LATENT), (
            "time_embed.2.weight", "layers.0.linear_emb.weight", "layers.0.cond_layers.1.weight", "layers.1.norm.bias",
            "layers.3.linear.weight",
        )),
    ],
)  # fmt: skip
def test_weights_under_the_originals_names_and_back(make, keys):
    network, other = randomised(make()), randomised(make(), seed=1)
    state = upstream.to_upstream(network)
    assert set(keys) <= state.keys() and not any(".encoder." in key or "unet" in key for key in state)
    assert not same(network, other)
    assert same(upstream.load(other, state), network)


def test_of_two_names_the_later_one_counts():
    network = randomised(MLPSkipNet(**LATENT))
    state = {key: value + ("linear_emb" in key) for key, value in upstream.to_upstream(network).items()}
    assert same(upstream.load(MLPSkipNet(**LATENT), state), network)
    state = {key: value for key, value in state.items() if "linear_emb" not in key}
    assert same(upstream.load(MLPSkipNet(**LATENT), state), network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("out.2.bias"), "no out.2.bias"),
        (lambda state: state.update(more=torch.zeros(1)), "unexpected more"),
        (lambda state: state.update({"out.2.bias": torch.zeros(2)}), r"out.2.bias has shape \(2,\), expected \(1,\)"),
    ],
)
def test_loading_is_strict(change, message):
    network = small()
    state = dict(upstream.to_upstream(network))
    change(state)
    with pytest.raises(UserError, match=message):
        upstream.load(network, state)


# ---- files


def test_a_checkpoint_of_the_original_decodes_the_same(tmp_path):
    """A26: of a file with both copies the average is taken, unless the raw weights are asked for."""
    raw, average = small(), randomised(DiffAE(**SMALL, **SMALL_ENCODER), seed=1)
    path = tmp_path / "last.ckpt"
    torch.save(lightning(raw, average), path)
    x_0 = drawn(2, 1, 16, 16).clamp(-1, 1)
    for weights, expected in (("ema", average), ("raw", raw)):
        kind, settings, network = upstream.from_checkpoint(checkpoint.load(path), path, weights=weights)
        assert kind == "diffae" and same(network, expected)
        DiffAE(**settings).load_state_dict(network.state_dict())
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in network.parameters())
        with torch.no_grad():
            z, z_expected = network.eval().encode(x_0), expected.encode(x_0)
            got = decode(network, invert(network, x_0, z, 5), z, 5)
            wanted = decode(expected, invert(expected, x_0, z_expected, 5), z_expected, 5)
        assert (got - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resblock_updown": False},
        {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "num_input_res_blocks": 1, "enc_num_res_blocks": 1},
        {"attention_resolutions": (), "enc_attention_resolutions": (16,), "cond_channels": 10, "enc_out_channels": 10},
    ],
)
def test_settings_are_read_off_the_weights(options):
    network = small(**options)
    content = lightning(network, network)
    extra = {"enc_num_res_blocks": 1} if "enc_num_res_blocks" in options else {}
    _, settings, found = upstream.from_checkpoint(content, "last.ckpt", **extra)
    assert same(found, network) and settings["image_size"] == 16
    x, t = drawn(2, 1, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x, t, x), network(x, t, x))


def test_the_published_networks_are_recognised():
    """A1 and A26 at full size, without memory for the weights."""
    with torch.device("meta"):
        networks = {
            "diffae": DiffAE(**PAPER, **PAPER_ENCODER),
            "ddim": UncondUNet(**PAPER),
            "latent": MLPSkipNet(num_channels=512, num_hid_channels=2048, num_layers=10, skip_layers=range(1, 10)),
        }
    expected = {"diffae": PAPER | PAPER_ENCODER, "ddim": PAPER, "latent": {"skip_layers": list(range(1, 10))}}
    for kind, network in networks.items():
        found, settings, _ = upstream.from_checkpoint(upstream.to_upstream(network), "last.ckpt")
        assert found == kind
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in expected[kind].items()}
        assert {k: settings[k] for k in wanted} == wanted


def test_bare_weights_and_what_leaves_no_trace():
    network = randomised(UncondUNet(**SMALL | {"num_heads": 2}))
    kind, settings, found = upstream.from_checkpoint(
        upstream.to_upstream(network), "unet.pt", image_size=16, num_heads=2, dropout=0.0
    )
    assert kind == "ddim" and same(found, network) and settings["num_heads"] == 2 and settings["dropout"] == 0.0
    x, t = drawn(1, 1, 16, 16), torch.tensor([9])
    with torch.no_grad():
        torch.testing.assert_close(found.eval().denoise(x, t), network.denoise(x, t))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"state_dict": {"conv.weight": torch.zeros(3)}},
        {"state_dict": {"model.out.2.weight": torch.zeros(1, 8, 3, 3)}},  # not averaged
        {"state_dict": {"ema_model.input_blocks.0.0.weight": torch.zeros(8, 1, 3, 3)}},
        {"state_dict": 3},
    ],
)
def test_another_file_is_refused_by_name(content):
    with pytest.raises(UserError, match="other.ckpt"):
        upstream.from_checkpoint(content, "other.ckpt")


# ---- reference cases


def test_operations_in_words():
    """What the reference cases do to drawn inputs."""
    x = torch.tensor([[-2.0, 0.6], [0.9, 3.0]])
    for words, expected in {
        "clamped to [-1,1]": x.clamp(-1, 1),
        "sigmoid": x.sigmoid(),
        "absolute value times 0.4": 0.4 * x.abs(),
        "absolute value times 80, plus 5": 80 * x.abs() + 5,
        "absolute value plus 0.5": x.abs() + 0.5,
        "plus 0.5": x + 0.5,
        "1 where > 0.8, else 0": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "1 where > 0.5, else 0; slices [1] set to 0": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        "absolute value times 50; slices [0, 1] set to 0": torch.zeros(2, 2),
        "added to a, clamped to [0,1]": (x + 0.5).clamp(0, 1),
    }.items():
        got = upstream.then(words, x.clone(), {"a": torch.full((2, 2), 0.5)})
        torch.testing.assert_close(got, expected, msg=words)
    with pytest.raises(ValueError, match="squared"):
        upstream.then("squared", x, {})


def test_settings_that_we_do_not_have():
    with pytest.raises(UserError, match="activation"):
        upstream.build("MLPSkipNet", LATENT | {"activation": "relu"})
    with pytest.raises(KeyError):
        upstream.build("GAN", {})
