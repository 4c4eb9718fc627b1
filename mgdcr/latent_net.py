"""The noise predictor of codes: an MLP whose layers see the noisy code again (Preechakul et al. 2022, appendix A.1).

Only for codes, and with them slices, out of nothing; reconstruction does not need it. The published one (codes of 512
numbers, ten layers of 2048) has 54,109,696 parameters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks3d import sinusoidal_embedding


class Layer(nn.Module):
    """Linear, times (1 + a linear function of SiLU(time)), LayerNorm, SiLU, dropout: (B, c_in) -> (B, c_out)."""

    def __init__(self, c_in: int, c_out: int, time_dim: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(c_in, c_out)
        self.time = nn.Linear(time_dim, c_out)
        self.norm = nn.LayerNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear, self.time):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.dropout(F.silu(self.norm(self.linear(x) * (1 + self.time(F.silu(emb))))))


class MLPSkipNet(nn.Module):
    """Noisy code z_t (B, num_channels) and integer step t (B,) -> its noise (B, num_channels).

    num_layers linear layers of num_hid_channels numbers, the last one of num_channels; those in skip_layers (0 is the
    first) also see z_t itself. num_time_emb_channels: sines and cosines of the step. ValueError for other layers.
    """

    def __init__(
        self,
        *,
        num_channels: int,
        num_hid_channels: int,
        num_layers: int,
        skip_layers: Sequence[int],
        num_time_emb_channels: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        if num_layers < 2 or not set(skip_layers) <= set(range(1, num_layers)):
            raise ValueError(f"{num_layers} layers with the code again in {list(skip_layers)}: a latent network has at "
                             "least 2 layers, and may repeat it in all but the first")  # fmt: skip
        self.time_channels, self.skip_layers = num_time_emb_channels, frozenset(skip_layers)
        self.time1 = nn.Linear(num_time_emb_channels, num_channels)
        self.time2 = nn.Linear(num_channels, num_channels)
        widths = [num_channels] + [num_hid_channels] * (num_layers - 1)
        widths = [width + num_channels * (i in self.skip_layers) for i, width in enumerate(widths)]
        self.layers = nn.ModuleList(Layer(width, num_hid_channels, num_channels, dropout) for width in widths[:-1])
        self.out = nn.Linear(widths[-1], num_channels)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        emb = sinusoidal_embedding(t, self.time_channels, cos_first=True).to(self.time1.weight.dtype)
        emb = self.time2(F.silu(self.time1(emb)))  # (B, num_channels)
        h = z_t
        for i, layer in enumerate(self.layers):
            h = layer(self._with_code(i, h, z_t), emb)
        return self.out(self._with_code(len(self.layers), h, z_t))

    def _with_code(self, i: int, h: Tensor, z_t: Tensor) -> Tensor:
        return torch.cat([h, z_t], dim=1) if i in self.skip_layers else h
