"""Loss terms by hand-made values. "fact N" is an acceptance fact."""

import math

import pytest
import torch

from common import schedulers
from lapt import losses

SCHEDULE = schedulers.make_schedule("scaled_linear", 1000, 0.0015, 0.0195)


# ---- autoencoder


def linear_decoder(gain=2.0):
    """x_hat = w h with two weights, and fake logits that fall with x_hat: every gradient is known."""
    w = torch.tensor([gain, gain], requires_grad=True)
    h = torch.tensor([[3.0, 4.0]])
    return w, w * h


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    w, x_hat = linear_decoder()
    reconstruction, adversarial = x_hat.sum(), 10 * x_hat.sum()  # norms 5 and 50
    weight = losses.adaptive_weight(reconstruction, adversarial, w)
    assert weight.item() == pytest.approx(5 / (50 + 1e-4)) and not weight.requires_grad
    assert losses.adaptive_weight(reconstruction, 1e-9 * adversarial, w).item() == pytest.approx(1e4)
    assert losses.adaptive_weight(reconstruction, adversarial, w, average=lambda g: 0 * g).item() == 0


def test_generator_loss_adds_its_terms():
    w, x_hat = linear_decoder()
    x, codebook = torch.zeros(1, 2), torch.tensor(0.5)
    terms = losses.vq_generator_loss(
        x, x_hat, codebook, -x_hat, w, codebook_weight=2.0, disc_weight=0.2,
        perceptual=torch.tensor(3.0), perceptual_weight=0.1,
    )  # fmt: skip
    # rec 7 with gradient (1.5, 2), adversarial 7 with the same gradient
    assert terms["rec"].item() == terms["adversarial"].item() == 7
    assert terms["d_weight"].item() == pytest.approx(0.2 * 2.5 / (2.5 + 1e-4))
    assert terms["loss"].item() == pytest.approx(7 + 0.3 + 1.0 + terms["d_weight"].item() * 7)
    without = losses.vq_generator_loss(x, x_hat, codebook, None, w, codebook_weight=2.0, disc_weight=0.2)
    assert without["loss"].item() == 8 and without["adversarial"] == without["d_weight"] == 0
    with torch.no_grad():
        validation = losses.vq_generator_loss(x, x_hat, codebook, -x_hat, w, codebook_weight=2.0, disc_weight=0.2)
    assert validation["d_weight"] == 0 and validation["loss"].item() == 8


def test_hinge():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert losses.hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))


# ---- pixel terms


def errors():
    """Two samples of two channels on 2 x 2 pixels; the second sample has no lesion."""
    first = [[[1.0, 2.0], [4.0, 8.0]], [[1.0, 1.0], [1.0, 1.0]]]
    second = [[[3.0, 0.0], [0.0, 0.0]], [[5.0, 6.0], [0.0, 0.0]]]
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
    lesion = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    return torch.tensor([first, second], requires_grad=True), mask, lesion


def test_image_term():
    e, mask, _ = errors()
    assert losses.image_term(e, mask).item() == pytest.approx((5 / 2 + 8 / 1) / 2)
    total = e.sum().item()  # the original counts the background above, not below
    assert losses.image_term(e, mask, reduction="batch").item() == pytest.approx(total / 3)
    assert losses.image_term(e, torch.zeros_like(mask)).item() == 0


def test_lesion_term():
    e, _, lesion = errors()
    assert losses.lesion_term(e, lesion).item() == pytest.approx(3 / 1 / 2)  # of two samples, one of them without
    assert losses.lesion_term(e, lesion, reduction="sum").item() == pytest.approx(3)
    assert losses.lesion_term(e, lesion, reduction="batch").item() == pytest.approx(3)
    with pytest.raises(ValueError, match="reduction 'mean'"):
        losses.lesion_term(e, lesion, reduction="mean")


def test_every_lesion_counts_the_same_whatever_its_size():
    e, lesion = torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    lesion[0, 0, 0, 0], lesion[1] = 1, 1
    e[0] = 5
    assert losses.lesion_term(e, lesion).item() == pytest.approx(3.0)
    assert losses.lesion_term(e, lesion, reduction="batch").item() == pytest.approx((5 + 64) / 65)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_a_batch_without_lesion_teaches_nothing(reduction):
    """fact 12: the original's term is 0 / 0, and one step later every weight is NaN."""
    e, _, lesion = errors()
    term = losses.lesion_term(e, torch.zeros_like(lesion), reduction=reduction)
    term.backward()
    assert term.item() == 0 and e.grad.abs().max() == 0


def test_samples_weigh_what_their_timestep_says():
    e, mask, lesion = errors()
    weight = torch.tensor([0.5, 0.0])
    assert losses.image_term(e, mask, weight).item() == pytest.approx(0.5 * 2.5 / 2)
    assert losses.lesion_term(e, lesion, weight).item() == pytest.approx(0.5 * 3 / 2)
    assert losses.lesion_term(e, lesion, weight, "batch").item() == pytest.approx(0.5 * 3)


def test_parts_of_a_batch_add_up():
    """What micro-batches and ranks rely on."""
    e, mask, lesion = errors()
    for term, area in ((losses.image_term, mask), (losses.lesion_term, lesion)):
        parts = [term(e[i : i + 1], area[i : i + 1]).item() for i in range(2)]
        assert term(e, area).item() == pytest.approx(sum(parts) / 2)


def test_volumes_are_samples_too():
    e, mask, _ = errors()
    stack = torch.stack([e[0], e[1]], -1)[None]  # (1, 2, 2, 2, 2 slices)
    area = torch.stack([mask[0], mask[1]], -1)[None]
    assert losses.image_term(stack, area).item() == pytest.approx((5 + 8) / 3)


# ---- timesteps


def test_one_step_estimate_of_the_true_noise_is_the_clean_latent():
    """fact 6"""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(0, 900, 7)
    z_0, noise = (torch.randn(len(t), 3, 4, 4, generator=g) for _ in range(2))
    z_t = schedulers.q_sample(SCHEDULE, z_0, t, noise)
    assert (schedulers.x0_from_eps(SCHEDULE, z_t, t, noise) - z_0).abs().max() <= 1e-4


def test_schedule_and_sampling_steps():
    """fact 5"""
    assert SCHEDULE.betas[0].item() == pytest.approx(0.0015) and SCHEDULE.betas[-1].item() == pytest.approx(0.0195)
    assert SCHEDULE.alphas_bar[-1].item() == pytest.approx(1.42304e-4, rel=1e-4)
    assert sorted(schedulers.respace(1000, 2, "leading", offset=1)) == [1, 501]
    assert schedulers.respace(1000, 2)[0] == 999


def test_timestep_weights():
    none, snr, some = (
        losses.timestep_weight(SCHEDULE, kind, snr_gamma=1.0, t_max=200) for kind in ("none", "snr", "range")
    )
    assert none.shape == snr.shape == some.shape == (1000,)
    assert none.min() == 1
    assert some.sum() == 200 and some[:200].min() == 1
    assert snr[0] == 1 and snr[-1].item() == pytest.approx(1.42304e-4 / (1 - 1.42304e-4), rel=1e-3)
    assert (snr.diff() <= 0).all()
    with pytest.raises(ValueError, match="min_snr"):
        losses.timestep_weight(SCHEDULE, "min_snr")


def test_snr_weight_bounds_what_one_step_can_pull():
    """An error of the noise grows by sqrt(1 / SNR) on its way to the clean latent; unweighted, its square to 7000."""
    gain = 1 / schedulers.snr(SCHEDULE)
    assert gain.max() > 7000 and gain[800:].sum() / gain.sum() > 0.9
    assert (gain * losses.timestep_weight(SCHEDULE, "snr", snr_gamma=5.0)).max().item() <= 1 / 5 + 1e-6


# ---- segmentation


def test_overlap_losses_by_hand():
    p, truth = torch.tensor([0.5, 0.5, 0.0, 1.0]).view(1, 1, 4), torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 4)
    assert losses.tversky(p, truth, alpha=0.1, beta=0.9).item() == pytest.approx(
        1 - 1.5 / (1.5 + 0.05 + 0.45), abs=1e-6
    )
    assert losses.focal_dice(p, truth, gamma=3).item() == pytest.approx((1 - 3 / 4) ** 4, abs=1e-6)
    assert (
        losses.tversky(truth, truth, alpha=0.1, beta=0.9).item() == losses.focal_dice(truth, truth, gamma=1).item() == 0
    )


def test_guide_loss_prefers_finding_the_lesion():
    """alpha 0.1, beta 0.9: a missed voxel costs more than a false one."""
    truth = torch.zeros(1, 1, 10)
    truth[..., :5] = 1
    weights = {"alpha": 0.1, "beta": 0.9, "gamma": 3.0}
    more, less = truth.clone(), truth.clone()
    more[..., 5], less[..., 4] = 1, 0
    logits = [20 * (2 * part - 1) for part in (truth, more, less)]
    exact, false_positive, missed = (losses.guide_loss(part, truth, **weights).item() for part in logits)
    assert exact < 1e-6 < false_positive < missed


def test_guide_loss_of_each_sample_or_of_the_batch():
    g = torch.Generator().manual_seed(1)
    logits, truth = torch.randn(2, 1, 6, 6, generator=g), torch.zeros(2, 1, 6, 6)
    truth[0, 0, :3], truth[1, 0, 0, 0] = 1, 1
    weights = {"alpha": 0.7, "beta": 0.3, "gamma": 2.0}
    each = [losses.guide_loss(logits[i : i + 1], truth[i : i + 1], **weights).item() for i in range(2)]
    assert losses.guide_loss(logits, truth, **weights, reduction="sample").item() == pytest.approx(sum(each) / 2)
    assert losses.guide_loss(logits, truth, **weights).item() < sum(each) / 2 - 0.05  # the large lesion rules the batch
    with pytest.raises(ValueError, match="reduction"):
        losses.guide_loss(logits, truth, **weights, reduction="sum")


def test_smooth_makes_lesion_free_samples_teach():
    """The original's 1e-6 leaves a loss of 1 whose gradient is nothing."""
    gradients = []
    for smooth in (1e-6, 1.0):
        logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
        loss = losses.guide_loss(logits, torch.zeros(1, 1, 4, 4), alpha=0.5, beta=0.5, gamma=1.0, smooth=smooth)
        loss.backward()
        assert math.isfinite(loss.item())
        gradients.append(logits.grad.abs().max().item())
    assert gradients[0] < 1e-6 and gradients[1] > 1e-3
