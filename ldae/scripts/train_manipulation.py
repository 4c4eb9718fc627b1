"""Linear probes of the semantic codes and the directions to edit along, with intervals, controls and a held-out test.

    python ldae/scripts/train_manipulation.py                                   # AD against CN, positive class AD
    python ldae/scripts/train_manipulation.py --targets diagnosis age sex       # three probes
    python ldae/scripts/train_manipulation.py --train_on_age                    # age alone, as the original's switch
    python ldae/scripts/train_manipulation.py --target_classes AD MCI CN        # three classes
    python ldae/scripts/train_manipulation.py --remove age                      # without the linear effect of age
    python ldae/scripts/train_manipulation.py --import_probe MODEL MEAN STD     # the original's probe as a direction

Reads ROOT/codes (save_semantic_latent.py), compares with the controls below it, writes ROOT/probes/<target>.json (all
numbers), .md (table), .csv (prediction of every scan), .png, and .npz, which `generate.py manipulate` reads (<target>
the probe's direction, <target>_means the difference of the class means). Cross-validation runs on train and val; the
test split is judged once. A probe takes seconds to a minute, on one CPU core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")
PRESETS = {
    "paper": {},
    "tiny": dict(repeats=3, permutations=10, bootstrap=1000),
    "smoke": dict(repeats=3, permutations=10, bootstrap=1000),  # design.md's name of it
}


@dataclass
class Options(CommonOptions):
    preset: str = option("paper", "named set of option values, applied before the other options")

    root: str = option(str(HERE), "study folder that default paths hang off", group="paths")
    codes: str = option("", "folder of codes; empty: ROOT/codes", group="paths")
    controls: tuple[str, ...] = option((), "folders of control codes; none given: those in CODES/controls; 'none': no "
                                           "controls", group="paths")  # fmt: skip
    output_dir: str = option("", "folder of the results; empty: ROOT/probes", group="paths")
    suffix: str = option("", "added to the names of the results", group="paths")
    train_path: str = option("", "embedding file of the original instead of --codes: training subjects", group="paths")
    test_path: str = option("", "embedding file of the original: test subjects", group="paths")
    embeddings_dim: int = option(0, "expected width of the codes, refused if it is another; 0: any", group="paths")
    trust_pickle: bool = option(False, "allow embedding files that need pickle; it can run code", group="paths")
    overwrite: bool = option(False, "replace earlier results of the same name", group="paths")

    targets: tuple[str, ...] = option(("diagnosis",), "what is predicted", choices=("diagnosis", "age", "sex"),
                                      group="target")  # fmt: skip
    train_on_age: bool = option(False, "the same as --targets age", group="target")
    target_classes: tuple[str, ...] = option(("AD", "CN"), "diagnoses to tell apart: names or alphabetical ranks (0 1)",
                                             group="target")  # fmt: skip
    positive: str = option("", "positive class of two; empty: AD if it takes part, else the first", group="target")
    diagnoses: tuple[str, ...] = option((), "only scans of these diagnoses take part (age, sex); none given: all",
                                        group="target")  # fmt: skip
    train_on_baseline_sessions: bool = option(False, "the first session of each subject only", group="target")
    remove: tuple[str, ...] = option((), "covariates whose linear effect is taken out of the codes, inside every "
                                         "training fold", choices=("age", "sex", "session", "diagnosis"),
                                     group="target")  # fmt: skip

    skip_training: bool = option(False, "judge the directions that are there on the test split instead", group="fit")
    import_probe: tuple[str, ...] = option((), "three files of the original's probe (weights, mean, SD): written as a "
                                               "direction; its positive class is CN", group="fit")  # fmt: skip
    cv_splits: tuple[str, ...] = option(("train", "val"), "splits that are cross-validated and fitted; the others are "
                                                          "the held-out test", choices=SPLITS, group="fit")  # fmt: skip
    folds: int = option(5, "folds of the cross-validation by subject; fewer where a class has fewer", group="fit")
    repeats: int = option(5, "repeats with other folds", group="fit")
    inner_folds: int = option(3, "folds inside the training rows, for the choice of the penalty", group="fit")
    strengths: tuple[float, ...] = option((1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2), "L2 penalties per training row, of which "
                                          "the best is chosen", group="fit")  # fmt: skip
    class_weight: str = option("none", "balanced: classes count alike, whatever their numbers",
                               choices=("none", "balanced"), group="fit")  # fmt: skip
    epochs: int = option(2000, "most iterations of the logistic regression's solver, which stops when it has converged "
                               "(the original: epochs of Adam)", group="fit")  # fmt: skip
    permutations: int = option(20, "runs with permuted subjects, the control for chance; 0: none", group="fit")
    bootstrap: int = option(2000, "resamples of subjects for the intervals", group="fit")

    def __post_init__(self):
        if self.folds < 2 or self.inner_folds < 2:
            raise UserError("--folds and --inner_folds must be at least 2")
        if min(self.repeats, self.epochs, self.bootstrap) < 1 or min(self.permutations, self.embeddings_dim) < 0:
            raise UserError("--repeats, --epochs and --bootstrap must be at least 1, --permutations 0 or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: seeds are 0 or more")
        if not self.strengths or min(self.strengths) <= 0:
            raise UserError("--strengths: give positive penalties")
        if self.import_probe and len(self.import_probe) != 3:
            raise UserError("--import_probe: give three files, weights, mean and SD")
        self.targets = ("age",) if self.train_on_age else tuple(dict.fromkeys(self.targets))
        if set(self.remove) & set(self.targets):
            raise UserError(f"--remove {' '.join(self.remove)}: what is predicted cannot be removed")
        self.codes = self.codes or str(Path(self.root) / "codes")
        self.output_dir = self.output_dir or str(Path(self.root) / "probes")


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    if options.import_probe:
        import_probe(options)
    elif options.skip_training:
        judge(options)
    else:
        train(options)


def train(options: Options) -> dict[str, Path]:
    """Fit and judge the probe of every target; returns {target: record file}."""
    from ldae import probes

    # ---- setup: everything the user can get wrong, before anything is fitted
    found, controls = open_codes(options), open_controls(options)
    if options.positive and not any(options.positive in found.column(target) for target in options.targets):
        raise UserError(f"--positive {options.positive}: no scan has this {' or '.join(options.targets)}")
    tasks = {target: make_task(options, found, target) for target in options.targets}
    for task in tasks.values():
        refuse_existing(options, Path(options.output_dir) / f"{task.name}.json")
        for control in controls.values():
            task.with_values(control)
    settings = probes.Settings(
        folds=options.folds, repeats=options.repeats, inner_folds=options.inner_folds, strengths=options.strengths,
        iterations=options.epochs, class_weight=None if options.class_weight == "none" else options.class_weight,
        permutations=options.permutations, bootstrap=options.bootstrap, seed=options.seed,
    )  # fmt: skip

    # ---- fit, judge, write
    paths = {}
    for target, task in tasks.items():
        result = probes.run(task, controls, settings, cv_splits=options.cv_splits)
        paths[target] = probes.write(Path(options.output_dir), result)
        print(f"{probes.table(result.record)}\nwritten to {paths[target].with_suffix('')}.*")
    return paths


def open_codes(options: Options):
    """The codes of the folder, or of the original's files."""
    from ldae import codes

    if options.train_path or options.test_path:
        files = {"train": options.train_path, "test": options.test_path}
        files = {split: Path(path) for split, path in files.items() if path}
        found = codes.import_embeddings(files, ("AD", "CN", "MCI"), trust_pickle=options.trust_pickle)
    else:
        found = codes.load(Path(options.codes))
    if options.embeddings_dim not in (0, found.code_dim):
        raise UserError(f"the codes have {found.code_dim} numbers, not --embeddings_dim {options.embeddings_dim}; name "
                        "other codes")  # fmt: skip
    return found


def open_controls(options: Options) -> dict:
    """{name: codes} of the controls."""
    from ldae import codes

    if options.controls == ("none",) or options.train_path or options.test_path:
        return {}
    folders = [Path(folder) for folder in options.controls]
    folders = folders or sorted(path.parent for path in Path(options.codes).glob("controls/*/codes.json"))
    return {control.name: control for control in map(codes.load, folders)}


def make_task(options: Options, found, target: str):
    """The rows and values of one target."""
    from dataclasses import replace

    from ldae import probes

    classes = class_names(options, found) if target == "diagnosis" else ()
    positive = options.positive if options.positive in found.column(target) else ""
    if target == "diagnosis" and not positive and "AD" in classes:
        positive = "AD"
    task = probes.make_task(found, target, classes=classes, positive=positive, diagnoses=options.diagnoses,
                            baseline_only=options.train_on_baseline_sessions, nuisance=options.remove)  # fmt: skip
    return replace(task, suffix=options.suffix)


def class_names(options: Options, found) -> tuple[str, ...]:
    """--target_classes as names; a number is the alphabetical rank among the diagnoses, as in the original."""
    names = sorted({row.diagnosis for row in found.rows if row.diagnosis})
    chosen = [names[int(c)] if c.isdigit() and int(c) < len(names) else c for c in options.target_classes]
    return tuple(dict.fromkeys(chosen))


def refuse_existing(options: Options, path: Path) -> None:
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} is there already; name another --output_dir or --suffix, or add --overwrite")


def judge(options: Options) -> dict[str, Path]:
    """Judge the directions that are there on the rows outside --cv_splits; returns {target: record file}."""
    import numpy as np
    import torch

    from common.runlog import write_json
    from ldae import probes
    from ldae.manipulation import Direction

    found, paths = open_codes(options), {}
    for target in options.targets:
        task = make_task(options, found, target)
        if task.kind == "multiclass":
            raise UserError("--skip_training judges directions of two classes or of age; name two --target_classes")
        path = Path(options.output_dir) / f"{task.name}_test.json"
        refuse_existing(options, path)
        direction = Direction.load(Path(options.output_dir) / task.name)
        if direction.code_dim != found.code_dim:
            raise UserError(f"the direction {direction.name} is for codes of {direction.code_dim} numbers, these have "
                            f"{found.code_dim}; name other --codes")  # fmt: skip
        test = task.select(~np.isin(found_splits(task), options.cv_splits))
        if not len(test.y):
            raise UserError(f"no scan with a known {target} is outside --cv_splits {' '.join(options.cv_splits)}")
        nuisance = None if test.nuisance is None else torch.from_numpy(test.nuisance)
        scores = direction.score(torch.from_numpy(test.codes.values).double(), nuisance).numpy()[:, None]
        settings = probes.Settings(bootstrap=options.bootstrap, seed=options.seed)
        record = {"direction": direction.name, "codes": direction.codes, "positive": task.positive}
        record |= probes.held_out(test, scores, settings)
        write_json(path, record)
        print(f"{direction.name}: {task.headline} {probes.one_line(task, record['metrics'])} ({len(test.y)} scans)")
        paths[target] = path
    return paths


def found_splits(task):
    return task.codes.column("split").astype(str)


def import_probe(options: Options) -> Path:
    """The original's probe files as PROBES/diagnosis_CN_vs_AD.npz."""
    from ldae import manipulation

    direction = manipulation.from_original(*map(Path, options.import_probe))
    path = Path(options.output_dir) / f"{direction.name}{'_' * bool(options.suffix)}{options.suffix}.npz"
    refuse_existing(options, path)
    direction.save(path)
    print(f"direction of {direction.code_dim} numbers, positive class {direction.positive}, written to {path}")
    return path


if __name__ == "__main__":
    cli.run(main)
