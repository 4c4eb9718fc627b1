"""Inverse optimisation: a dense cardiac volume from a short-axis stack and long-axis views, with a trained prior.

    python mgdcr/LAX_condition/ex8_multi_optimizer.py --subject_id subject_001 --frame 0      # of --data
    python mgdcr/LAX_condition/ex8_multi_optimizer.py --sax sax.nii.gz --lax 2ch.nii.gz 4ch.nii.gz --lax_names 2ch 4ch
    python mgdcr/LAX_condition/ex8_multi_optimizer.py --config mgdcr/configs/ex8_multi.yaml --subject_id subject_001

Reads 3D or 4D NIfTI files in their own geometry (DATA/<subject>/sax.nii.gz and lax_<view>.nii.gz), any number of views,
0 too. Without --frame all frames are reconstructed, each beginning where the one before ended, and `temporal` ties
them. Writes OUT/<subject>/frame_<t>/{volume,seed}.nii.gz, codes.ckpt, log.jsonl (every term of every iteration),
report.json, with --starts also sd.nii.gz, and OUT/<subject>/{volume.nii.gz, report.json} of all frames, in acquired
intensities. The same command continues where it stopped; under torchrun subjects are shared out, or frames where
nothing ties them. Half a minute a frame with the tiny prior on one core, about an hour on one GPU at the paper's size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
LEGACY = ("ex8_multi", "ex8_norm")
PRESETS = {name: {} for name in ("balanced", "fast", "paper", *LEGACY, "smoke")}  # inverse.MODES and objective.LEGACY
WEIGHTS = ("sax", "lax", "prior", "norm", "curvature", "difference", "temporal")
OURS = "; none: as --preset has it"


@dataclass
class Options(CommonOptions):
    preset: str = option("balanced", "speed, or one of the published objectives")
    root: str = option(str(HERE), "folder that holds data/, checkpoints/ and results/", group="paths")
    ckpt: str = option("", "trained prior; empty: ROOT/checkpoints/cardiac_autoenc/best.ckpt", group="paths")
    trust_pickle: bool = option(False, "allow a checkpoint that needs pickle; it can run code", group="paths")
    data: str = option("", "folder of subjects; empty: ROOT/data", group="paths")
    out: str = option("", "output folder; empty: ROOT/results/<preset>", group="paths")
    overwrite: bool = option(False, "replace results of other data or settings", group="paths")

    subject_id: tuple[str, ...] = option((), "subjects of --data; none: all of them", group="input")
    sax: str = option("", "short-axis file of one study, instead of --data", group="input")
    lax: tuple[str, ...] = option((), "its long-axis files", group="input")
    lax_names: tuple[str, ...] = option((), "names of the views: of --lax in order; of --data, those to use",
                                        group="input")  # fmt: skip
    frame: int = option(-1, "frame to reconstruct, from 0; -1: all", group="input")
    no_lax: bool = option(False, "use no view", group="input")
    align: bool = option(True, "register slices and views along their intersection lines first", group="input")
    thickness_points: int = option(1, "samples across the thickness of a view", group="input")

    factor: int = option(8, "dense slices per acquired gap", group="method")
    sweeps: int = option(2, "passes over the frames where the temporal term ties them", group="method")
    starts: int = option(
        1, "optimisations from perturbed start codes; several also give a map of the SD", group="method"
    )
    perturbation: float = option(0.2, "strength of the perturbation of start codes, 0 to 1", group="method")
    dry_run: bool = option(False, "print the configuration and what would be read, write nothing", group="method")

    sax_weight: float | None = option(None, "fidelity to the acquired slices" + OURS, group="objective")
    lax_weight: float | None = option(None, "consistency with the views" + OURS, group="objective")
    prior_weight: float | None = option(None, "distance of the codes from their start" + OURS, group="objective")
    norm_weight: float | None = option(None, "norm of the noise codes" + OURS, group="objective")
    curvature_weight: float | None = option(None, "second difference along the slices" + OURS, group="objective")
    difference_weight: float | None = option(None, "first difference along the slices" + OURS, group="objective")
    temporal_weight: float | None = option(None, "difference between phases" + OURS, group="objective")

    steps: int | None = option(None, "diffusion steps, 1 to 1000" + OURS, group="optimisation")
    iterations: int | None = option(None, "most iterations" + OURS, group="optimisation")
    lr: float | None = option(None, "learning rate of Adam" + OURS, group="optimisation")
    lr_z: float | None = option(None, "its rate for the semantic codes, 0: --lr" + OURS, group="optimisation")
    optimise: str | None = option(None, "codes to change" + OURS, choices=("both", "z"), group="optimisation")
    grad_steps: int | None = option(None, "gradient through so many steps only, 0: all" + OURS, group="optimisation")
    clamp: str | None = option(
        None, "of predicted images" + OURS, choices=("soft", "hard", "none"), group="optimisation"
    )
    refine: int | None = option(None, "fixed-point iterations of the inversion" + OURS, group="optimisation")
    chunk: int | None = option(None, "slices at a time: memory, not results" + OURS, group="optimisation")
    patience: int | None = option(None, "iterations without improvement, 0: no end" + OURS, group="optimisation")
    schedule: str | None = option(None, "start codes" + OURS, choices=("even", "legacy"), group="optimisation")
    noise: str | None = option(None, "noise codes: of the acquired slices, or one draw for all" + OURS,
                               choices=("inverted", "shared"), group="optimisation")  # fmt: skip
    warm_lr: float | None = option(
        None, "share of the learning rate where a frame begins where the one before ended" + OURS, group="optimisation"
    )
    stride: int | None = option(None, "decode every so many dense slices, interpolate the others" + OURS,
                                group="optimisation")  # fmt: skip
    hold: bool | None = option(
        None, "leave the codes of acquired slices as encoded; --no_hold: change them too" + OURS, group="optimisation"
    )
    solver: str | None = option(None, "solver" + OURS, choices=("gradient", "alternating"), group="optimisation")
    save_every: int | None = option(None, "iterations between savings" + OURS, group="optimisation")

    output: str | None = option(None, "images" + OURS, choices=("residual", "decoded"), group="result")
    base: str | None = option(None, "interpolation under the residual" + OURS, group="result",
                              choices=("auto", "nearest", "linear", "cubic", "lanczos"))  # fmt: skip
    propagate: bool | None = option(
        None, "spread what the views still miss; --no_propagate: not" + OURS, group="result"
    )
    hard: bool | None = option(None, "put the acquired slices back; --no_hard: not" + OURS, group="result")

    def __post_init__(self):
        root = Path(self.root)
        self.ckpt = self.ckpt or str(root / "checkpoints" / "cardiac_autoenc" / "best.ckpt")
        self.data = self.data or str(root / "data")
        self.out = self.out or str(root / "results" / self.preset)
        if self.lax and not self.sax:
            raise UserError("--lax belongs to --sax: give both, or --subject_id of --data")
        if self.sax and self.lax_names and len(self.lax_names) != len(self.lax):
            raise UserError(f"{len(self.lax_names)} --lax_names for {len(self.lax)} --lax files: give one for each")
        if len(set(self.lax_names)) < len(self.lax_names):
            raise UserError("two views have the same name in --lax_names: rename one")
        if self.sax and len(self.subject_id) > 1:
            raise UserError("--sax is one study: give one --subject_id as its name, or none")
        if self.factor < 1 or self.sweeps < 1 or self.starts < 1 or self.thickness_points < 1 or self.frame < -1:
            raise UserError(
                "--factor, --sweeps, --starts and --thickness_points must be at least 1, --frame -1 or more"
            )
        if not 0 <= self.perturbation < 1:
            raise UserError(f"--perturbation {self.perturbation}: choose 0 or more and less than 1")
        if self.precision == "fp16":
            raise UserError("--precision fp16: gradients through the whole chain leave its range; use bf16 or fp32")


def yaml_options(argv: list[str]) -> list[str]:
    """`--config FILE.yaml` as `--set` pairs before all others, which so win over it; JSON files are left alone."""
    out, pairs, rest = [], [], iter(argv)
    for word in rest:
        name, equals, path = word.partition("=")
        if name != "--config":
            out.append(word)
            continue
        path = path if equals else next(rest, "")
        if not path.endswith((".yaml", ".yml")):
            out += ["--config", path] if path else ["--config"]
            continue
        pairs += [f"{key}={text(value)}" for key, value in read_yaml(path).items()]
    return (["--set", *pairs] if pairs else []) + out


def text(value) -> str:
    """A YAML value as the command line would have it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def read_yaml(path: str) -> dict:
    import yaml

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path} as YAML ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config: {path} must hold option: value lines")
    return values


def main() -> None:
    options = cli.parse(Options, yaml_options(sys.argv[1:]), description=__doc__, presets=PRESETS)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        reconstruct_all(options, rt)


def resolve(options: Options):
    """Objective and settings: those of the preset, changed by the options that were given."""
    from mgdcr import inverse, objective

    given = {name: value for name, value in cli.to_dict(options).items() if value is not None}
    if options.preset in LEGACY:
        goal, base = objective.LEGACY[options.preset], inverse.LEGACY_SETTINGS | {
            "lr": inverse.LEGACY_LR[options.preset]}  # fmt: skip
    else:
        mode = "fast" if options.preset == "smoke" else options.preset
        goal, base = objective.Objective(), inverse.MODES[mode]
    if options.preset == "smoke":
        base = base | dict(steps=3, iterations=2, grad_steps=2)
    weights = {name: given[f"{name}_weight"] for name in WEIGHTS if f"{name}_weight" in given}
    return replace(goal, **weights), inverse.settings_of(base | given)


def reconstruct_all(options: Options, rt) -> None:
    """All subjects; ranks share subjects, or the frames of each where nothing ties them."""
    from mgdcr import inverse, study
    from mgdcr.trainer import load_network

    goal, settings = resolve(options)
    sources = study.find(options)
    if options.dry_run:
        rt.print(f"{goal}\n{settings}\n" + "\n".join(f"{s.name}: {s.sax}, {len(s.lax)} views" for s in sources))
        return
    trained = load_network(Path(options.ckpt), rt, trust_pickle=options.trust_pickle)
    prior = inverse.Prior(trained.model, settings, rt)
    by_frame = not goal.temporal or options.frame >= 0
    with runtime_stop() as stop:
        for source in sources if by_frame else rt.shard(sources):
            study.reconstruct(source, prior, trained, goal, settings, options, rt, stop, share_frames=by_frame)
            if stop.requested:
                raise SystemExit(stop.exit_status)


def runtime_stop():
    from common.runtime import StopRequest

    return StopRequest()


if __name__ == "__main__":
    cli.run(main)
