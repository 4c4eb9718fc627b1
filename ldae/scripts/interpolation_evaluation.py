"""Does LDAE predict a session from an earlier and a later one, and better than doing nothing?

    python ldae/scripts/interpolation_evaluation.py                            # the study's test subjects
    python ldae/scripts/interpolation_evaluation.py --model_path MODEL --csv_path TABLE --part all --output_dir OUT

Of every subject with three or more sessions each session between two others is predicted: LERP on y, SLERP on z_T,
alpha the fraction of the months. Predictions are compared with the scan of that session, over the volume and in the
head, beside copying the nearer scan, blending voxels, blending autoencoder latents, and what the autoencoder alone
costs. The original compares with the autoencoder's decode of the target: that row is there too, named as such. The
table needs sessions (a column, or ses-M006 in the paths); scans without one are named and left out.

Writes OUT/interpolation_results.csv (a row per prediction and method), by_{time_gap,prediction_gap,position}.csv,
interpolation.json (with paired differences, intervals drawn by subject), interpolation.md, figures and an example. The
same command again continues; under torchrun subjects are shared out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import UserError
from ldae.scripts.config import PRESETS, InterpolationOptions


def main() -> None:
    options = cli.parse(InterpolationOptions, description=__doc__, presets=PRESETS)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        evaluate(options, rt)


def evaluate(options: InterpolationOptions, rt) -> dict | None:
    """Write the evaluation of the chosen subjects; returns the content of interpolation.json (rank 0)."""
    from common.runlog import progress
    from ldae import dataset, evaluation, generation, interpolation

    # ---- setup
    out = Path(options.output_dir)
    ldae = generation.load_model(options, rt)
    table, problems = interpolation.session_table(generation.select_rows(options, ldae))
    triples = interpolation.triples(table, options.min_sessions)
    if not triples:
        named = f"; {'; '.join(problems[:3])}" if problems else ""
        raise UserError(f"{options.csv_path}: none of {len(table)} subjects ({options.part}) has "
                        f"{options.min_sessions} sessions{named}; give longitudinal scans, or --part all")  # fmt: skip
    subjects = list(dict.fromkeys(triple.subject for triple in triples))[: options.max_subjects or None]
    problems += [f"subject {subject}: {len(months)} sessions, fewer than {options.min_sessions}"
                 for subject, months in table.items() if len(months) < options.min_sessions]  # fmt: skip
    for problem in problems:
        rt.print(f"left out: {problem}")
    settings = ("steps", "noise_path", "min_sessions", "seed", "precision", "preset")
    about = generation.about_model(ldae) | {"options": {name: getattr(options, name) for name in settings}}
    records = evaluation.Records(out, about, options.overwrite, rt)
    volumes = dataset.Volumes(ldae.preparation, options.cache_folder)
    by_subject = {subject: [triple for triple in triples if triple.subject == subject] for subject in subjects}
    keys = {subject: key(table[subject], by_subject[subject]) for subject in subjects}

    # ---- loop over subjects
    mine = rt.shard([subject for subject in subjects if keys[subject] not in records.done])
    with progress(len(mine), 0, "interpolate", enabled=rt.is_main) as bar:
        for subject in mine:
            found = measure(options, ldae, volumes, table[subject], by_subject[subject])
            records.add(keys[subject], found)
            bar.update()

    # ---- finish
    rows = records.collect(keys[subject] for subject in subjects)
    result = None
    if rt.is_main:
        about |= {"part": options.part, "left_out": problems}
        result = interpolation.write_report(out, rows, about, options.seed)
        draw_example(options, ldae, volumes, table, by_subject[subjects[0]][0])
        for line in interpolation.report_text(result):
            rt.print(line)
        rt.print(f"written to {out}")
    rt.barrier()
    return result


def key(months: dict, triples) -> str:
    """Name of a subject's measurements: other sessions, or other scans of them, are other measurements."""
    from ldae.dataset import fingerprint

    rows = list(months.values())
    return f"{rows[0].scan.rpartition('_M')[0]}_{fingerprint(rows)}_{len(triples)}"


def predictions(options, ldae, codes: dict, decoded: dict, triple) -> dict:
    """{method: volume (D, H, W)} of one triple; codes and autoencoder decodes by month."""
    from ldae import generation, interpolation

    first, second, alpha = codes[triple.start], codes[triple.end], triple.alpha
    ends = [alpha, float(triple.nearest == triple.end)]
    model = generation.interpolate(ldae, first, second, ends, options.steps, noise_path=options.noise_path)
    (_, middle), (_, nearest) = model
    blend = interpolation.lerp(first.z_0, second.z_0, alpha)
    copy = codes[triple.nearest].x[0, 0].numpy()
    return {
        "ldae": middle,
        "ldae_change": (copy + middle - nearest).clip(min=0),
        "copy_nearest": copy,
        "voxel_blend": interpolation.lerp(first.x, second.x, alpha)[0, 0].numpy(),
        "latent_blend": next(generation.decompress(ldae, blend)),
        "aekl_nearest": decoded[triple.nearest],
        "aekl_target": decoded[triple.target],
    }


def measure(options, ldae, volumes, months: dict, triples) -> list[dict]:
    """One entry per triple and method of a subject; months: {month: row}."""
    from ldae import evaluation, generation

    used = {month for triple in triples for month in (triple.start, triple.end, triple.target)}
    codes = {month: generation.encode(ldae, volumes.tensor(months[month]), options.steps) for month in sorted(used)}
    decoded = {month: next(generation.decompress(ldae, code.z_0)) for month, code in codes.items()}
    found, upstream = [], options.preset == "upstream"
    for triple in triples:
        scan = codes[triple.target].x[0, 0].numpy()
        made = predictions(options, ldae, codes, decoded, triple)
        pairs = {method: (x, scan) for method, x in made.items()}
        pairs["ldae_vs_aekl"] = made["ldae"], decoded[triple.target]
        for method, (x, reference) in pairs.items():
            scores = evaluation.image_metrics(x, reference, upstream=upstream)
            found.append({"scan": months[triple.target].scan, "method": method} | triple.to_dict() | scores)
    return found


def draw_example(options, ldae, volumes, table, triple) -> None:
    """OUT/example.png: the first triple's scan and its predictions."""
    from common import figures
    from ldae import generation, interpolation

    months = table[triple.subject]
    used = sorted({triple.start, triple.end, triple.target})
    codes = {month: generation.encode(ldae, volumes.tensor(months[month]), options.steps) for month in used}
    decoded = {month: next(generation.decompress(ldae, code.z_0)) for month, code in codes.items()}
    shown = {f"scan, month {triple.target}": codes[triple.target].x[0, 0]}
    made = predictions(options, ldae, codes, decoded, triple)
    shown |= {interpolation.METHODS[method]: x for method, x in made.items()}
    title = f"{triple.subject}: month {triple.target} from {triple.start} and {triple.end}"
    differences = [interpolation.METHODS[name] for name in ("ldae", "ldae_change", "copy_nearest", "latent_blend")]
    figures.montage(Path(options.output_dir) / "example.png", shown, window=(0, 1), difference_to=next(iter(shown)),
                    difference_of=differences, planes=("axial", "coronal"), title=title,
                    spacing_mm=[ldae.preparation.spacing_mm] * 3)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
