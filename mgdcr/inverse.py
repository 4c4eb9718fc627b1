"""Inverse optimisation: the codes of a dense volume, fitted to the short-axis stack and to the long-axis views.

One frame: encode the acquired slices, put codes between them (objective.seeds), then change those codes by Adam so that
the decoded slices agree with both (objective.Objective); the network stays as it is. Decoded slices carry the decoder's
error, which the acquired slices show and `consistent` takes off. The images come last (`assemble`): an interpolation of
the acquired slices moves towards the decoded volume as far as the measurements speak for it, what the views still miss
is spread on top, and the acquired slices are put back.

Memory: slices are decoded in chunks, of each of which only the states between diffusion steps are kept; the backward
pass recomputes one step of one chunk at a time. The terms see the whole volume, so chunks need no halo and their size
does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from common import checkpoint, runtime
from common.cli import UserError
from mgdcr import baselines, diffusion, geometry, objective
from mgdcr.objective import FrameData, Objective, Painted, View

OPTIMISED = ("both", "z")
SOLVERS = ("gradient", "alternating")
NOISES = ("inverted", "shared")
BASES = ("auto", "nearest", "linear", "cubic", "lanczos")
STEADY = 0.05  # SD, in heart beats, of the average over time of what the optimisation changes


@dataclass(frozen=True)
class Settings:
    """How the codes are optimised; `MODES` has the named ones."""

    steps: int = 20  # of the diffusion, in both directions
    iterations: int = 120
    lr: float = 2e-3
    lr_z: float = 0.0  # 0: lr
    step_size: int = 50  # iterations between halvings of the learning rate
    gamma: float = 0.5
    warm_lr: float = 0.25  # of the learning rate, where a phase begins where the one before ended
    projection: float = 1e-3  # pull towards the start codes after every update
    patience: int = 5  # iterations without improvement before the end; 0: never
    min_delta: float = 1e-5  # of total / N
    optimise: str = "both"
    grad_steps: int = 0  # gradient through the last so many diffusion steps only, of z alone; 0: all
    clamp: str = "soft"
    refine: int = 0  # fixed-point iterations per step of the inversion
    chunk: int = 8  # slices at a time
    schedule: str = "even"  # of the start codes
    noise: str = "inverted"  # noise codes: those of the acquired slices, or "shared": one draw for all slices
    stride: int = 1  # every so many dense slices are decoded, those between are interpolated (`stride_within`)
    hold: bool = True  # leave the codes of acquired slices as they were encoded
    solver: str = "gradient"
    inner: int = 10  # alternating: updates of the codes per solution of the images
    image_iterations: int = 30  # alternating: updates of the images
    image_lr: float = 2e-2
    split: float = 1.0  # alternating: weight of the distance between images and decoded codes, doubled every time
    output: str = "residual"  # as `consistent` and `assemble` have it; or "decoded": the decoded slices themselves
    base: str = (
        "auto"  # interpolation under the residual; auto: linear or cubic, as predicts the acquired slices better
    )
    propagate: bool = True  # spread what the views still miss
    hard: bool = True  # put the acquired slices back
    save_every: int = 10

    def __post_init__(self):
        for name, known in (("optimise", OPTIMISED), ("solver", SOLVERS), ("base", BASES), ("noise", NOISES),
                            ("output", ("residual", "decoded")), ("clamp", ("soft", "hard", "none"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r}: choose {', '.join(known)}")
        for name in ("steps", "chunk", "stride", "step_size", "inner", "image_iterations", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("iterations", "patience", "grad_steps", "refine", "lr_z"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: must be 0 or more")
        if self.steps > diffusion.T or self.lr <= 0 or not 0 <= self.projection < 1:
            raise UserError(f"steps must be at most {diffusion.T}, lr positive, projection 0 or more and below 1")
        if not 0 < self.warm_lr <= 1:
            raise UserError(f"warm_lr {self.warm_lr}: choose more than 0 and at most 1")
        if self.grad_steps and self.optimise != "z":
            raise UserError("grad_steps cuts the gradient off from the noise codes: use it with optimise z")


# Tuned on hearts of the phantom that are neither trained nor tested on, with the tiny prior.
QUICK = dict(steps=5, iterations=12, step_size=6, lr=3e-2, optimise="z", noise="shared", stride=4, chunk=16)
MODES = {
    "fast": QUICK,
    "balanced": QUICK | dict(iterations=24, step_size=12),
    "paper": dict(steps=30, iterations=200),
}
LEGACY_SETTINGS = dict(
    steps=30, iterations=200, clamp="hard", output="decoded", hard=False, propagate=False, hold=False
)
LEGACY_LR = {"ex8_multi": 1e-3, "ex8_norm": 2e-3}


def settings_of(values: dict) -> Settings:
    """Settings from a dict that may hold more."""
    return Settings(**{f.name: values[f.name] for f in fields(Settings) if f.name in values})


# ---- the prior ------------------------------------------------------------------------------------------------------


class Prior:
    """The frozen diffusion autoencoder between images (n, H, W) in [0, 1] and codes x (n, 1, H, W), z (n, C)."""

    def __init__(self, model: nn.Module, settings: Settings, rt: runtime.Runtime | None = None):
        self.model, self.settings = model, settings
        self.rt = rt or runtime.Runtime(torch.device("cpu"))

    def code(self, slices: Tensor) -> Tensor | None:
        return self.model.encode(slices)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of images, float32 whatever the precision of the optimisation.

        Noise codes of a short training hold what the network could not say with z, and are not white: those halfway
        between two slices decode into ringing. A draw that all slices share does not; what it adds to the images is
        alike in neighbouring slices, and `consistent` takes it off.
        """
        xs, zs = [], []
        for part in images.split(self.settings.chunk):
            slices = (2 * part[:, None] - 1).float().to(self.rt.device)
            z = self.code(slices)
            if self.settings.noise == "shared":
                xs.append(white_noise(slices.shape[1:]).to(slices).expand_as(slices))
            else:
                xs.append(diffusion.invert(self.model, slices, z, self.settings.steps, refine=self.settings.refine))
            zs.append(slices.new_zeros(len(slices), 0) if z is None else z)
        return torch.cat(xs), torch.cat(zs)

    def decode(self, x: Tensor, z: Tensor) -> Tensor:
        """Images of codes, chunk by chunk, differentiable; a soft clamp lets them leave [0, 1] a little."""
        s = self.settings
        parts = []
        for x_part, z_part in zip(x.split(s.chunk), z.split(s.chunk), strict=True):
            with self.rt.autocast():
                decoded = diffusion.decode(
                    self.model, x_part, z_part if z.shape[1] else None, s.steps, s.clamp,
                    checkpointing=torch.is_grad_enabled(), grad_steps=s.grad_steps or None,
                )  # fmt: skip
            parts.append((decoded[:, 0].float() + 1) / 2)
        return torch.cat(parts)


def white_noise(shape: tuple[int, ...]) -> Tensor:
    """The one draw that slices share, of mean 0 and SD 1."""
    noise = torch.randn(shape, generator=runtime.generator("noise of all slices"))
    return (noise - noise.mean()) / noise.std()


class UnconditionalPrior(Prior):
    """The unconditional U-Net as a baseline: noise codes alone, z (n, 0)."""

    def code(self, slices: Tensor) -> None:
        return None


@dataclass(frozen=True)
class Window:
    """What the prior sees of the short-axis plane: `size` pixels square from (row, column), which may be negative."""

    row: int
    column: int
    size: int

    @classmethod
    def middle(cls, shape: tuple[int, int], size: int) -> Window:
        return cls((shape[0] - size) // 2, (shape[1] - size) // 2, size)

    def _overlap(self, shape):
        rows = max(self.row, 0), min(self.row + self.size, shape[0])
        columns = max(self.column, 0), min(self.column + self.size, shape[1])
        inside = np.s_[..., rows[0] : rows[1], columns[0] : columns[1]]
        own = np.s_[..., rows[0] - self.row : rows[1] - self.row, columns[0] - self.column : columns[1] - self.column]
        return inside, own

    def cut(self, images: Tensor) -> Tensor:
        """Images (..., H, W) as (..., size, size), 0 beyond the image."""
        inside, own = self._overlap(images.shape[-2:])
        out = images.new_zeros(*images.shape[:-2], self.size, self.size)
        out[own] = images[inside]
        return out

    def paste(self, part: Tensor, around: Tensor) -> Tensor:
        """`around` (..., H, W) with the window's images put in; differentiable in `part`."""
        inside, own = self._overlap(around.shape[-2:])
        out = around.clone()
        out[inside] = part[own]
        return out


# ---- one frame ------------------------------------------------------------------------------------------------------


@dataclass
class Frame:
    """Everything measured of one frame: `sax` (Z, H, W) in [0, 1], views in that scale up to contrast; pixel sizes."""

    sax: np.ndarray
    factor: int
    spacing_mm: tuple[float, float]  # rows, columns
    views: list[View] = field(default_factory=list)
    window: Window | None = None

    @property
    def n_dense(self) -> int:
        return self.factor * (len(self.sax) - 1) + 1


@dataclass
class Codes:
    """The state of a reconstruction, (N, 1, H, W) and (N, C)."""

    x: Tensor
    z: Tensor


@dataclass
class Result:
    """What `reconstruct` gives: `volume` is the answer, the rest tells how it came about; (N, H, W) in [0, 1]."""

    volume: np.ndarray
    decoded: np.ndarray
    seed: np.ndarray
    codes: Codes
    seeds: Codes
    report: dict
    spread: np.ndarray | None = None


@dataclass
class Fit:
    """An optimised frame before images are made of it; `decoded` of every start and `seed` are (N, H, W) in [0, 1]."""

    decoded: list[np.ndarray]
    seed: np.ndarray
    codes: Codes
    seeds: Codes
    evidence: np.ndarray  # evidence_of_seeds
    report: dict


class Problem:
    """A frame together with the prior: start codes, their images, and the decoding onto the whole plane."""

    def __init__(
        self, prior: Prior, frame: Frame, goal: Objective, settings: Settings, seed_codes: Codes | None = None
    ):
        self.prior, self.frame, self.goal, self.settings = prior, frame, goal, settings
        self.device = prior.rt.device
        sax = torch.from_numpy(np.ascontiguousarray(frame.sax, dtype=np.float32)).to(self.device)
        self.base = base_of([frame], settings.base)
        around = baselines.interpolate(frame.sax, frame.factor, self.base)  # what lies outside the prior's window
        self.around = torch.from_numpy(around).to(self.device)
        self.stride = stride_within(frame.factor, settings.stride)
        self.step = frame.factor // self.stride  # decoded slices per gap
        if seed_codes is None:
            images = frame.window.cut(sax) if frame.window else sax
            seed_codes = Codes(*objective.seeds(*prior.encode(images.clamp(0, 1)), self.step, settings.schedule))
        self.seeds = seed_codes
        self.free = torch.ones(len(seed_codes.x), dtype=torch.bool, device=self.device)
        self.held = None  # decoded acquired slices whose codes do not change
        if settings.hold:
            self.free[:: self.step] = False
            with torch.no_grad():
                self.held = prior.decode(seed_codes.x[~self.free], seed_codes.z[~self.free])
        views, painted = [view.to(self.device) for view in frame.views], None
        if goal in objective.LEGACY.values():
            painted = paint(views, self.around, match=goal.match == "none")
        self.data = FrameData(sax.clamp(0, 1), frame.factor, seed_codes.x, seed_codes.z, views, painted)

    def images(self, x: Tensor, z: Tensor) -> Tensor:
        """Volume (N, H, W) of codes, `consistent` unless the output is to be as decoded.

        Outside the prior's window it is the interpolation.
        """
        decoded = self.prior.decode(x[self.free], z[self.free]) if self.free.any() else None
        if self.held is not None:
            slices = self.held.new_empty(len(self.free), *self.held.shape[1:])
            slices[~self.free] = self.held
            decoded = slices if decoded is None else slices.index_copy(0, torch.nonzero(self.free).flatten(), decoded)
        volume = between(decoded, self.stride)
        if self.frame.window:
            volume = self.frame.window.paste(volume, self.around)
        return consistent(volume, self.data.sax) if self.settings.output == "residual" else volume


def stride_within(factor: int, wanted: int) -> int:
    """The largest stride up to `wanted` that divides the factor and leaves a slice in every gap."""
    return max(n for n in range(1, max(min(wanted, factor // 2), 1) + 1) if factor % n == 0)


def between(slices: Tensor, n: int) -> Tensor:
    """Slices (M, H, W) with n - 1 linearly interpolated ones in each gap, (n (M - 1) + 1, H, W); differentiable."""
    if n == 1:
        return slices
    share = torch.arange(n, device=slices.device, dtype=slices.dtype)[:, None, None, None] / n
    filled = torch.lerp(slices[:-1], slices[1:], share).transpose(0, 1).flatten(0, 1)  # (n (M - 1), H, W)
    return torch.cat([filled, slices[-1:]])


def consistent(volume: Tensor, sax: Tensor) -> Tensor:
    """The volume (N, H, W) with what it misses of the acquired slices (Z, H, W) added, linearly between them."""
    factor = (len(volume) - 1) // (len(sax) - 1)
    return volume + between(sax - volume[::factor], factor)


def base_of(frames: Sequence[Frame], base: str) -> str:
    """The interpolation under the residual; "auto" is settled for all `frames` together."""
    return baselines.better_interpolation(*(frame.sax for frame in frames)) if base == "auto" else base


def paint(views: list[View], reference: Tensor, match: bool) -> Painted:
    """Views painted into the dense grid, as the published scripts expect; where they cross, their mean.

    match: bring them, inside the mask, to mean and SD of `reference` (N, H, W).
    """
    total, count = torch.zeros_like(reference), torch.zeros_like(reference)
    for view in views:
        image, usable = (view.sampler.picture(values, fill=0) for values in (view.values, view.weights))
        painted, mask = geometry.paint(view.sampler.dense, view.sampler.lax, image, usable > 0)
        total += torch.from_numpy(painted).to(total)
        count += torch.from_numpy(mask).to(count)
    mask, values = (count > 0).float(), total / count.clamp_min(1)
    return Painted((match_moments(values, reference, mask) if match else values)[:, None], mask[:, None])


def match_moments(values: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """`values` with, inside the mask (three of one shape), the mean and the SD of `reference` there."""
    inside = mask > 0
    if inside.sum() < 2:
        return values
    there, here = values[inside], reference[inside]
    gain = here.std(correction=0) / there.std(correction=0).clamp_min(1e-6)
    return torch.where(inside, (values - there.mean()) * gain + here.mean(), values)


# ---- optimisation ---------------------------------------------------------------------------------------------------


class Diverged(UserError):
    """A term or gradient is not finite."""


class Optimiser:
    """Adam over the codes of a problem, with everything needed to continue after a stop."""

    def __init__(self, problem: Problem, start: Codes):
        self.problem, s = problem, problem.settings
        self.x = start.x.detach().clone().requires_grad_(s.optimise == "both")
        self.z = start.z.detach().clone().requires_grad_(True)
        groups = [{"params": [self.z], "lr": s.lr_z or s.lr}]
        if s.optimise == "both":
            groups.append({"params": [self.x], "lr": s.lr})
        self.adam = torch.optim.Adam(groups)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.adam, s.step_size, s.gamma)
        self.iteration, self.best, self.stale = 0, math.inf, 0
        self.target: Tensor | None = None  # images of the alternating solver

    @property
    def finished(self) -> bool:
        s = self.problem.settings
        return self.iteration >= s.iterations or bool(s.patience) and self.stale >= s.patience

    def state_dict(self) -> dict:
        return {"x": self.x.detach(), "z": self.z.detach(), "adam": self.adam.state_dict(),
                "scheduler": plain(self.scheduler.state_dict()), "iteration": self.iteration, "best": self.best,
                "stale": self.stale, "target": self.target}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            self.x.copy_(state["x"])
            self.z.copy_(state["z"])
        self.adam.load_state_dict(state["adam"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.iteration, self.best, self.stale = state["iteration"], state["best"], state["stale"]
        self.target = None if state["target"] is None else state["target"].to(self.x.device)

    def step(self) -> dict[str, float]:
        """One update; returns the un-weighted terms (sums over slices) and `total` before it. Diverged: not finite."""
        p, s = self.problem, self.problem.settings
        self.adam.zero_grad(set_to_none=True)
        volume = p.images(self.x, self.z)
        codes = p.goal.code_terms(self.x, self.z, p.data)
        if s.solver == "alternating":
            with torch.no_grad():
                terms = p.goal.image_terms(volume, p.data) | codes
            self._guard(terms, "term")
            if self.iteration % s.inner == 0:
                self.target = self._solve_images(volume.detach())
            loss = self._weight * (volume - self.target).square().flatten(1).mean(1).sum() + p.goal.total(codes)
        else:
            terms = p.goal.image_terms(volume, p.data) | codes
            self._guard(terms, "term")
            loss = p.goal.total(terms)
        loss.backward()
        self._guard({name: v.grad.flatten(1).sum(1) for name, v in (("x", self.x), ("z", self.z)) if v.requires_grad},
                    "gradient of")  # fmt: skip
        self.adam.step()
        self.scheduler.step()
        with torch.no_grad():
            for value, start in ((self.x, p.data.seed_x), (self.z, p.data.seed_z)):
                if value.requires_grad:
                    value.lerp_(start, s.projection)
        self.iteration += 1
        total = float(p.goal.total(terms).detach())
        if total / len(self.x) < self.best - s.min_delta:
            self.best, self.stale = total / len(self.x), 0
        else:
            self.stale += 1
        return {name: float(value.detach().sum()) for name, value in terms.items()} | {"total": total}

    @property
    def _weight(self) -> float:
        """Of the distance between images and decoded codes: doubled with every solution of the images."""
        return self.problem.settings.split * 2.0 ** min(self.iteration // self.problem.settings.inner, 10)

    def _solve_images(self, decoded: Tensor) -> Tensor:
        """The volume that serves the measurements best without leaving the decoded one far: no network involved."""
        p, s = self.problem, self.problem.settings
        images = decoded.clone().requires_grad_(True)
        adam = torch.optim.Adam([images], lr=s.image_lr)
        for _ in range(s.image_iterations):
            adam.zero_grad(set_to_none=True)
            distance = (images - decoded).square().flatten(1).mean(1).sum()
            (p.goal.total(p.goal.image_terms(images, p.data)) + self._weight * distance).backward()
            adam.step()
        return images.detach()

    def _guard(self, values: dict[str, Tensor], what: str) -> None:
        bad = objective.blame(values)
        if bad:
            raise Diverged(f"the optimisation is not finite at iteration {self.iteration + 1}: "
                           f"{bad if what == 'term' else bad.replace('term', what)}")  # fmt: skip


def plain(state: dict) -> dict:
    """Only the plain values of a scheduler's state: checkpoints hold no functions."""
    return {k: v for k, v in state.items() if isinstance(v, (int, float, str, bool, list, tuple)) or v is None}


@dataclass
class Files:
    """Where the state of an optimisation lives; `identity` (plain values) must be the same to continue it."""

    path: Path
    identity: dict

    def load(self, device: torch.device) -> dict | None:
        """The saved state, None if there is none; UserError if it belongs to other data or settings."""
        if not self.path.is_file():
            return None
        saved = checkpoint.load(self.path)
        if not {"identity", "seed_x", "seed_z", "state"} <= saved.keys():
            raise UserError(f"{self.path} holds no codes of this program: delete it")
        if saved["identity"] != self.identity:
            changed = sorted(k for k in {*saved["identity"], *self.identity}
                             if saved["identity"].get(k) != self.identity.get(k))  # fmt: skip
            raise UserError(f"{self.path} is of another {', '.join(changed)}: name another --out, or add --overwrite")
        return saved

    def save(self, seeds: Codes, optimiser: Optimiser) -> None:
        checkpoint.save(self.path, {"identity": self.identity, "seed_x": seeds.x, "seed_z": seeds.z,
                                    "state": optimiser.state_dict()})  # fmt: skip

    def dump(self, optimiser: Optimiser) -> Path:
        """The codes of a failed optimisation, beside those to continue from."""
        path = self.path.with_name("failed_" + self.path.name)
        checkpoint.save(path, {"identity": self.identity, "state": optimiser.state_dict()})
        return path


def optimise(problem: Problem, start: Codes, *, files: Files | None = None, saved: dict | None = None,
             log=None, stop=None, on_iteration=None) -> Optimiser:  # fmt: skip
    """Run the optimisation to its end, or continue it from `saved`.

    log(iteration, values) gets every iteration; stop() asks whether to leave early, with the state saved;
    on_iteration(optimiser) may draw. Diverged names slice and term, after the codes were written beside `files`.
    """
    optimiser = Optimiser(problem, start)
    if saved is not None:
        optimiser.load_state_dict(saved["state"])
    while not optimiser.finished:
        lr = optimiser.adam.param_groups[0]["lr"]
        try:
            values = optimiser.step()
        except Diverged as error:
            where = f"; codes are in {files.dump(optimiser)}" if files else ""
            raise Diverged(f"{error}{where}; try a lower learning rate, or look for odd voxels there") from error
        if log:
            log(optimiser.iteration, values | {"lr": lr})
        stopping = stop is not None and stop()
        if files and (stopping or optimiser.finished or optimiser.iteration % problem.settings.save_every == 0):
            files.save(problem.seeds, optimiser)
        if on_iteration:
            on_iteration(optimiser)
        if stopping:
            break
    return optimiser


# ---- from codes to images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """How images are made: the interpolation, the shares of both changes, how far the views are believed (0 to 1)."""

    base: str
    shares: tuple[float, float]
    trust: float


def mixture(frames: list[Frame], decoded: list[np.ndarray], seeds: list[np.ndarray], settings: Settings,
            seed_share: float = 0.0) -> Mixture:  # fmt: skip
    """One mixture for all frames, which are those of one heart, from their decoded and start images (N, H, W) each.

    Least squares over the pixels of all views of all frames at once, so that what is taken of the changes does not jump
    from phase to phase. As far as the views are not to be believed (baselines.trust), or there are none, the share of
    the optimisation is 0, because nothing speaks for its change, and that of the start codes is `seed_share`. So
    neither a weak prior nor a wrong view can spoil much.
    """
    kind = base_of(frames, settings.base)
    if settings.output == "decoded":
        return Mixture(kind, (1.0, 1.0), 1.0)
    bases = [baselines.interpolate(frame.sax, frame.factor, kind) for frame in frames]
    changes = [(seed - base, own - seed) for base, seed, own in zip(bases, seeds, decoded, strict=True)]
    believed = trust_of([view for frame in frames for view in frame.views])
    a, b = shares_of_changes(bases, changes, frames) if believed else (0.0, 0.0)
    return Mixture(kind, (believed * a + (1 - believed) * seed_share, believed * b), believed)


def assemble(frame: Frame, decoded: np.ndarray, seed: np.ndarray, settings: Settings,
             mix: Mixture) -> tuple[np.ndarray, dict]:  # fmt: skip
    """The final volume (N, H, W) in [0, 1] of a frame from its decoded and start images, and what was done.

    "residual": interpolation + a (start - interpolation) + b (decoded - start), with the shares a and b of `mix`,
    + what the views still miss, spread over the slices.
    """
    report = {"base": mix.base, "shares": list(mix.shares), "trust": mix.trust}
    if settings.output == "decoded":
        volume = decoded.astype(np.float32).copy()
    else:
        base = baselines.interpolate(frame.sax, frame.factor, mix.base)
        changes = seed - base, decoded - seed
        volume = base + sum(np.float32(a) * change for a, change in zip(mix.shares, changes, strict=True))
        if settings.propagate and frame.views:
            volume = baselines.lax_residual(volume, frame.views, frame.factor, frame.spacing_mm)
        volume = volume.clip(frame.sax.min(), frame.sax.max())  # what no slice shows is no anatomy
    before = np.abs(volume[:: frame.factor] - frame.sax)
    report["acquired_residual"] = {"mean": float(before.mean()), "max": float(before.max())}
    if settings.hard:
        volume[:: frame.factor] = frame.sax
    return volume, report


def trust_of(views: list[View]) -> float:
    """Mean weight of the pixels in use, over all views; 0 without any."""
    used = [view.weights[view.weights > 0] for view in views]
    return float(torch.cat(used).mean()) if sum(map(len, used)) else 0.0


def shares_of_changes(bases: list[np.ndarray], changes: list[Sequence[np.ndarray]], frames: list[Frame]) -> list[float]:
    """Least-squares factors in [0, 1] of the changes on the bases, volumes (N, H, W) of every frame, by all views."""
    rows, missing = [], []
    for base, parts, frame in zip(bases, changes, frames, strict=True):
        dense = torch.from_numpy(base)
        for view in frame.views:
            gain, offset = baselines.view_contrast(dense, view, frame.factor)
            weight = view.weights.sqrt()
            missing.append(weight * ((view.values - offset) / gain - view.sampler.sample(dense)))
            rows.append(torch.stack([weight * view.sampler.sample(torch.from_numpy(part)) for part in parts], 1))
    return shares(torch.cat(rows).numpy(), torch.cat(missing).numpy())


def shares(effects: np.ndarray, missing: np.ndarray) -> list[float]:
    """Factors in [0, 1] of the columns of `effects` (P, n) that come closest to `missing` (P,); 0 of no effect."""
    kept = np.square(effects).sum(0) > 1e-12
    out = np.zeros(effects.shape[1])
    if kept.any():
        out[kept] = lsq_linear(effects[:, kept].astype(np.float64), missing.astype(np.float64), (0, 1)).x
    return out.tolist()


@torch.no_grad()
def evidence_of_seeds(problem: Problem) -> np.ndarray:
    """What the acquired slices say of decoded start codes: [effect . missing, effect . effect], for `share_of_seeds`.

    Every inner acquired slice is predicted from its neighbours, by the codes halfway between theirs and by the
    interpolation. `effect` is what the first prediction changes of the second, `missing` what the second lacks.
    """
    sax, x, z = problem.data.sax, problem.seeds.x[:: problem.step], problem.seeds.z[:: problem.step]
    if len(sax) < 3:
        return np.zeros(2)
    halfway = torch.stack([objective.slerp(a, b, 0.5) for a, b in zip(x[:-2], x[2:], strict=True)])
    decoded, own = problem.prior.decode(halfway, (z[:-2] + z[2:]) / 2), problem.prior.decode(x, z)
    if problem.frame.window:
        decoded, own = (
            problem.frame.window.paste(part, part.new_zeros(len(part), *sax.shape[1:])) for part in (decoded, own)
        )
    missed = sax - own
    predicted = decoded + (missed[:-2] + missed[2:]) / 2
    stack = problem.frame.sax
    base = baselines.left_out(stack, problem.base)
    effect, missing = (part.astype(np.float64) for part in (predicted.cpu().numpy() - base, stack[1:-1] - base))
    return np.array([(effect * missing).sum(), np.square(effect).sum()])


def share_of_seeds(evidence: Sequence[np.ndarray]) -> float:
    """How far decoded start codes may replace the interpolation where no view tells, 0 to 1; of one or more frames."""
    along, size = np.sum(evidence, 0)
    return float(np.clip(along / size, 0, 1)) if size > 1e-12 else 0.0


def perturbed(codes: Codes, factor: int, strength: float, generator: torch.Generator) -> Codes:
    """Start codes moved at random, those of acquired slices excepted; the noise codes keep their norm."""
    x, z = codes.x.clone(), codes.z.clone()
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    free[::factor] = False
    noise_x = torch.randn(x.shape, generator=generator).to(x)
    noise_z = torch.randn(z.shape, generator=generator).to(z)
    x[free] = (math.sqrt(1 - strength**2) * x + strength * noise_x)[free]
    z[free] = (z + strength * z.std(0, keepdim=True) * noise_z)[free]
    return Codes(x, z)


def fit(prior: Prior, frame: Frame, goal: Objective, settings: Settings, *, files: Files | None = None,
        warm: Codes | None = None, neighbours: tuple[np.ndarray, ...] = (), starts: int = 1, strength: float = 0.2,
        seed: int = 0, log=None, stop=None, on_iteration=None) -> Fit:  # fmt: skip
    """Optimise the codes of one frame; the options are those of `reconstruct`.

    From a warm start the learning rate is `warm_lr` of what it is otherwise: Adam's first steps are as long as the
    rate, however small the gradient, and would throw the codes off what they begin with, in every phase another way.
    """
    if warm is not None:
        settings = replace(settings, lr=settings.warm_lr * settings.lr, lr_z=settings.warm_lr * settings.lr_z)
    saved = files.load(prior.rt.device) if files else None
    known = Codes(saved["seed_x"].to(prior.rt.device), saved["seed_z"].to(prior.rt.device)) if saved else None
    problem = Problem(prior, frame, goal, settings, known)
    problem.data.neighbours = [torch.from_numpy(v).to(prior.rt.device) for v in neighbours]
    begin = problem.seeds
    if warm is not None:
        begin = Codes(begin.x + warm.x.to(begin.x), begin.z + warm.z.to(begin.z))
    with torch.no_grad():
        seed_images = problem.images(problem.seeds.x, problem.seeds.z).cpu().numpy()

    def run(start: Codes, **more) -> tuple[np.ndarray, Optimiser]:
        optimiser = optimise(problem, start, stop=stop, **more)
        with torch.no_grad():
            return problem.images(optimiser.x, optimiser.z).cpu().numpy(), optimiser

    decoded, optimiser = run(begin, files=files, saved=saved, log=log, on_iteration=on_iteration)
    others = [run(perturbed(begin, frame.factor, strength, runtime.generator(seed, "start", k)))[0]
              for k in range(1, starts)]  # fmt: skip
    report = {"iterations": optimiser.iteration, "stopped_early": optimiser.iteration < settings.iterations,
              "total_per_slice": optimiser.best, "starts": starts}  # fmt: skip
    evidence = np.zeros(2) if settings.output == "decoded" else evidence_of_seeds(problem)
    codes = Codes(optimiser.x.detach(), optimiser.z.detach())
    return Fit([decoded, *others], seed_images, codes, problem.seeds, evidence, report)


def images_of(frames: list[Frame], fits: list[Fit], settings: Settings, steady: bool = False) -> list[Result]:
    """The images of one frame, or of all frames of a cine, which share one mixture (one for every start).

    steady: what the optimisation changed is averaged over time first, `steadied`.
    """
    seeds, seed_share = [fit.seed for fit in fits], share_of_seeds([fit.evidence for fit in fits])
    starts = [list(decoded) for decoded in zip(*(fit.decoded for fit in fits), strict=True)]  # (start, frame)
    if steady:
        starts = [steadied(decoded, seeds) for decoded in starts]
    mixtures = [mixture(frames, decoded, seeds, settings, seed_share) for decoded in starts]
    results = []
    for i, (frame, fit) in enumerate(zip(frames, fits, strict=True)):
        made = [assemble(frame, decoded[i], fit.seed, settings, mix)
                for decoded, mix in zip(starts, mixtures, strict=True)]  # fmt: skip
        (volume, report), spread = made[0], None
        if len(made) > 1:
            volumes = [volume for volume, _ in made]
            volume = np.mean(volumes, 0, dtype=np.float64).astype(np.float32)
            spread = np.std(volumes, 0, ddof=1, dtype=np.float64).astype(np.float32)
        results.append(Result(volume, fit.decoded[0], fit.seed, fit.codes, fit.seeds, report | fit.report, spread))
    return results


def reconstruct(prior: Prior, frame: Frame, goal: Objective, settings: Settings, **more) -> Result:
    """Reconstruct one frame.

    files: where the state lives. warm: displacement of the codes from their start codes in the frame before, to begin
    with. neighbours: decoded volumes of the phases before and after, for the temporal term. starts > 1: as many
    optimisations, from start codes perturbed by `strength` with `seed`; the volume is their mean and `spread` their
    standard deviation. log, stop, on_iteration: as `optimise` has them.
    """
    return images_of([frame], [fit(prior, frame, goal, settings, **more)], settings)[0]


def warm_start(before: Fit) -> Codes:
    """What the optimisation changed of the codes, to begin the next phase with."""
    return Codes(before.codes.x - before.seeds.x, before.codes.z - before.seeds.z)


def neighbours_of(frame: int, n_frames: int) -> list[int]:
    """The phases before and after, the cycle closed; one of two frames is both and counts once."""
    return sorted({(frame - 1) % n_frames, (frame + 1) % n_frames} - {frame})


def reconstruct_cine(prior: Prior, frames: list[Frame], goal: Objective, settings: Settings, *, sweeps: int = 2,
                     files=None, log=None, stop=None, on_frame=None, starts: int = 1, strength: float = 0.2,
                     seed: int = 0) -> list[Result]:  # fmt: skip
    """All phases of a cycle: in a first sweep each begins where the one before ended; later ones see both neighbours.

    With the temporal term at 0 one sweep is all. A sweep moves one phase at a time and holds the others; first and last
    phase are neighbours. The images are made of all phases together at the end, steadied where the temporal term ties
    them. files(sweep, frame) -> Files, log(sweep, frame) -> what `optimise` wants,
    on_frame(sweep, frame, fit) before that. An empty list if stop() ended it: its state is in the files.
    """
    settings = replace(settings, base=base_of(frames, settings.base))
    fits: list[Fit | None] = [None] * len(frames)
    sweeps = sweeps if goal.temporal and len(frames) > 1 else 1
    for sweep in range(sweeps):
        for i, frame in enumerate(frames):
            before = fits[i] if sweep else fits[i - 1] if i else None
            near = [fits[j] for j in neighbours_of(i, len(frames))] if goal.temporal else []
            fits[i] = fit(
                prior, frame, goal, settings, files=files(sweep, i) if files else None,
                warm=warm_start(before) if before else None,
                neighbours=tuple(other.decoded[0] for other in near if other is not None),
                log=log(sweep, i) if log else None, stop=stop, starts=starts if sweep == sweeps - 1 else 1,
                strength=strength, seed=seed,
            )  # fmt: skip
            if on_frame:
                on_frame(sweep, i, fits[i])
            if stop is not None and stop():
                return []
    return images_of(frames, fits, settings, steady=bool(goal.temporal) and settings.output == "residual")


def steadied(decoded: list[np.ndarray], seeds: list[np.ndarray]) -> list[np.ndarray]:
    """Decoded images of all phases with what the optimisation changed of the start images averaged over time, cyclic.

    Phases are optimised one after the other, and what each leaves undone differs from the next; the heart moves
    smoothly. The start images follow its motion and stay as they are, and what the views miss of an averaged change is
    spread afterwards, so that sharpness is not lost. Gaussian of SD `STEADY`, in heart beats.
    """
    seed = np.stack(seeds)
    change = ndimage.gaussian_filter1d(np.stack(decoded) - seed, STEADY * len(seed), axis=0, mode="wrap")
    return list(seed + change)


def identity_of(goal: Objective, settings: Settings, **more) -> dict:
    """What must be the same for an optimisation to be continued; the intervals of saving may change."""
    return {"objective": asdict(goal), "settings": asdict(replace(settings, save_every=1)), **more}
