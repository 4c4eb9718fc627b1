"""Every option of the scripts that use a trained LDAE (generate, reconstruction_table, interpolation_evaluation): one line each.

Imports no torch. Defaults are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
SAMPLERS = ("ddim", "dpmpp_2m")
KINDS = ("aekl", "y_only", "encoded")  # of reconstructions
TABLE_ROWS = ("encoded", "drawn", "y_only", "prior", "untrained", "shuffled", "shuffled_y_only")
PRESETS = {
    "paper": {},
    "tiny": dict(steps=20, num_workers=0),
    "smoke": dict(steps=20, num_workers=0),  # design.md's name of it
    # The original's samplers: its step grid, the clamp to [-1, 1], and its guidance.
    "upstream": dict(sampling="upstream"),
}

# fmt: off


@dataclass
class ModelOptions(CommonOptions):
    """A trained LDAE and how it samples."""

    preset: str = option("paper", "named set of option values, applied before the other options")
    trust_pickle: bool = option(False, "allow weight files that need pickle; it can run code")
    overwrite: bool = option(False, "replace outputs that were made with other settings")
    root: str = option(str(HERE), "study folder that default paths hang off", group="paths")
    model_path: str = option("", "network of stage 3; empty: ROOT/runs/ldae_repr_learn/checkpoints/best.ckpt", group="paths")
    steps: int = option(100, "steps of inversion, and of sampling", group="sampling")
    inversion_passes: int = option(0, "more network calls per step of the inversion, with which its sampling comes back exactly in few steps, too", group="sampling")
    sampler: str = option("ddim", "sampler of what starts from fresh noise; an inferred z_T goes back by ddim", choices=SAMPLERS, group="sampling")
    sampling: str = option("model", "step grid, clamp and guidance: as stored with the model, or as in the original", choices=("model", "upstream"), group="sampling")
    batch_size: int = option(8, "volumes decoded together on a GPU; a CPU takes them one by one, to be exact", unit="volumes", group="sampling")

    def __post_init__(self):
        if min(self.steps, self.batch_size) < 1 or min(self.seed, self.inversion_passes) < 0:
            raise UserError("--steps and --batch_size must be at least 1, --seed and --inversion_passes 0 or more")
        self.model_path = self.model_path or str(Path(self.root) / "runs" / "ldae_repr_learn" / "checkpoints" / "best.ckpt")


@dataclass
class ScanOptions(ModelOptions):
    """Which scans of a table."""

    csv_path: str = option("", "table of the scans; empty: ROOT/data/dataset.csv", group="paths")
    split: str = option("", "split of the subjects; empty: ROOT/split.json", group="paths")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache", group="paths")
    part: str = option("test", "subjects that are taken; all needs no split", choices=("train", "val", "test", "all"), group="scans")
    max_scans: int = option(0, "only the first so many scans; 0: all", group="scans")

    def __post_init__(self):
        super().__post_init__()
        if self.max_scans < 0:
            raise UserError(f"--max_scans {self.max_scans}: give 0 for all, or more")
        root = Path(self.root)
        self.csv_path = self.csv_path or str(root / "data" / "dataset.csv")
        self.split = self.split or str(root / "split.json")
        self.cache = self.cache or str(root / "data" / "cache")

    @property
    def cache_folder(self) -> str | None:
        return None if self.cache == "none" else self.cache


# ---- generate.py: one class per mode


@dataclass
class InputOptions(ScanOptions):
    """Scans of the table or plain files, and where outputs go."""

    mode: ClassVar[str] = ""

    input: tuple[str, ...] = option((), "NIfTI files instead of a table; outputs are named after them", group="scans")
    scans: tuple[str, ...] = option((), "scans of the table by name, <subject>_M006; none: all of --part", group="scans")
    grid: str = option("native", "write on the grid of the input and in its units, or on the prepared grid", choices=("native", "model"), group="output")
    output_dir: str = option("", "output folder; empty: ROOT/generated/MODE", group="output")

    def __post_init__(self):
        super().__post_init__()
        if self.input and self.scans:
            raise UserError("--input and --scans: give files or scans of the table, not both")
        self.output_dir = self.output_dir or str(Path(self.root) / "generated" / self.mode)


@dataclass
class Reconstruct(InputOptions):
    """Scans from their codes, with metrics against the prepared scan."""

    mode: ClassVar[str] = "reconstruct"
    kinds: tuple[str, ...] = option(KINDS, "aekl: autoencoder alone; y_only: y and fixed noise; encoded: y and inferred z_T", choices=KINDS, group="reconstruct")


@dataclass
class Vary(InputOptions):
    """Stochastic variation: the scan's y with fresh z_T."""

    mode: ClassVar[str] = "vary"
    n: int = option(4, "variations of every scan", group="vary")

    def __post_init__(self):
        super().__post_init__()
        if self.n < 1:
            raise UserError(f"--n {self.n}: give at least one variation")


@dataclass
class Interpolate(InputOptions):
    """Between two scans, or two sessions of a subject: LERP on y, SLERP on z_T."""

    mode: ClassVar[str] = "interpolate"
    subject: str = option("", "subject whose --sessions are the two ends, instead of two --scans or --input", group="interpolate")
    sessions: tuple[int, ...] = option((), "two sessions of --subject; none: its first and last", unit="months", group="interpolate")
    alphas: tuple[float, ...] = option((0.0, 0.25, 0.5, 0.75, 1.0), "positions; 0 is the first scan, 1 the second", group="interpolate")
    noise_path: str = option("slerp", "path between the two z_T", choices=("slerp", "lerp"), group="interpolate")
    mix: str = option("codes", "mix the two y, or the gradients that they give at every step", choices=("codes", "gradients"), group="interpolate")

    def __post_init__(self):
        super().__post_init__()
        if len(self.scans or self.input or "ab") != 2 or len(self.sessions) not in (0, 2):
            raise UserError("interpolate is between two scans: give two --scans, two --input files, or --subject with two "
                            "--sessions")
        if bool(self.subject) == bool(self.scans or self.input):
            raise UserError("interpolate needs two --scans, two --input files, or a --subject (one of the three)")
        if not self.alphas or len(set(self.alphas)) < len(self.alphas):
            raise UserError("--alphas: give each position once")


@dataclass
class Manipulate(InputOptions):
    """Attribute editing: y moved along a probe's direction, z_T as inferred with the original y."""

    mode: ClassVar[str] = "manipulate"
    direction: str = option("", "direction of train_manipulation.py, such as probes/diagnosis_AD_vs_CN (also below ROOT)", group="manipulate")
    keep: tuple[str, ...] = option((), "directions whose predictions the edits leave where they are, such as probes/age", group="manipulate")
    amounts: tuple[float, ...] = option((-4.0, -2.0, 2.0, 4.0), "sizes of the edits; positive raises the probability (or age)", group="manipulate")
    unit: str = option("", "unit of --amounts; empty: logit for classes, years for age; upstream: the original's scale", choices=("", "logit", "sd", "years", "upstream"), group="manipulate")
    target_probability: float = option(0.0, "also the edit that just reaches this probability; 0: none", group="manipulate")
    target_age: float = option(0.0, "also the edit that just reaches this predicted age; 0: none", unit="years", group="manipulate")
    labels: str = option("", "folder of label maps <scan>.nii.gz on the scans' grids: volumes by region in the report", group="manipulate")
    label_names: str = option("", "JSON file {region: code or codes}, or with such an entry label_codes (phantom.json)", group="manipulate")

    def __post_init__(self):
        super().__post_init__()
        if not self.direction:
            raise UserError("--direction: name a probe, such as --direction probes/diagnosis_AD_vs_CN; "
                            "`python ldae/scripts/train_manipulation.py` writes them")
        if not 0 <= self.target_probability < 1 or self.target_age < 0:
            raise UserError("--target_probability must be between 0 and 1, --target_age positive")
        if len(set(self.amounts)) < len(self.amounts):
            raise UserError("--amounts: give each size once")


@dataclass
class Synthesize(ModelOptions):
    """Scans of nobody: y from the prior over codes, z_T from a unit Gaussian."""

    mode: ClassVar[str] = "synthesize"
    n: int = option(8, "volumes; a larger number later adds to them", group="synthesize")
    code_prior: str = option("", "prior over codes; empty: ROOT/runs/code_prior/checkpoints/best.ckpt", group="paths")
    code_steps: int = option(50, "steps of the prior over codes", group="sampling")
    like: str = option("", "scan in whose place the outputs lie, on the grid it would be prepared to; empty: centred at 0 mm", group="output")
    output_dir: str = option("", "output folder; empty: ROOT/generated/synthesize", group="output")

    def __post_init__(self):
        super().__post_init__()
        if self.n < 1 or self.code_steps < 1:
            raise UserError("--n and --code_steps must be at least 1")
        root = Path(self.root)
        self.code_prior = self.code_prior or str(root / "runs" / "code_prior" / "checkpoints" / "best.ckpt")
        self.output_dir = self.output_dir or str(root / "generated" / self.mode)


MODES = {options.mode: options for options in (Reconstruct, Vary, Interpolate, Manipulate, Synthesize)}

# ---- evaluations


@dataclass
class TableOptions(ScanOptions):
    """Of reconstruction_table.py."""

    table_steps: tuple[int, ...] = option((10, 20, 50, 100), "numbers of steps, in place of --steps", group="sampling")
    rows: tuple[str, ...] = option(TABLE_ROWS, "rows of the table beside the autoencoder's", choices=TABLE_ROWS, group="table")
    lpips_weights: tuple[str, ...] = option((), "pretrained files of LPIPS: backbone and heads; none: not available offline", group="table")
    lpips_net: str = option("squeeze", "backbone of LPIPS", choices=("squeeze", "alex", "vgg"), group="table")
    eval_batch: int = option(4, "scans that go through the networks together", group="table")
    output_dir: str = option("", "output folder; empty: ROOT/evaluation/reconstruction", group="paths")

    def __post_init__(self):
        super().__post_init__()
        if not self.table_steps or min(self.table_steps) < 1 or len(set(self.table_steps)) < len(self.table_steps):
            raise UserError("--table_steps: give each number once, all at least 1")
        if self.eval_batch < 1:
            raise UserError("--eval_batch must be at least 1")
        self.output_dir = self.output_dir or str(Path(self.root) / "evaluation" / "reconstruction")


@dataclass
class InterpolationOptions(ScanOptions):
    """Of interpolation_evaluation.py."""

    min_sessions: int = option(3, "fewest sessions of a subject that takes part", group="interpolation")
    max_subjects: int = option(0, "only the first so many subjects; 0: all", group="interpolation")
    noise_path: str = option("slerp", "path between the two z_T", choices=("slerp", "lerp"), group="interpolation")
    output_dir: str = option("", "output folder; empty: ROOT/evaluation/interpolation", group="paths")

    def __post_init__(self):
        super().__post_init__()
        if self.min_sessions < 3 or self.max_subjects < 0:
            raise UserError("--min_sessions: two ends and a session between them are at least 3; --max_subjects: 0 for all, or more")
        self.output_dir = self.output_dir or str(Path(self.root) / "evaluation" / "interpolation")


@dataclass
class BenchmarkOptions(CommonOptions):
    """Of benchmark.py: random weights of a preset's size."""

    preset: str = option("paper", "size of the networks and volumes, and how it is measured")
    size: str = option("paper", "networks and volumes of this preset of the stages", choices=("paper", "small", "tiny"), group="benchmark")
    steps: int = option(100, "steps of inversion, and of sampling", group="benchmark")
    batch_size: int = option(1, "volumes at a time", unit="volumes", group="benchmark")
    repeats: int = option(3, "timed rounds after an untimed one; both models in each round", group="benchmark")
    measure: str = option("passes", "full: run all steps; passes: time one call of each network and multiply by the steps", choices=("full", "passes"), group="benchmark")
    models: tuple[str, ...] = option(("ldae", "voxel"), "models to measure", choices=("ldae", "voxel"), group="benchmark")
    threads: int = option(0, "CPU threads of both models; 0: as torch decides", group="benchmark")
    root: str = option(str(HERE), "study folder that the default path hangs off", group="paths")
    out: str = option("", "JSON file of the results; empty: ROOT/evaluation/benchmark.json", group="paths")
    overwrite: bool = option(False, "replace results that are there")

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.repeats) < 1 or self.threads < 0:
            raise UserError("--steps, --batch_size and --repeats must be at least 1, --threads 0 or more")
        self.out = self.out or str(Path(self.root) / "evaluation" / "benchmark.json")


BENCHMARK_PRESETS = {
    "paper": {},
    "small": dict(size="small"),
    "tiny": dict(size="tiny", steps=10, repeats=2, measure="full"),
    "smoke": dict(size="tiny", steps=10, repeats=2, measure="full"),
}
