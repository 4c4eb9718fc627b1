"""DiT3D: the diffusion transformer of NeuroLDM-3D over the tokens of a 3D latent, conditioned on step and class.

Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, in three dimensions. Latents are
(B, C, d, h, w), cut into patches of one token each; every block is modulated by c = step + label embedding (adaLN-Zero)
and attends to all tokens or inside windows of them. The published network is DiT-S/4 with global attention: 32,561,792
parameters and a table of 833 x 384 fixed positions for a latent of 4 x 28 x 34 x 28.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks3d import sinusoidal_embedding
from common.cli import UserError

WIDTHS = {
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
SIZES = {f"DiT-{name}/{p}": dict(patch_size=(p, p, p), **width) for name, width in WIDTHS.items() for p in (2, 4)}
SIZES["DiT-S/4"]["patch_size"] = (4, 2, 4)  # the published latent has 34 rows, which 4 does not divide
TIME_WIDTH = 256  # entries of the step's sinusoid
ROTARY_BASE = 100.0  # for grids of some ten tokens (Heo et al., "Rotary Position Embedding for ViT", 2024)


# ------------------------------------------------------------------------------------------------ tokens and positions


def tokens_from_patches(patches: Tensor) -> Tensor:
    """(B, width, X, Y, Z) -> (B, X Y Z, width), row-major."""
    return patches.flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Tokens (B, X Y Z, px py pz C), inside a token row-major with the channel fastest -> (B, C, X px, Y py, Z pz)."""
    blocks = tokens.reshape(len(tokens), *grid, *patch, -1)  # (B, X, Y, Z, px, py, pz, C)
    volume = blocks.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return volume.reshape(len(tokens), -1, *(g * p for g, p in zip(grid, patch, strict=True)))


def sincos_positions(width: int, grid: tuple[int, ...]) -> Tensor:
    """Fixed positions of a token grid, (X Y Z, width) float32: a third of the width per axis, sines then cosines.

    Frequencies fall from 1 towards 1 / 10000. Where a third of the width is no even number the rest stays zero.
    """
    half = width // 6
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))  # (X Y Z, 3)
    angles = places[:, :, None] * frequencies  # (X Y Z, 3, half)
    table = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return F.pad(table, (0, width - table.shape[1])).float()


def rotary_angles(head_width: int, grid: tuple[int, ...]) -> Tensor:
    """Angle of every pair of entries of a head at every token, (X Y Z, head_width // 2) float32; a third per axis."""
    pairs = head_width // 6
    frequencies = ROTARY_BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    angles = (places[:, :, None] * frequencies).flatten(1)
    return F.pad(angles, (0, head_width // 2 - angles.shape[1])).float()  # what is left over is not turned


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (entry i, entry i + half) of x (..., N, head_width) by angles given as (N, head_width // 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def split_windows(x: Tensor, window: int) -> tuple[Tensor, tuple[int, ...]]:
    """Grid (B, X, Y, Z, C) -> cubes (B n, w, w, w, C), batch outermost, and the grid's size with zeros at its ends."""
    size = [math.ceil(n / window) * window for n in x.shape[1:4]]
    pad = [size[i] - x.shape[i + 1] for i in range(3)]
    x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    counts = [n // window for n in size]
    x = x.reshape(len(x), counts[0], window, counts[1], window, counts[2], window, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, window, window, window, x.shape[-1]), tuple(size)


def merge_windows(cubes: Tensor, padded: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Inverse of `split_windows`: cubes (B n, w, w, w, C) -> (B, X, Y, Z, C), what was added cut off."""
    window = cubes.shape[1]
    counts = [n // window for n in padded]
    x = cubes.reshape(-1, *counts, window, window, window, cubes.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(len(x), *padded, -1)[:, : grid[0], : grid[1], : grid[2]]


def drop_labels(label: Tensor, draws: Tensor, rate: float, null_label: int) -> Tensor:
    """Labels (B,) with the null label wherever the uniform draw (B,) in [0, 1) is below `rate`."""
    return torch.where(draws < rate, null_label, label)


# -------------------------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of a grid or window of `size`: (B, N, width) -> same.

    relative_positions adds a learned term per axis to the logits (decomposed tables, Li et al., "MViTv2", 2022),
    rotary turns queries and keys by their place.
    """

    def __init__(self, width: int, num_heads: int, size: tuple[int, ...], relative_positions: bool, rotary: bool):
        super().__init__()
        self.num_heads, self.size, self.rotary = num_heads, size, rotary
        head_width = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative = None
        if relative_positions:
            self.relative = nn.ParameterList([nn.Parameter(torch.zeros(2 * n - 1, head_width)) for n in size])
        if rotary:
            angles = rotary_angles(head_width, size)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x (B, N, width); key_mask (B, 1, 1, N) is True where a key may be attended to."""
        B, N, width = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head)
        bias = key_mask
        if self.relative is not None:
            bias = self._relative_bias(q)
            bias = bias if key_mask is None else bias.masked_fill(~key_mask, float("-inf"))
        if self.rotary:
            q, k = (rotate(u, self.cos.to(u.dtype), self.sin.to(u.dtype)) for u in (q, k))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # scales q k by head ** -0.5, the bias not
        return self.proj(h.transpose(1, 2).reshape(B, N, width))

    def _relative_bias(self, q: Tensor) -> Tensor:
        """Sum over the axes of q (unscaled) times the table row of the distance to each key, (B, heads, N, N)."""
        B, heads, N, _ = q.shape
        X, Y, Z = self.size
        grid = q.reshape(B * heads, X, Y, Z, -1)
        bias = 0.0
        for axis, (table, n) in enumerate(zip(self.relative, self.size, strict=True)):
            place = torch.arange(n, device=q.device)
            rows = table[place[:, None] - place[None, :] + n - 1].to(q.dtype)  # (n queries, n keys, head)
            letters = "xyz"[axis]
            term = torch.einsum(f"bxyzc,{letters}kc->bxyzk", grid, rows)
            shape = [1, 1, 1]
            shape[axis] = n
            bias = bias + term.view(-1, X, Y, Z, *shape)
        return bias.expand(-1, X, Y, Z, X, Y, Z).reshape(B, heads, N, N)


class Block(nn.Module):
    """adaLN-Zero block: x + g1 Attention(modulated LN(x)), then x + g2 MLP(modulated LN(x)); gates start at zero.

    window > 0: the token grid is cut into cubes of that side, zero-padded at its ends, and each attends to itself.
    mask_padding keeps the padded tokens out of the attention.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        grid: tuple[int, ...],
        window: int,
        relative_positions: bool,
        rotary: bool,
        mask_padding: bool,
    ):
        super().__init__()
        self.grid, self.window = grid, window
        size = (window,) * 3 if window else grid
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, num_heads, size, relative_positions, rotary)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)
        self.modulation = nn.Linear(width, 6 * width)
        mask = None
        # Deviation (original code): there the zero tokens of the last windows take part as keys.
        if window and mask_padding and any(n % window for n in grid):
            mask = split_windows(torch.ones(1, *grid, 1), window)[0].flatten(1) > 0  # (n windows, w^3)
        self.register_buffer("key_mask", mask, persistent=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, width) and the activated condition c (B or 1, width) -> (B, N, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate1 * self._attend(modulate(self.norm1(x), shift1, scale1))
        h = F.gelu(self.fc1(modulate(self.norm2(x), shift2, scale2)))
        return x + gate2 * self.fc2(h)

    def _attend(self, x: Tensor) -> Tensor:
        if not self.window:
            return self.attention(x)
        cubes, padded = split_windows(x.view(len(x), *self.grid, -1), self.window)
        mask = None if self.key_mask is None else self.key_mask.repeat(len(x), 1)[:, None, None]
        cubes = self.attention(cubes.flatten(1, 3), mask).view(cubes.shape)
        return merge_windows(cubes, padded, self.grid).reshape(x.shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class DiT3D(nn.Module):
    """Diffusion transformer: x_t (B, in_channels, *in_size), step and class -> what the schedule predicts, same shape.

    in_size         latent size (d, h, w). A size that patch_size does not divide is refused, or, with pad_input, padded
                    with zeros at its end and the output cut back
    positions       "sincos": a fixed table added to the tokens; "rotary": queries and keys turned instead
    window_blocks   numbers of the blocks that attend inside windows of window_size tokens; the others attend globally
    num_classes     with label_dropout > 0 there is one label more, `null_label` = num_classes: no class given. The
                    trainer drops labels (`drop_labels`), never this module
    out_channels    None: as many as in_channels

    The output is exactly zero before training. Its parameters include the frozen position table.
    """

    def __init__(
        self,
        *,
        in_size: tuple[int, int, int],
        patch_size: tuple[int, int, int],
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        label_dropout: float,
        window_size: int,
        window_blocks: tuple[int, ...],
        positions: str,
        relative_positions: bool = False,
        mask_padding: bool = True,
        pad_input: bool = False,
        out_channels: int | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.in_size, self.patch_size = tuple(in_size), tuple(patch_size)
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.null_label = num_classes if label_dropout > 0 else None
        self.checkpointing = checkpointing
        self.grid = token_grid(self.in_size, self.patch_size, pad_input)
        self._check(hidden_size, num_heads, depth, window_size, window_blocks, positions)

        self.patches = nn.Conv3d(in_channels, hidden_size, self.patch_size, stride=self.patch_size)
        table = sincos_positions(hidden_size, self.grid)[None] if positions == "sincos" else None
        self.positions = None if table is None else nn.Parameter(table, requires_grad=False)  # (1, N, width)
        self.time1 = nn.Linear(TIME_WIDTH, hidden_size)
        self.time2 = nn.Linear(hidden_size, hidden_size)
        self.label = nn.Embedding(num_classes + (label_dropout > 0), hidden_size)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                num_heads,
                mlp_ratio,
                self.grid,
                window_size if i in window_blocks else 0,
                relative_positions,
                positions == "rotary",
                mask_padding,
            )
            for i in range(depth)
        )
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear_out = nn.Linear(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self._initialise()

    def _check(self, hidden_size, num_heads, depth, window_size, window_blocks, positions):
        if positions not in ("sincos", "rotary"):
            raise UserError(f"positions {positions!r}: choose sincos or rotary")
        if hidden_size % num_heads:
            raise UserError(f"width {hidden_size} does not divide into {num_heads} heads")
        if positions == "rotary" and hidden_size // num_heads % 2:
            raise UserError(f"rotary positions need heads of even width, not {hidden_size} / {num_heads}")
        if window_size < 0 or any(not 0 <= i < depth for i in window_blocks):
            listed = ", ".join(map(str, window_blocks))
            raise UserError(f"window blocks {listed}: the network has blocks 0 to {depth - 1}")
        if window_blocks and not window_size:
            raise UserError("window blocks are listed, but the window size is 0: give it in tokens, or no blocks")

    def _initialise(self):
        """Xavier-uniform weights and zero biases; zero gates and output, so that the network starts as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.data.flatten(1))  # as one linear layer
        nn.init.zeros_(self.patches.bias)
        # The label table keeps N(0, 1), as in the original code; with DiT's 0.02 the class would be faint at first.
        for linear in (self.linear_out, self.modulation_out, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(linear.weight)

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """Steps (B,) and labels (B,) or (1,) -> SiLU of the sum of their embeddings, (B, width)."""
        wave = sinusoidal_embedding(t, TIME_WIDTH, cos_first=True).to(self.time1.weight.dtype)
        return F.silu(self.time2(F.silu(self.time1(wave))) + self.label(label))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x_t (B, in_channels, d, h, w), integer steps t (B,), labels (B,) -> (B, out_channels, d, h, w)."""
        if x_t.shape[2:] != self.in_size:
            raise ValueError(f"latent of size {tuple(x_t.shape[2:])}; the network was built for {self.in_size}")
        missing = [g * p - n for g, p, n in zip(self.grid, self.patch_size, self.in_size, strict=True)]
        if any(missing):
            x_t = F.pad(x_t, (0, missing[2], 0, missing[1], 0, missing[0]))
        x = tokens_from_patches(self.patches(x_t))  # (B, N, width)
        x = x if self.positions is None else x + self.positions
        c = self.condition(t, label)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        shift, scale = self.modulation_out(c).unsqueeze(1).chunk(2, dim=2)
        x = self.linear_out(modulate(self.norm_out(x), shift, scale))  # (B, N, patch voxels * out_channels)
        d, h, w = self.in_size
        return unpatchify(x, self.grid, self.patch_size)[:, :, :d, :h, :w]


def token_grid(in_size: tuple[int, ...], patch_size: tuple[int, ...], pad_input: bool) -> tuple[int, ...]:
    """Tokens along each axis; UserError for a size that the patch does not divide, unless it may be padded."""
    if any(n % p for n, p in zip(in_size, patch_size, strict=True)) and not pad_input:
        size, patch = ("x".join(map(str, numbers)) for numbers in (in_size, patch_size))
        raise UserError(
            f"a latent of {size} does not divide into patches of {patch}: choose another --model_type, or --pad_input"
        )
    return tuple(math.ceil(n / p) for n, p in zip(in_size, patch_size, strict=True))
