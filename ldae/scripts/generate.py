"""NIfTI in, NIfTI out: reconstruct, vary, interpolate, edit and invent scans with a trained LDAE.

    python ldae/scripts/generate.py reconstruct --max_scans 4                       # test scans of the study
    python ldae/scripts/generate.py reconstruct --input a.nii.gz b.nii.gz           # any files, no table
    python ldae/scripts/generate.py vary --scans sub-0001_M000 --n 4                # one y, fresh z_T
    python ldae/scripts/generate.py interpolate --scans sub-0001_M000 sub-0001_M012 --alphas 0 0.5 1
    python ldae/scripts/generate.py interpolate --subject sub-0001 --sessions 0 12
    python ldae/scripts/generate.py manipulate --direction probes/diagnosis_AD_vs_CN --amounts -4 -2 2 4
    python ldae/scripts/generate.py manipulate --direction probes/diagnosis_AD_vs_CN --keep probes/age probes/sex_F_vs_M
    python ldae/scripts/generate.py manipulate --direction probes/age --unit years --amounts -10 10
    python ldae/scripts/generate.py synthesize --n 8                                # nobody: y from its own prior

`generate.py MODE --help` lists a mode's options. Every output is OUT/NAME.nii.gz on the grid, with the affine and in
the intensity units of its input (--grid model: the prepared grid), with a picture NAME.png and a sidecar NAME.json of
what made it. OUT is ROOT/generated/MODE. The same command again makes what is missing; other settings are refused
without --overwrite. The same seed gives the same bytes (on a CPU) whatever the batch and the other outputs. Under
torchrun scans are shared out. A few seconds per volume on a GPU; at the tiny preset also on a CPU.

y and z_T together reconstruct a person's anatomy: treat codes like the scans themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import UserError
from ldae.scripts.config import MODES, PRESETS, InputOptions, Interpolate, Manipulate, Reconstruct, Synthesize, Vary

INPUT_HASHES = ("input_hash", "second_input_hash")  # entries of a sidecar
WHAT = {"aekl": "autoencoder alone", "y_only": "y only, fixed noise", "encoded": "y and encoded z_T"}


def main() -> None:
    options = parse(sys.argv[1:])
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        generate(options, rt)


def parse(argv: list[str]):
    """Options of the mode that a command line names; --help and mistakes leave the program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: generate.py {{{','.join(MODES)}}} [options], generate.py MODE --help\n\n{__doc__}")
        for mode, options in MODES.items():
            print(f"    {mode:12} {options.__doc__}")
        sys.exit(0)
    if argv[0] not in MODES:
        raise UserError(f"{argv[0]!r}: the first word is one of {', '.join(MODES)}")
    options = MODES[argv[0]]
    return cli.parse(options, argv[1:], description=f"{options.__doc__}\n\n{__doc__}", presets=PRESETS)


def generate(options, rt) -> list[str]:
    """Write the outputs of one mode; returns their names. Finished ones are kept; ranks share the scans."""
    from ldae import generation

    work = Work(options, generation.load_model(options, rt), rt)
    names = {"reconstruct": reconstruct, "vary": vary, "interpolate": interpolate, "manipulate": manipulate,
             "synthesize": synthesize}[options.mode](options, work)  # fmt: skip
    rt.barrier()
    rt.print(f"{len(names)} volumes in {options.output_dir} ({work.written} new on this rank)")
    return names


class Work:
    """What every mode does alike: claim the folder, go through the scans with a progress bar, write outputs."""

    def __init__(self, options, ldae, rt):
        from ldae import dataset, generation

        self.options, self.ldae, self.rt = options, ldae, rt
        self.out, self.written = Path(options.output_dir), 0
        self.about = generation.about_model(ldae)
        if isinstance(options, InputOptions):
            self.volumes = dataset.Volumes(ldae.preparation, None if options.input else options.cache_folder)

    def rows(self):
        """The chosen scans."""
        from ldae import generation

        if self.options.input:
            return generation.rows_of_files(self.options.input)
        return generation.select_rows(self.options, self.ldae, self.options.scans)

    def units(self, files: dict[str, object], what: str, rows=None, reports=(), **settings):
        """Claims {output name: its unit} and yields (unit, names that are missing) of this rank's units.

        rows: {unit: the scans that it is made of}. reports: names of further JSON and PNG files, which go when their
        settings are replaced.
        """
        from common.runlog import progress
        from ldae import generation

        shared = ("mode", "steps", "sampler", "seed", "precision", "grid")
        self.settings = {name: getattr(self.options, name) for name in shared if hasattr(self.options, name)} | settings
        record, written = self.about | self.settings, [*files, *reports]
        inputs = {name: dict(zip(INPUT_HASHES, (row.path for row in rows[unit]), strict=False))
                  for name, unit in files.items()} if rows else {}  # fmt: skip
        generation.claim_folder(self.out, record, written, self.options.overwrite, self.rt, inputs)
        todo = {}
        for name, unit in files.items():
            if not generation.is_finished(self.out, name):
                todo.setdefault(unit, []).append(name)
        self.rt.barrier()  # every rank has seen the same files before any is added
        mine = self.rt.shard(list(todo))
        with progress(len(mine), 0, what, enabled=self.rt.is_main) as bar:
            for unit in mine:
                yield unit, todo[unit]
                bar.update()

    def encode(self, row, *, z_T: bool = True):
        from ldae import generation

        return generation.encode(self.ldae, self.volumes.tensor(row), self.options.steps if z_T else 0)

    def save(self, name, x, record, *, row=None, affine=None, compare=None):
        """Write one output; with `row` on the grid of that scan if --grid says so."""
        from common import checkpoint
        from ldae import generation, preprocess

        native = None
        if row is not None:
            source = self.volumes.native(row)
            plan = preprocess.plan(source, self.ldae.preparation)
            affine, native = plan.prepared_affine, source if self.options.grid == "native" else None
            about = {"scan": row.scan, "input": row.path.name, INPUT_HASHES[0]: checkpoint.file_hash(row.path)}
            record = about | {"prepared": plan.to_dict()} | record
        generation.save_output(self.out, name, x, self.about | self.settings | record, self.ldae.preparation,
                               affine=affine, native=native, compare=compare)  # fmt: skip
        self.written += 1


def reconstruct(options: Reconstruct, work: Work) -> list[str]:
    from ldae import evaluation, generation

    rows = {row.scan: row for row in work.rows()}
    files = {f"{scan}_{kind}": scan for scan in rows for kind in options.kinds}
    for scan, names in work.units(files, "reconstruct", {scan: [row] for scan, row in rows.items()}):
        kinds = [name.removeprefix(f"{scan}_") for name in names]
        codes = work.encode(rows[scan], z_T="encoded" in kinds)
        made = generation.reconstruct(work.ldae, codes, scan, kinds, options.seed, options.steps, options.sampler)
        target = codes.x[0, 0].numpy()
        for kind, x in made.items():
            found = evaluation.image_metrics(x, target, upstream=options.preset == "upstream")
            record = {"what": WHAT[kind], "metrics": found, "definitions": evaluation.definitions(found)}
            if kind == "encoded":
                record["z_T"] = evaluation.noise_statistics(codes.z_T[0].cpu())
            work.save(f"{scan}_{kind}", x, record, row=rows[scan], compare={"scan": target})
    return list(files)


def vary(options: Vary, work: Work) -> list[str]:
    from ldae import evaluation, generation

    rows = {row.scan: row for row in work.rows()}
    files = {f"{scan}_vary_{number:03d}": scan for scan in rows for number in range(options.n)}
    for scan, names in work.units(files, "vary", {scan: [row] for scan, row in rows.items()}):
        codes, target = work.encode(rows[scan], z_T=False), work.volumes.load(rows[scan])
        numbers = [int(name.rpartition("_")[2]) for name in names]
        made = generation.vary(work.ldae, codes, scan, numbers, options.seed, options.steps, options.sampler,
                               options.batch_size)  # fmt: skip
        for number, x in made:
            found = evaluation.image_metrics(x, target)
            record = {"what": f"variation {number}", "number": number, "metrics": found,
                      "definitions": evaluation.definitions(found)}  # fmt: skip
            work.save(f"{scan}_vary_{number:03d}", x, record, row=rows[scan], compare={"scan": target})
    return list(files)


def interpolate(options: Interpolate, work: Work) -> list[str]:
    from common import checkpoint
    from ldae import generation

    first, second = two_sessions(options) if options.subject else work.rows()
    pair = f"{first.scan}_to_{second.scan}"
    alphas = {f"{pair}_{alpha:g}": alpha for alpha in options.alphas}
    how = {"noise_path": options.noise_path, "mix": options.mix}
    for _, names in work.units(dict.fromkeys(alphas, pair), "interpolate", {pair: (first, second)}, **how):
        codes = [work.encode(row) for row in (first, second)]
        made = generation.interpolate(work.ldae, *codes, [alphas[name] for name in names], options.steps,
                                      batch=options.batch_size, **how)  # fmt: skip
        ends = {row.scan: work.volumes.load(row) for row in (first, second)}
        for name, (alpha, x) in zip(names, made, strict=True):
            record = {"what": f"alpha {alpha:g}", "alpha": alpha, "second_scan": second.scan,
                      "second_input": second.path.name, INPUT_HASHES[1]: checkpoint.file_hash(second.path),
                      "grid_of": first.scan}  # fmt: skip
            work.save(name, x, record, row=first, compare=ends)
    return list(alphas)


def two_sessions(options: Interpolate):
    """The two rows of --subject at --sessions (or its first and last)."""
    from ldae import dataset, interpolation

    rows = [row for row in dataset.read_table(options.csv_path) if row.subject == options.subject]
    if not rows:
        raise UserError(f"no subject {options.subject} in {options.csv_path}; correct --subject")
    months, _ = interpolation.session_table(rows)
    months = months[options.subject]
    wanted = options.sessions or (min(months, default=-1), max(months, default=-1))
    if len(months) < 2 or wanted[0] == wanted[1] or any(month not in months for month in wanted):
        shown = ", ".join(map(str, months)) or "none"
        raise UserError(f"subject {options.subject} has sessions {shown} (months); name two of them with --sessions")
    return [months[month] for month in wanted]


def manipulate(options: Manipulate, work: Work) -> list[str]:
    import numpy as np

    from ldae import generation, manipulation

    direction, *kept = (load_direction(name, options, work) for name in (options.direction, *options.keep))
    if kept:
        direction = direction.without(*kept)
    unit = options.unit or direction.unit
    direction.convert(1.0, unit, "sd")  # says so now if the direction has no such unit
    if options.target_probability and direction.kind != "binary" or options.target_age and direction.kind == "binary":
        raise UserError(f"the direction {direction.name} is in {direction.unit}: give "
                        + ("--target_probability" if direction.kind == "binary" else "--target_age"))  # fmt: skip
    target = options.target_probability or options.target_age
    doses = {f"{amount:+g}_{unit}": amount for amount in options.amounts} | ({f"to_{target:g}": None} if target else {})
    if not doses:
        raise UserError("--amounts: give at least one size, or a target")
    rows = {row.scan: row for row in work.rows()}
    stems = {scan: f"{scan}_{direction.name}" for scan in rows}
    files = {f"{stems[scan]}_{dose}": scan for scan in rows for dose in ("unedited", *doses)}
    settings = {"direction": direction.name, "probe_codes": direction.codes, "unit": unit,
                "amounts": list(options.amounts), "target": target, "labels": Path(options.labels).name}  # fmt: skip
    reports = [f"{stem}_report" for stem in stems.values()]
    inputs = {scan: [row] for scan, row in rows.items()}
    for scan, _ in work.units(files, "manipulate", inputs, reports, **settings):
        row, stem = rows[scan], stems[scan]
        codes = work.encode(row)
        y = codes.y[0].cpu()
        amounts = [direction.convert(float(direction.amount_for(y[None], target)), direction.unit, unit)
                   if amount is None else amount for amount in doses.values()]  # fmt: skip
        edited = direction.edit(y[None].expand(len(amounts), -1), np.array(amounts), unit)
        all_codes = np.concatenate([y[None].numpy(), edited.numpy()])
        all_codes = to_device(all_codes, work)
        volumes = list(generation.manipulate(work.ldae, codes, all_codes, options.steps, options.batch_size))
        again = [work.ldae.semantic(to_device(x[None, None], work))[0].cpu() for x in volumes]
        edits = [manipulation.Edit(amount, code, x, read) for amount, code, x, read in
                 zip(amounts, edited, volumes[1:], again[1:], strict=True)]  # fmt: skip
        report = manipulation.counterfactual_report(
            work.out / f"{stem}_report", direction=direction, y=y, original=volumes[0], edits=edits,
            affine=work.volumes.affine(row), unit=unit, scan=scan, model=work.ldae.hash, steps=options.steps,
            **label_map(options, work, row),
        )  # fmt: skip
        shared = {key: report[key] for key in ("direction", "positive", "prediction_is", "unit", "unit_in_sd")}
        entries = [report["original"] | {"amount": 0.0}, *report["edits"]]
        for dose, x, entry in zip(("unedited", *doses), volumes, entries, strict=True):
            compare = {"scan": codes.x[0, 0].numpy()} if dose == "unedited" else {"unedited": volumes[0]}
            record = {"what": dose, "edit": entry, "unedited": report["original"]} | shared
            work.save(f"{stem}_{dose}", x, record, row=row, compare=compare)
    return list(files)


def load_direction(name: str, options: Manipulate, work: Work):
    """The direction of a file NAME, below ROOT or as it stands; UserError if it is of codes of another model."""
    from ldae import manipulation

    below = Path(options.root) / name
    direction = manipulation.Direction.load(below if manipulation.npz_path(below).is_file() else Path(name))
    direction.check_encoder(work.ldae.hash)
    return direction


def to_device(array, work: Work):
    import torch

    return torch.from_numpy(array).float().to(work.rt.device)


def label_map(options: Manipulate, work: Work, row) -> dict:
    """The scan's label map on the prepared grid and the names of its regions, for the report."""
    import json

    from common import nifti

    if not options.labels:
        return {}
    prep, path = work.ldae.preparation, Path(options.labels) / f"{row.scan}.nii.gz"
    labels = nifti.load_labels(path)
    if labels.shape != nifti.header(row.path)[0]:
        raise UserError(f"label map {path} has shape {labels.shape}, its scan another; make it on the scan's grid")
    names = None
    if options.label_names:
        try:
            names = json.loads(Path(options.label_names).read_text())
            names = {region: code if isinstance(code, list) else [code]
                     for region, code in names.get("label_codes", names).items()}  # fmt: skip
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--label_names {options.label_names} is no JSON object of names ({error})") from error
    return {"labels": nifti.resample_to(labels, prep.shape, work.volumes.affine(row), order=0).data, "names": names}


def synthesize(options: Synthesize, work: Work) -> list[str]:
    import numpy as np

    from ldae import code_prior, dataset, generation

    prior = code_prior.load_code_prior(Path(options.code_prior), work.rt, work.ldae)
    affine = generation.centred_affine(work.ldae.preparation)
    if options.like:  # where its prepared grid lies, not its own
        (like,) = generation.rows_of_files([options.like], "--like")
        affine = dataset.Volumes(work.ldae.preparation, None).affine(like)
    affine = np.asarray(affine, np.float64)
    files = {f"synthetic_{number:05d}": number for number in range(options.n)}
    settings = {"code_prior": prior.hash, "code_steps": options.code_steps, "affine": affine.tolist()}
    for number, names in work.units(files, "synthesize", **settings):
        y = prior.sample(1, options.seed, first=number, steps=options.code_steps)
        z_T = work.ldae.noise([["synthesize", number]], options.seed)
        x = next(generation.decode(work.ldae, z_T, y, options.steps, options.sampler))
        work.save(names[0], x, {"what": "synthetic", "number": number}, affine=affine)
    return list(files)


if __name__ == "__main__":
    cli.run(main)
