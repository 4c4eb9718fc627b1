"""The 2.5D semantic encoder: a ConvNeXt on every slice of a volume, attention over the slices, one code per volume.

A prepared volume (B, 1, D, H, W), RAS+ and about [0, 1], is cut into slices (B, 1, S, h, w) by `to_slices`; a ConvNeXt
(Liu et al. 2022, torchvision's state-dict names, so that ImageNet weights load from a file without torchvision) makes a
feature of each, a soft attention weights them, and a cross-attention with the weighted mean as query gives the code y
(B, embed_dim). At the paper's size (ConvNeXt-Small, 768 numbers, 128 axial slices of 128 x 160): 53,588,065 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common.checkpoint
from common.cli import UserError

Stages = tuple[tuple[int, int], ...]  # (width, blocks) of every stage

CONVNEXT: dict[str, Stages] = {
    "convnext_tiny": ((96, 3), (192, 3), (384, 9), (768, 3)),
    "convnext_small": ((96, 3), (192, 3), (384, 27), (768, 3)),
    "convnext_base": ((128, 3), (256, 3), (512, 27), (1024, 3)),
    "convnext_large": ((192, 3), (384, 3), (768, 27), (1536, 3)),
}
DROP_PATH = {"convnext_tiny": 0.1, "convnext_small": 0.4, "convnext_base": 0.5, "convnext_large": 0.5}
LAYER_SCALE = 1e-6

PLANES = {"axial": (4, 2, 3), "coronal": (3, 2, 4), "sagittal": (2, 3, 4)}  # axes of x: slices, rows, columns


def to_slices(x: Tensor, plane: str) -> Tensor:
    """Slices (B, 1, S, h, w) of a volume (B, 1, D, H, W); axial: (B, 1, W, D, H), coronal: (B, 1, H, D, W)."""
    if plane not in PLANES:
        raise UserError(f"slicing plane {plane!r}: choose {', '.join(PLANES)}")
    return x.permute(0, 1, *PLANES[plane])


def axial_slices(x: Tensor) -> Tensor:
    """Axial slices (B, 1, W, D, H) of a volume (B, 1, D, H, W)."""
    return to_slices(x, "axial")


# ----------------------------------------------------------------------------------------------------------- ConvNeXt


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class Block(nn.Module):
    """ConvNeXt block: depthwise 7x7, layer norm, two-layer perceptron, layer scale, stochastic depth, plus the input.

    In training the branch of a sample is dropped with probability `drop_path`; the kept ones grow by 1 / (1 - p).
    """

    def __init__(self, channels: int, drop_path: float, layer_scale: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_scale * self.block(x)
        if self.training and self.drop_path > 0:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            h = h * kept / (1 - self.drop_path)
        return x + h


class ConvNeXt(nn.Module):
    """Images (N, C, h, w) -> features (N, width of the last stage): mean over space, then layer norm; no classifier.

    depths and widths: blocks and channels of each stage. Images shrink by 4 in the first and by 2 in every later stage.
    Probabilities of stochastic depth rise linearly from 0 to `drop_path`; layer_scale is where that factor starts.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int,
        drop_path: float,
        layer_scale: float = LAYER_SCALE,
    ):
        super().__init__()
        self.smallest = 4 * 2 ** (len(widths) - 1)
        layers = [nn.Sequential(nn.Conv2d(in_channels, widths[0], 4, stride=4), LayerNorm2d(widths[0], eps=1e-6))]
        index, channels = 0, widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage > 0:
                layers.append(nn.Sequential(LayerNorm2d(channels, eps=1e-6), nn.Conv2d(channels, width, 2, stride=2)))
            blocks = []
            for _ in range(depth):
                blocks.append(Block(width, drop_path * index / max(1, sum(depths) - 1), layer_scale))
                index += 1
            layers.append(nn.Sequential(*blocks))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(LayerNorm2d(channels, eps=1e-6))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3), keepdim=True)).flatten(1)


def grey_stem(weight: Tensor) -> Tensor:
    """First convolution (n, 3, k, k) for one channel (n, 1, k, k): grey is the same value in all three."""
    return weight.sum(1, keepdim=True)


def load_backbone(encoder: SemanticEncoder, path: str | Path) -> None:
    """Fill the encoder's backbone from torchvision's weights file of a ConvNeXt (ImageNet); its classifier is left out.

    UserError if the file does not hold exactly that backbone.
    """
    backbone = encoder.backbone
    state = common.checkpoint.load(path)
    state = {key: value for key, value in state.items() if not key.startswith("classifier.2.")}
    own, stem = backbone.state_dict(), "features.0.0.weight"
    if isinstance(state.get(stem), Tensor) and state[stem].shape[1] == 3 and own[stem].shape[1] == 1:
        state[stem] = grey_stem(state[stem])
    odd = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if odd or state.keys() - own.keys():
        what = f"no fitting {odd[0]}" if odd else f"unexpected {min(state.keys() - own.keys())}"
        raise UserError(f"{path} holds other weights than this encoder's backbone ({what}): give torchvision's file of "
                        "the same ConvNeXt, or train from scratch without it")  # fmt: skip
    backbone.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------ encoder


def position_code(length: int, dim: int) -> Tensor:
    """Sines and cosines of the slice number in turn (Vaswani et al. 2017, section 3.5): (length, dim) float32."""
    frequencies = torch.exp(torch.arange(0, dim, 2) * (-torch.log(torch.tensor(10000.0)) / dim))
    angle = torch.arange(length)[:, None] * frequencies
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :dim]


class SoftAttention(nn.Module):
    """Weighted mean of a sequence (B, S, C) -> (B, C), and its softmax weights (B, S)."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.linear(x).squeeze(2).softmax(1)
        return (weights.unsqueeze(1) @ x).squeeze(1), weights


class SemanticEncoder(nn.Module):
    """Slices (B, C, S, h, w) -> code y (B, embed_dim), for example of `axial_slices`.

    stages: (width, blocks) of each stage of the ConvNeXt, see CONVNEXT; its last width must be embed_dim. At most
    max_slices slices. In training the slices' features are dropped out with `dropout` (as are attention weights) and
    residual branches with up to `drop_path`. slice_batch: slices that the backbone takes at a time (None: all at once);
    in training these parts are recomputed in the backward pass, so that memory does not grow with S.
    """

    def __init__(
        self,
        *,
        stages: Stages,
        in_channels: int = 1,
        embed_dim: int,
        num_heads: int,
        max_slices: int,
        dropout: float,
        drop_path: float,
        layer_scale: float = LAYER_SCALE,
        slice_batch: int | None = None,
    ):
        super().__init__()
        widths, depths = zip(*stages, strict=True)
        if widths[-1] != embed_dim:
            raise ValueError(f"code of {embed_dim} numbers: must be as wide as the backbone's last stage, {widths[-1]}")
        self.embed_dim, self.max_slices, self.slice_batch = embed_dim, max_slices, slice_batch
        self.backbone = ConvNeXt(depths, widths, in_channels=in_channels, drop_path=drop_path, layer_scale=layer_scale)
        self.register_buffer("positions", position_code(max_slices, embed_dim)[None])
        self.dropout = nn.Dropout(dropout)
        self.soft_attention = SoftAttention(embed_dim)
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(embed_dim)

    def slice_features(self, slices: Tensor) -> Tensor:
        """Features of the slices (B, C, S, h, w) -> (B, S, embed_dim)."""
        B, _, S = slices.shape[:3]
        if S > self.max_slices:
            raise ValueError(f"{S} slices: this encoder takes at most {self.max_slices}")
        images = slices.transpose(1, 2).flatten(0, 1)  # (B S, C, h, w)
        parts = []
        for part in images.split(self.slice_batch or len(images)):
            if self.slice_batch and torch.is_grad_enabled():
                parts.append(checkpoint(self.backbone, part, use_reentrant=False))
            else:
                parts.append(self.backbone(part))
        return torch.cat(parts).view(B, S, -1)

    def forward(self, slices: Tensor, return_attention: bool = False):
        """y (B, embed_dim); with return_attention also the weights of the slices (B, S), which sum to 1."""
        x = self.slice_features(slices)
        x = self.dropout(x + self.positions[:, : x.shape[1]])
        mean, weights = self.soft_attention(x)
        # The attention projects query, keys and values once more, as the original does.
        h, _ = self.attention(self.query(mean)[:, None], self.key(x), self.value(x), need_weights=False)
        y = self.norm(h.squeeze(1))
        return (y, weights) if return_attention else y


class _SliceHead(nn.Module):
    """A linear layer on the code: slices (B, 1, S, h, w) -> (B, outputs) [, slice weights (B, S)]."""

    def __init__(self, encoder: SemanticEncoder, outputs: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, outputs)

    def forward(self, slices: Tensor, return_attention: bool = False):
        y, weights = self.encoder(slices, return_attention=True)
        return (self.head(y), weights) if return_attention else self.head(y)


class SliceClassifier(_SliceHead):
    """The supervised baseline of classification: slices (B, 1, S, h, w) -> logits (B, num_classes)."""

    def __init__(self, encoder: SemanticEncoder, num_classes: int):
        super().__init__(encoder, num_classes)


class SliceRegressor(_SliceHead):
    """The supervised baseline of regression: slices (B, 1, S, h, w) -> normalised value (B, 1)."""

    def __init__(self, encoder: SemanticEncoder):
        super().__init__(encoder, 1)
