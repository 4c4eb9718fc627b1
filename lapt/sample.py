"""Sample DWI and ADC from CT perfusion: nothing but the CTP and a brain mask is needed.

    python lapt/sample.py -r lapt/runs/lapt --ctp ctp.nii.gz --mask mask.nii.gz --outdir out    # one study
    python lapt/sample.py -r lapt/runs/lapt --input_dir STUDIES --n_samples 8 --outdir out      # STUDIES/<case>/
    python lapt/sample.py -r lapt/runs/lapt --ctp ctp.nii.gz --maps tmax.nii.gz cbf.nii.gz --mask mask.nii.gz
    python lapt/sample.py -r lapt/runs/lapt --split test                                        # of the prepared data
    python lapt/sample.py -r lapt/runs/lapt3d --split test --preset upstream3d                  # the original's steps

-r names a run folder, a checkpoint in it, or a file of export.py, of a 2D or a volume model. Writes, case by case,
OUTDIR/<case>/{dwi,adc}_sample_<j>.nii.gz, of several samples also _mean and _sd, lesion_probability.nii.gz and
sample.json, on the grid of the CTP, 0 outside the mask, ADC in 1e-6 mm²/s. A sample depends on --seed, --model_id, case
and number alone: the same command again makes what is missing, and under torchrun the cases are shared out. A slice
takes 50 network calls: at the paper's size seconds on a GPU and minutes on a CPU, at the tiny preset's well under one.
Research use only: the images are synthetic.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
SHORT = {"-r": "--resume", "-n": "--n_samples", "-s": "--seed"}
# Deviation (original code): one sample instead of 50,000, and steps that begin at pure noise and end without any.
PRESETS = {
    "paper": {},
    "paper3d": dict(steps=250),
    "upstream": dict(spacing="upstream"),
    "upstream3d": dict(spacing="upstream", steps=250),
    "smoke": dict(steps=10),
}


@dataclass
class Options(CommonOptions):
    preset: str = option("paper", "named set of option values, applied before the other options")
    seed: int = option(42, "seed of everything random")
    resume: str = option("", "-r: run folder, its checkpoint, or an exported file")
    trust_pickle: bool = option(False, "allow network files that need pickle; they can run code")
    ctp: str = option("", "CTP of one study, 4D in HU", group="input")
    mask: str = option("", "brain mask of --ctp, on its grid", group="input")
    maps: tuple[str, ...] = option((), "maps of the case, in the order of the model's training; with --ctp, or alone "
                                       "where the model takes no CTP", group="input")  # fmt: skip
    case: str = option("", "name of the case of --ctp; empty: its file's, or its folder's if that is called ctp",
                       group="input")  # fmt: skip
    input_dir: str = option("", "folder of studies, <case>/ctp.nii.gz and mask.nii.gz", group="input")
    dataroot: str = option(str(HERE / "data"), "prepared folder, where neither --ctp nor --input_dir is given",
                           group="input")  # fmt: skip
    split: str = option("test", "its list to take", choices=("train", "val", "test", "ct_only"), group="input")
    start_idx: int = option(0, "first case of the sorted list", group="input")
    end_idx: int = option(0, "one past the last case; 0: all", group="input")
    resample_time: bool = option(False, "interpolate a CTP of another number of time points", group="input")
    to_ctp_grid: bool = option(False, "resample a mask that lies on another grid", group="input")
    make_masks: bool = option(False, "make a rough mask from the CTP where there is none", group="input")
    spacing_mm: tuple[float, ...] = option((), "voxel size to resample the CTP to for the network; none: as it is",
                                           unit="mm", group="input")  # fmt: skip
    outdir: str = option("", "output folder; empty: RUN/samples/<steps>", group="output")
    n_samples: int = option(1, "-n: samples per case", group="output")
    overwrite: bool = option(False, "replace samples made with other settings", group="output")
    steps: int = option(50, "network calls per sample", group="sampling")
    sampler: str = option("ddim", "dpmpp_2m is DPM-Solver++(2M)", choices=("ddim", "dpmpp_2m"), group="sampling")
    spacing: str = option("model", "steps to visit: as the model's file says; from pure noise to clean; the original's",
                          choices=("model", "trailing", "upstream"), group="sampling")  # fmt: skip
    model_id: str = option("lapt", "text that enters the seed of every case; the same for models to be compared",
                           group="sampling")  # fmt: skip
    slice_noise: str = option("independent", "noise of the slices: their own, or one for all, against flicker (2D "
                              "models)", choices=("independent", "shared"), group="sampling")  # fmt: skip
    overlap: int = option(-1, "slices that windows share where a study has more than a volume network; -1: half",
                          group="sampling")  # fmt: skip
    weights: str = option("average", "averaged or raw weights", choices=("average", "raw"), group="sampling")
    batch_size: int = option(48, "slices at a time on a GPU; a CPU groups them in one way always, to be exact",
                             unit="slices", group="sampling")  # fmt: skip
    guide: str = option("", "run of the segmentation guide, for the lesion probability; empty: ADC threshold",
                        group="lesion")  # fmt: skip
    lesion_threshold: float = option(620.0, "ADC below which tissue counts as lesion", unit="1e-6 mm^2/s",
                                     group="lesion")  # fmt: skip

    def __post_init__(self):
        if not self.resume:
            raise UserError("name a trained model with -r: a run folder, a checkpoint, or a file of export.py")
        one = self.ctp or self.maps
        if self.mask and not one or one and not (self.mask or self.make_masks):
            raise UserError("--ctp and --mask belong together: give both (or --make_masks for a rough mask)")
        if one and self.input_dir:
            raise UserError(f"--{'ctp' if self.ctp else 'maps'} and --input_dir: give one of them")
        if self.batch_size < 1 or self.seed < 0 or self.start_idx < 0 or self.end_idx < 0:
            raise UserError("--batch_size must be at least 1, --seed, --start_idx and --end_idx 0 or more")
        self.outdir = self.outdir or str(run_folder(Path(self.resume)) / "samples" / str(self.steps))


def run_folder(path: Path) -> Path:
    """The run of a checkpoint; of a single file its folder."""
    if path.suffix and not path.is_dir():
        return path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return path


def main() -> None:
    argv = [SHORT.get(word, word) for word in sys.argv[1:]]
    options = cli.parse(Options, argv, description=__doc__, presets=PRESETS)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        sample(options, rt)


def sample(options: Options, rt) -> None:
    """Write the samples of all chosen cases; finished ones are kept."""
    from dataclasses import fields

    from lapt import dataset, inference
    from lapt.diffusion import load_model
    from lapt.segmentation import load_guide

    # ---- setup: everything the user can get wrong, before any network call
    settings = inference.Settings(**{f.name: getattr(options, f.name) for f in fields(inference.Settings)})
    model = load_model(options.resume, rt, options.trust_pickle, weights=options.weights)
    guide = None
    if options.guide:
        guide = load_guide(options.guide, rt, trust_pickle=options.trust_pickle, option="--guide")
    cases = find_cases(options, model.intensity)
    if not (options.ctp or options.maps or options.input_dir):
        if note := dataset.split_note({"the model": model.intensity.split_hash}, options.dataroot):
            rt.print(f"note: {note}")

    # ---- loop over cases: each rank takes its share
    out = Path(options.outdir)
    new = inference.sample_folder(
        model, cases, out, settings, rt, batch=options.batch_size, guide=guide, overwrite=options.overwrite
    )
    rt.print(f"{len(cases)} cases ({new} new) in {out}: {options.n_samples} sample(s) each, {options.steps} steps")
    rt.print(inference.NOTICE)


def find_cases(options: Options, intensity) -> list:
    """(name, loader) of the chosen cases, of the frames and maps of the model's `intensity`; UserError for none."""
    from lapt import inference, raw

    allowed = {name: getattr(options, name) for name in ("resample_time", "to_ctp_grid", "make_masks")}
    maps, alone = tuple(intensity.maps), not intensity.time_points
    rules = raw.Rules(intensity.time_points, maps=maps, maps_only=alone, **allowed)
    if options.ctp or options.maps:
        if len(options.maps) != len(maps) or bool(options.ctp) == alone:
            images = ("" if alone else "--ctp") + (f" --maps {' '.join(name.upper() for name in maps)}" if maps else "")
            raise UserError(f"this model takes {images.strip()}: give these files, in this order")
        path = Path(options.ctp or options.maps[0])
        stem = path.name.split(".")[0]
        name = options.case or (path.resolve().parent.name if stem in ("ctp", *maps) else stem)
        files = dict(zip(maps, map(Path, options.maps), strict=True)) | ({"ctp": path} if options.ctp else {})
        files |= {"mask": Path(options.mask)} if options.mask else {}
        return inference.raw_studies([raw.Source(name, name, files)], rules)
    if options.input_dir:
        cases = inference.raw_studies(raw.find(options.input_dir, maps), rules)
    else:
        cases = inference.prepared_studies(Path(options.dataroot), options.split)
    chosen = cases[options.start_idx : options.end_idx or None]
    if not chosen:
        raise UserError(f"--start_idx {options.start_idx} --end_idx {options.end_idx}: none of the {len(cases)} cases")
    return chosen


if __name__ == "__main__":
    cli.run(main)
