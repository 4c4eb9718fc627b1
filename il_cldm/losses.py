"""Loss terms of the autoencoder stage, as pure functions (original program, section "stage 1").

The autoencoder minimises 100 * reconstruction + generator_adversarial (+ kl_weight * kl), the discriminator the hinge.
Volumes are (B, C, D, H, W); logits are the discriminator's patch answers, no sigmoid. All return a scalar.
"""

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(x_hat, x)


def generator_adversarial_loss(logits_fake: Tensor) -> Tensor:
    """Minus the mean answer to the reconstruction: the generator wants it called real."""
    return -logits_fake.mean()


def hinge_real_loss(logits_real: Tensor) -> Tensor:
    """Mean of relu(1 - r)."""
    return F.relu(1.0 - logits_real).mean()


def hinge_fake_loss(logits_fake: Tensor) -> Tensor:
    """Mean of relu(1 + f)."""
    return F.relu(1.0 + logits_fake).mean()


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of both hinge terms; logits_fake must come from a detached reconstruction.

    Deviation (original code): there the reconstruction is not detached, so minus half the adversarial gradient leaks
    into the autoencoder wherever the hinge is active.
    """
    return 0.5 * (hinge_real_loss(logits_real) + hinge_fake_loss(logits_fake))


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over all latent elements of KL(N(mean, exp(logvar)) || N(0, 1)); not in the original."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
