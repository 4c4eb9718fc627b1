"""The claims made for MGDCR, tested on a phantom whose dense truth is known.

    python mgdcr/reproduce.py                  # about an hour on two CPU cores
    python mgdcr/reproduce.py --preset smoke   # the demo: minutes, a shorter training and fewer reconstructions

A prior learns from short-axis slices of other hearts; then hearts it has never seen are reconstructed from 11 slices
and three long-axis views, by the documented commands, under every condition of CONDITIONS. No paper gives numbers: the
column of targets is ours, set from what interpolation reaches. Running it again continues where it stopped. Writes
OUT/results.json, OUT/scores.csv and OUT/figures/*.png. Prints a table of all methods (nearest, linear, cubic, lanczos;
lax_residual: with the views' residual spread on it; diffae, unconditional: codes of a prior decoded without
optimisation; ours; outlines; truth), then: claim, pass or fail, ours on the phantom, target.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
FACTOR = 8
ED, ES = 0, 1  # frames of the cohorts with two of them: phases 0 and 0.5
TEST_SEED, TRAIN_SEED = 1, 7  # no heart is in both cohorts


@dataclass
class Options(CommonOptions):
    preset: str = option("phantom", "phantom: the study; smoke: the demo")
    out: str = option(str(HERE / "runs" / "reproduce"), "folder of cohorts, prior, results.json and figures")
    n_train: int = option(120, "hearts for the prior, a fifth of them held out", unit="hearts")
    n_test: int = option(
        4, "hearts to reconstruct under ideal conditions, at end-diastole and end-systole", unit="hearts"
    )
    n_other: int = option(2, "of them, under the other conditions", unit="hearts")
    both_phases: bool = option(True, "the other conditions at end-systole too")
    total_samples: int = option(48_000, "length of the prior's training", unit="slices")
    ddim_samples: int = option(8_000, "length of the training of the unconditional prior, a baseline", unit="slices")
    n_slices: int = option(22, "slices of the round trip (A5)", unit="slices")
    phases: int = option(20, "frames of the whole cine (A19, A20)")
    mode: str = option("fast", "mode of the reconstructions", choices=("fast", "balanced", "paper"))
    diffae_steps: int = option(20, "DDIM steps of both priors alone, baselines")
    iterations: int = option(0, "iterations of a reconstruction; 0: as the mode has it")
    cine_iterations: int = option(8, "iterations of a frame of the whole cine")

    def __post_init__(self):
        if not 1 <= self.n_other <= self.n_test or min(self.n_train, self.phases) < 4:
            raise UserError("--n_other: from 1 to --n_test hearts; --n_train and --phases: at least 4")


PRESETS = {
    "phantom": {},
    "smoke": dict(
        out=str(HERE / "runs" / "demo"),
        n_train=40,
        n_test=1,
        n_other=1,
        both_phases=False,
        total_samples=4_000,
        ddim_samples=500,
        n_slices=6,
        phases=8,
        diffae_steps=10,
        iterations=4,
        cine_iterations=2,
    ),
}


@dataclass(frozen=True)
class Condition:
    """Reconstructions of one kind: `phantom` are options of make_phantom.py, `how` of ex8_multi_optimizer.py."""

    phantom: dict
    how: dict
    all_hearts: bool = False


CONDITIONS = {
    "ideal": Condition({}, {}, all_hearts=True),
    "contrast": Condition({"lax_gain": 1.25, "lax_offset": 0.05}, {}),
    "shift, aligned": Condition({"shift_lax": (2.0, 0.0, 0.0)}, {}),  # one pixel of the short axis
    "shift": Condition({"shift_lax": (2.0, 0.0, 0.0)}, {"align": False}),
    "noise": Condition({"noise_lax": 0.05}, {}),
    "one view": Condition({}, {"lax_names": ("4ch",)}),
    "no view": Condition({}, {"no_lax": True}),
    "without 4ch": Condition({}, {"lax_names": ("2ch", "3ch")}),
    "without 2ch": Condition({}, {"lax_names": ("4ch", "3ch")}),
    "without 3ch": Condition({}, {"lax_names": ("4ch", "2ch")}),
}


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    from common import runtime, training
    from common.runlog import git_revision

    with runtime.start(options.device, options.precision, options.seed) as rt:
        if rt.world_size > 1:
            raise UserError("reproduce.py runs in one process; the scripts of the stages are what torchrun spreads")
        started, revision = time.time(), git_revision()
        training.claim_study(options)
        trained, unconditional = train_priors(options, rt)
        results = claim_round_trip(options, trained, rt)
        table = measure(options, trained, unconditional, rt)
        methods = compare_methods(table)
        results |= claim_volumes(table)
        results |= claim_labels(table)
        results |= claim_robustness(table)
        results |= claim_parts(table)
        results |= claim_held_out_views(options, table)
        results |= claim_cine(options, rt)
        draw(options, table)
        finish(options, results, methods, table, time.time() - started, revision)


# ---- prior and reconstructions --------------------------------------------------------------------------------------


def run_script(module, *words) -> None:
    """`python module words...` in this process."""
    before, sys.argv = sys.argv, [module.__file__, *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before


def make_cohort(folder: Path, hearts: int, frames: int, seed: int, *more, **flags) -> Path:
    """A phantom cohort in `folder`, if it is not there yet."""
    from mgdcr import make_phantom

    if not (folder / "phantom.json").is_file():
        for name, value in flags.items():
            more += (f"--{name}", *(value if isinstance(value, tuple) else (value,)))
        run_script(make_phantom, "--out", folder, "--overwrite", "--n_subjects", hearts, "--frames", frames,
                   "--seed", seed, *more)  # fmt: skip
    return folder


def train_priors(options: Options, rt) -> tuple:
    """Diffusion autoencoder and unconditional network, of hearts whose stacks begin at any height; once."""
    from mgdcr import config as settings
    from mgdcr import lmdb_writer, trainer

    root = Path(options.out) / "prior"
    make_cohort(root / "data", options.n_train, 6, TRAIN_SEED + options.seed, "--no-dense", "--lax_names", "4ch",
                "--start_sax", FACTOR - 1)  # fmt: skip
    if not (root / "datasets" / "split.json").is_file():
        run_script(lmdb_writer, "--root", root, "--input", root / "data", "--overwrite")
    trained = []
    for stage, kind, samples in (("autoenc", settings.AutoencConfig, options.total_samples),
                                 ("ddim", settings.DDIMConfig, options.ddim_samples)):  # fmt: skip
        config = kind(**settings.PRESETS[stage]["tiny"] | dict(
            root=str(root), total_samples=samples, seed=options.seed, device=options.device,
            precision=options.precision))  # fmt: skip
        trainer.train(config, rt)
        trained.append(trainer.load_network(config.best_path, rt, trainer.kind_of(config)))
    return tuple(trained)


def heart(number: int) -> str:
    from mgdcr.make_phantom import subject_name

    return subject_name(number)


def cohort_of(options: Options, condition: Condition) -> Path:
    """The hearts of a condition at end-diastole and end-systole; the truth is that of the ideal cohort."""
    name = "_".join(condition.phantom) or "ideal"
    folder = Path(options.out) / "data" / name
    if not condition.phantom:
        return make_cohort(folder, options.n_test, 2, TEST_SEED + options.seed)
    return make_cohort(folder, options.n_other, 2, TEST_SEED + options.seed, "--no-dense", **condition.phantom)


def reconstruct(options: Options, rt, data: Path, out: Path, hearts: list[str], **how) -> None:
    """ex8_multi_optimizer.py on some hearts of a cohort, all frames; finished frames are kept."""
    from mgdcr.LAX_condition import ex8_multi_optimizer as script

    iterations = {"iterations": options.iterations} if options.iterations else {}
    given = dict(preset=options.mode, root=str(Path(options.out) / "prior"), data=str(data), out=str(out),
                 subject_id=tuple(hearts), seed=options.seed, device=options.device,
                 precision=options.precision)  # fmt: skip
    script.reconstruct_all(script.Options(**given | iterations | how), rt)


@dataclass(eq=False)
class Volumes:
    """A heart at one phase in [0, 1]: truth (81, 64, 64), labels, and the volume of every method and condition."""

    heart: str
    frame: int
    truth: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    spacing_mm: tuple[float, ...]
    volumes: dict[str, np.ndarray]

    @cache  # noqa: B019 a handful of these live as long as the run
    def scores(self, name: str) -> dict[str, float]:
        """PSNR in dB, SSIM and NRMSE of the slices that were not acquired, within 50 mm of the middle."""
        from mgdcr import evaluate

        chosen = evaluate.unobserved(len(self.truth), FACTOR)
        return evaluate.image_scores(self.volumes[name], self.truth, self.mask, chosen)

    def psnr(self, name: str) -> float:
        return self.scores(name)["psnr_db"]

    @cache  # noqa: B019
    def dice(self, name: str) -> dict[str, float]:
        """Dice of every label grown through a volume; "outlines": of interpolated labels, "truth": of the truth."""
        from common import metrics
        from mgdcr import indices

        sparse = self.labels[::FACTOR]
        if name == "outlines":
            own = indices.interpolate_labels(sparse, FACTOR)
        else:
            volume = self.truth if name == "truth" else self.volumes[name]
            own = indices.grow_labels(volume, sparse, FACTOR, self.spacing_mm)
        return {label: metrics.dice((own == code).astype(np.uint8), (self.labels == code).astype(np.uint8))
                for label, code in indices.LABELS.items()}  # fmt: skip

    def gain(self, name: str) -> float:
        """dB over the better of linear and cubic interpolation."""
        return self.psnr(name) - max(self.psnr("linear"), self.psnr("cubic"))


def measure(options: Options, trained, unconditional, rt) -> list[Volumes]:
    """All conditions reconstructed, and the baselines: one entry per heart and phase."""
    out, table = Path(options.out), []
    for name, condition in CONDITIONS.items():
        hearts = [heart(i + 1) for i in range(options.n_test if condition.all_hearts else options.n_other)]
        print(f"reconstruction: {name}", flush=True)
        frame = -1 if options.both_phases or condition.all_hearts else ED
        reconstruct(options, rt, cohort_of(options, condition), results_of(options, name), hearts, temporal_weight=0.0,
                    frame=frame, **condition.how)  # fmt: skip
    for number in range(options.n_test):
        for frame in (ED, ES):
            others = number < options.n_other and (options.both_phases or frame == ED)
            table.append(gather(options, heart(number + 1), frame, trained, unconditional, rt, others))
    (out / "figures").mkdir(parents=True, exist_ok=True)
    return table


def results_of(options: Options, name: str) -> Path:
    return Path(options.out) / "results" / name.replace(",", "").replace(" ", "_")


def gather(options: Options, name: str, frame: int, trained, unconditional, rt, with_others: bool) -> Volumes:
    """Truth, baselines and reconstructions of one heart at one phase."""
    import torch

    from mgdcr import baselines, evaluate, geometry, inverse

    loaded, scan = study_of(options, name)
    frame_data = scan(frame)
    folder = cohort_of(options, CONDITIONS["ideal"]) / name

    def scaled(volume):
        return (loaded.scale.normalise(volume, clip=False) + 1) / 2

    truth = scaled(geometry.load_cine(folder / "dense.nii.gz").data[frame])
    labels = geometry.load_cine(folder / "labels.nii.gz").data[frame].round().astype(np.uint8)
    volumes = {kind: baselines.interpolate(frame_data.sax, FACTOR, kind) for kind in baselines.INTERPOLATIONS}
    base = volumes[baselines.better_interpolation(frame_data.sax)]
    volumes["lax_residual"] = baselines.lax_residual(base, frame_data.views, FACTOR, frame_data.spacing_mm)
    published = inverse.Settings(steps=options.diffae_steps, chunk=16)
    ours = inverse.Settings(**inverse.MODES[options.mode])
    sax = torch.from_numpy(frame_data.sax).clamp(0, 1)
    alone = inverse.UnconditionalPrior(unconditional.model, published, rt)
    volumes["unconditional"] = baselines.prior_interpolation(alone, frame_data)
    decodings = [("diffae", published, "even"), ("start", ours, "even")]
    if with_others:
        decodings += [("diffae legacy", published, "legacy"), ("start legacy", ours, "legacy")]
    for method, settings, schedule in decodings:
        prior = inverse.Prior(trained.model, settings, rt)
        decoded = baselines.prior_interpolation(prior, frame_data, schedule)
        if settings is ours:
            decoded = inverse.consistent(torch.from_numpy(decoded), sax).numpy()
        volumes[method] = decoded
    for condition in CONDITIONS if with_others else ("ideal",):
        path = results_of(options, condition) / name / f"frame_{frame:03d}"
        volumes[condition] = scaled(geometry.load_cine(path / "volume.nii.gz").data[0])
    path = results_of(options, "ideal") / name / f"frame_{frame:03d}"
    start, decoded = (scaled(geometry.load_cine(path / f"{file}.nii.gz").data[0]) for file in ("seed", "decoded"))
    a, b = json.loads((path / "report.json").read_text())["shares"]
    volumes["ideal, not spread"] = base + a * (start - base) + b * (decoded - start)
    spacing = loaded.dense.spacing_mm
    mask = evaluate.region(truth.shape, (spacing[1], spacing[0]), evaluate.ROI_MM)
    return Volumes(name, frame, truth, labels, mask, spacing[::-1], volumes)


def study_of(options: Options, name: str):
    """A heart of the ideal cohort, not aligned (its headers are right), and its frames by number."""
    from mgdcr import study

    folder = cohort_of(options, CONDITIONS["ideal"]) / name
    views = {view: folder / f"lax_{view}.nii.gz" for view in ("4ch", "2ch", "3ch")}
    loaded = study.load(study.Source(name, folder / "sax.nii.gz", views), factor=FACTOR, align=False)
    return loaded, lambda frame: study.frame_of(loaded, frame)


# ---- all methods ----------------------------------------------------------------------------------------------------

METHODS = ("nearest", "linear", "cubic", "lanczos", "lax_residual", "diffae", "unconditional", "ideal")
MEASURES = ("psnr_db", "ssim", "nrmse", "dice_lv", "dice_myo", "dice_rv")


def compare_methods(table: list[Volumes]) -> list[dict]:
    """A row per phase and method with the means over hearts of MEASURES: every baseline, ours, outlines, the truth.

    Outlines have no image, and the truth's is exact; the Dice of its grown labels is what the segmenter allows.
    """
    rows = []
    for phase, frame in (("ED", ED), ("ES", ES)):
        part = of_phase(table, frame)
        for name in (*METHODS, "outlines", "truth"):
            found = [{f"dice_{label}": value for label, value in entry.dice(name).items()} for entry in part]
            if name in METHODS:
                found = [entry.scores(name) | dice for entry, dice in zip(part, found, strict=True)]
            means = {measure: float(np.mean([one[measure] for one in found])) for measure in found[0]}
            rows.append({"phase": phase, "method": "ours" if name == "ideal" else name, "n": len(part)} | means)
    return rows


# ---- the claims -----------------------------------------------------------------------------------------------------


def row(target: str, ours: str, passed: bool, **values) -> dict:
    return {"target": target, "ours": ours, "passed": bool(passed), "values": values}


def claim_round_trip(options: Options, trained, rt) -> dict:
    """(A5) DDIM inversion and decoding of slices of hearts that the prior has never seen."""
    import torch

    from common import figures
    from mgdcr import diffusion, geometry, intensity, trainer

    data = cohort_of(options, CONDITIONS["ideal"])
    stacks = []
    for number in range(options.n_test):
        cine = geometry.load_sax(data / heart(number + 1) / "sax.nii.gz").data
        stacks.append(intensity.Scale.of(cine).normalise(cine).reshape(-1, 1, *cine.shape[-2:]))
    slices = np.concatenate(stacks)
    slices = torch.from_numpy(slices[trainer.evenly(len(slices), options.n_slices)]).to(rt.device)

    @torch.no_grad()
    def mean_psnr(steps: int, refine: int = 0) -> float:
        z, found = trained.model.encode(slices), []
        for x, code in zip(slices.split(8), z.split(8), strict=True):
            again = diffusion.decode(
                trained.model, diffusion.invert(trained.model, x, code, steps, refine=refine), code, steps
            )
            found += [trainer.psnr(a, b) for a, b in zip(again, x, strict=True)]
        return float(np.mean(found))

    def by_code() -> float:
        """Of slices decoded from their semantic code and fresh noise: what the code alone holds."""
        g = torch.Generator().manual_seed(options.seed)
        with torch.no_grad():
            again = diffusion.decode(trained.model, torch.randn(slices.shape, generator=g).to(rt.device),
                                     trained.model.encode(slices), 20)  # fmt: skip
        return float(np.mean([trainer.psnr(a, b) for a, b in zip(again, slices, strict=True)]))

    values = {steps: mean_psnr(steps) for steps in (10, 30, 100)}
    refined, code = mean_psnr(10, refine=2), by_code()
    steps = sorted(values)
    figures.curves(Path(options.out) / "figures" / "round_trip.png", {"": (steps, [values[s] for s in steps])},
                   xlabel="DDIM steps", ylabel="PSNR of the round trip (dB)")  # fmt: skip
    text = ", ".join(f"T={s} {values[s]:.1f}" for s in steps)
    return {
        "A5 inversion round trip of unseen slices": row(
            ">= 32 dB at T=30, >= 35 dB at T=100, more steps are better",
            f"{text}; T=10 with 2 fixed-point rounds {refined:.1f}; random x_T, code alone {code:.1f} dB",
            values[30] >= 32 and values[100] >= 35 and values[10] < values[30] < values[100],
            psnr_db=values, refined=refined, code_alone=code, n=len(slices),
        )
    }  # fmt: skip


def of_phase(table: list[Volumes], frame: int | None) -> list[Volumes]:
    return [entry for entry in table if frame in (None, entry.frame)]


def gains(table: list[Volumes], name: str) -> list[float]:
    return [entry.gain(name) for entry in table if name in entry.volumes]


def spread(values: list[float], unit: str = "dB") -> str:
    return f"{np.mean(values):+.2f} {unit} ({min(values):+.2f} to {max(values):+.2f}, n={len(values)})"


def claim_volumes(table: list[Volumes]) -> dict:
    """(A12) Three views add two decibels to the best interpolation, where no slice was acquired."""
    out = {}
    for title, frame in (("end-diastole", ED), ("end-systole", ES)):
        part = of_phase(table, frame)
        found = gains(part, "ideal")
        means = {name: float(np.mean([entry.psnr(name) for entry in part])) for name in part[0].volumes
                 if all(name in entry.volumes for entry in part)}  # fmt: skip
        text = ", ".join(f"{name} {means[name]:.1f}" for name in METHODS if name != "ideal")
        out[f"A12 {title}: ours over the best interpolation"] = row(
            ">= +2.0 dB", f"{spread(found)}; ours {means['ideal']:.2f} dB; {text}", np.mean(found) >= 2,
            gain_db=found, psnr_db=means,
        )  # fmt: skip
    return out


def claim_labels(table: list[Volumes]) -> dict:
    """(A13) Labels grown through our volume against interpolated outlines."""
    out = {}
    for part, wanted in (("lv", 0.02), ("myo", 0.03), ("rv", None)):
        names = ("ideal", "outlines", "linear", "truth")
        found = {name: [entry.dice(name)[part] for entry in table] for name in names}
        ours, theirs, linear, ceiling = (float(np.mean(values)) for values in found.values())
        text = (f"{ours - theirs:+.3f}: {ours:.3f} vs {theirs:.3f} (n={len(table)}); grown in a linear interpolation "
                f"{linear:.3f}, in the truth {ceiling:.3f}")  # fmt: skip
        out[f"A13 Dice {part.upper()} over interpolated outlines"] = row(
            f">= +{wanted}" if wanted else "(no target)", text, wanted is None or ours - theirs >= wanted, dice=found,
        )  # fmt: skip
    return out


def claim_robustness(table: list[Volumes]) -> dict:
    """(A14-A16) The gain over the best interpolation where the views are not ideal."""
    wanted = {
        "A14 contrast of the views: gain 1.25, offset 0.05": ("contrast", 1.5),
        "A15 views displaced by a pixel, alignment on": ("shift, aligned", 1.0),
        "A15 views displaced by a pixel, alignment off": ("shift", -0.1),
        "A16 noise in the views, SD 0.05": ("noise", 1.0),
        "A16 one view alone": ("one view", 0.5),
        "A16 no view": ("no view", -0.2),
    }
    out = {}
    for title, (name, least) in wanted.items():
        found = gains(table, name)
        out[title] = row(f">= {least:+.1f} dB", spread(found), np.mean(found) >= least, gain_db=found)
    return out


def claim_parts(table: list[Volumes]) -> dict:
    """(A17) What the views, the propagation of their residual and the schedule of the start codes are worth."""
    part = [entry for entry in table if "no view" in entry.volumes]
    views = [entry.psnr("ideal") - entry.psnr("no view") for entry in part]
    schedule = [entry.psnr("start") - entry.psnr("start legacy") for entry in part]
    published = [entry.psnr("diffae") - entry.psnr("diffae legacy") for entry in part]
    alone = gains(table, "ideal, not spread")
    prior = [entry.psnr("ideal") - entry.psnr("lax_residual") for entry in table]
    return {
        "A17 with views over without": row(">= +1.0 dB", spread(views), np.mean(views) >= 1, gain_db=views),
        "A17 start codes at j/f over the published schedule": row(
            ">= 0 dB, start images",
            f"{spread(schedule)}; with inverted noise codes, as published, {spread(published)}",
            np.mean(schedule) >= 0, seeds_db=schedule, inverted_db=published,
        ),
        "A17 the prior over spreading the views' residual alone": row(
            "> 0 dB (our own)", f"{spread(prior)}; without spreading it, over the best interpolation {spread(alone)}",
            np.mean(prior) > 0, over_lax_residual_db=prior, change_alone_db=alone,
        ),
    }  # fmt: skip


def claim_held_out_views(options: Options, table: list[Volumes]) -> dict:
    """(A18) Guided by two views, scored on the pixels of the third, between the acquired slices."""
    import torch

    from mgdcr import evaluate

    found = {"ours": {}, "cubic": {}, "linear": {}}
    for entry in table:
        if "without 4ch" not in entry.volumes:
            continue
        for view in study_of(options, entry.heart)[1](entry.frame).views:
            between = view.sampler.coordinates[:, 0].numpy() % FACTOR
            weights = (view.weights.numpy() > 0) * (np.minimum(between, FACTOR - between) >= 1)
            for method, name in (("ours", f"without {view.name}"), ("cubic", "cubic"), ("linear", "linear")):
                seen = view.sampler.sample(torch.from_numpy(np.ascontiguousarray(entry.volumes[name]))).numpy()
                score = evaluate.plane_scores(seen, view.values.numpy(), weights)["psnr_db"]
                found[method].setdefault(view.name, []).append(score)
    means = {view: {method: float(np.mean(found[method][view])) for method in found} for view in found["ours"]}
    text = "; ".join(f"{view} {m['ours']:.1f} vs cubic {m['cubic']:.1f}, linear {m['linear']:.1f} dB"
                     for view, m in means.items())  # fmt: skip
    passed = all(m["ours"] > m["cubic"] for m in means.values())
    return {
        "A18 withheld view, guided by the two others": row(
            "better than cubic on its plane", text, passed, psnr_db=means
        )
    }


def claim_cine(options: Options, rt) -> dict:
    """(A19, A20) All phases of one heart: ejection fraction with ED and ES found, and steadiness over time."""
    from common import figures
    from mgdcr import baselines, evaluate, geometry, indices

    out, name = Path(options.out), heart(1)
    data = make_cohort(out / "data" / "cine", 1, options.phases, TEST_SEED + options.seed)
    print("reconstruction: whole cine", flush=True)
    reconstruct(options, rt, data, out / "results" / "cine", [name], preset="fast", sweeps=1,
                iterations=options.cine_iterations)  # fmt: skip
    truth, maps = (geometry.load_cine(data / name / f"{file}.nii.gz") for file in ("dense", "labels"))
    ours = geometry.load_cine(out / "results" / "cine" / name / "volume.nii.gz").data
    labels, spacing = maps.data.round().astype(np.uint8), truth.grid.spacing_mm[::-1]
    grown = np.stack([indices.grow_labels(v, m[::FACTOR], FACTOR, spacing) for v, m in zip(ours, labels, strict=True)])
    outlines = np.stack([indices.interpolate_labels(m[::FACTOR], FACTOR) for m in labels])
    found = {"truth": indices.function(labels, spacing), "ours": indices.function(grown, spacing),
             "outlines": indices.function(outlines, spacing),
             "Simpson": indices.function(labels[:, ::FACTOR], (FACTOR * spacing[0], *spacing[1:]))}  # fmt: skip
    curves = {title: indices.volumes_ml(part, spacing)["lv"] for title, part in
              (("truth", labels), ("ours", grown), ("interpolated outlines", outlines))}  # fmt: skip
    figures.curves(out / "figures" / "volume_curve.png", {t: (np.arange(len(v)), v) for t, v in curves.items()},
                   xlabel="frame", ylabel="left ventricular cavity (ml)", title="one heart beat")  # fmt: skip
    linear = np.stack([baselines.interpolate(v[::FACTOR], FACTOR, "linear") for v in truth.data])
    jitter = {title: evaluate.jitter(v) for title, v in (("truth", truth.data), ("ours", ours), ("linear", linear))}
    true, own = found["truth"], found["ours"]
    ef, edv = 100 * (own["ef"] - true["ef"]), 100 * (own["edv_ml"] / true["edv_ml"] - 1)
    frames = f"ED {own['ed_frame']}, ES {own['es_frame']} (truth {true['ed_frame']}, {true['es_frame']})"
    others = "; ".join(f"{title}: EF {100 * (found[title]['ef'] - true['ef']):+.1f}, "
                       f"EDV {100 * (found[title]['edv_ml'] / true['edv_ml'] - 1):+.1f} %"
                       for title in ("outlines", "Simpson"))  # fmt: skip
    ratio = jitter["ours"] / jitter["truth"]
    return {
        f"A19 EF over {options.phases} phases": row(
            "EF within 2 points, EDV within 4 %, ED and ES found",
            f"EF {ef:+.1f} points, EDV {edv:+.1f} %, {frames}; {others}",
            abs(ef) <= 2 and abs(edv) <= 4 and own["ed_frame"] == true["ed_frame"]
            and own["es_frame"] == true["es_frame"], indices=found,
        ),
        "A20 jitter over time": row(
            "<= 1.2 times the truth's", f"{ratio:.2f} times; linear {jitter['linear'] / jitter['truth']:.2f}",
            ratio <= 1.2, jitter=jitter,
        ),
    }  # fmt: skip


# ---- pictures and output --------------------------------------------------------------------------------------------


def draw(options: Options, table: list[Volumes]) -> None:
    """figures/volumes_{ed,es}.png: a long-axis cut and a slice halfway between acquired ones; figures/gains.png."""
    from matplotlib.figure import Figure

    from common import figures

    shown = ("truth", "linear", "cubic", "diffae", "lax_residual", "ours")
    for entry, phase in zip(table[:2], ("ed", "es"), strict=True):
        pictures = entry.volumes | {"truth": entry.truth, "ours": entry.volumes["ideal"]}
        fig = Figure(figsize=(2.0 * len(shown), 6.4), layout="constrained")
        axes = fig.subplots(4, len(shown))
        for column, name in enumerate(shown):
            volume = pictures[name]
            cuts = volume[:, 32], volume[4 + FACTOR * 4]  # along the axis; halfway between two acquired slices
            others = entry.truth[:, 32], entry.truth[4 + FACTOR * 4]
            for i, (cut, other) in enumerate(zip(cuts, others, strict=True)):
                aspect = 0.5 if i == 0 else 1.0  # voxels of 1 x 2 mm, and of 2 x 2 mm
                axes[2 * i, column].imshow(cut, cmap="gray", vmin=0, vmax=1, aspect=aspect)
                axes[2 * i + 1, column].imshow(cut - other, cmap="RdBu_r", vmin=-0.4, vmax=0.4, aspect=aspect)
            score = "" if name == "truth" else f"\n{entry.psnr('ideal' if name == 'ours' else name):.1f} dB"
            axes[0, column].set_title(name + score, fontsize=9)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
        figures.save(fig, Path(options.out) / "figures" / f"volumes_{phase}.png")
    fig = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = fig.subplots()
    names = ["lax_residual", *CONDITIONS]
    values = [gains(table, name) for name in names]
    ax.barh(range(len(names)), [np.mean(v) for v in values], color="0.75")
    for i, v in enumerate(values):
        ax.plot(v, [i] * len(v), "k.", markersize=3)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="k", linewidth=0.8)
    ax.set_xlabel("dB over the best interpolation, slices that were not acquired", fontsize=8)
    figures.save(fig, Path(options.out) / "figures" / "gains.png")


def finish(options: Options, results: dict, methods: list[dict], table: list[Volumes], seconds: float,
           revision: str | None) -> None:  # fmt: skip
    """results.json, scores.csv and both tables."""
    from common import tables
    from common.runlog import write_json

    out = Path(options.out)
    rows = [
        {"subject": entry.heart, "frame": entry.frame, "method": name} | entry.scores(name)
        for entry in table for name in entry.volumes
    ]  # fmt: skip
    tables.write_csv(out / "scores.csv", rows, digits=6)
    record = {"options": cli.to_dict(options), "git_revision": revision, "seconds": round(seconds), "data": "phantom",
              "methods": methods, "claims": results}  # fmt: skip
    write_json(out / "results.json", json.loads(json.dumps(record, default=float)))
    print(f"\n{'':16s}" + "".join(f"{measure:>10s}" for measure in MEASURES))
    for entry in methods:
        values = "".join(f"{entry[m]:10.3f}" if m in entry else f"{'-':>10s}" for m in MEASURES)
        print(f"{entry['phase']} {entry['method']:13s}{values}")
    print(f"\n{'claim':58s}{'result':8s}ours on the phantom\n")
    for name, entry in results.items():
        print(f"{name:58s}{'pass' if entry['passed'] else 'FAIL':8s}{entry['ours']}")
        print(f"{'':66s}target: {entry['target']}")
    print(f"\nresults.json, scores.csv and figures/ in {out}; {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
