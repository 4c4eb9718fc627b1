"""What each code knows: reconstructions at several numbers of steps, beside the controls that give them meaning.

    python ldae/scripts/reconstruction_table.py                                   # the study's test scans
    python ldae/scripts/reconstruction_table.py --part all --table_steps 10 50    # every scan of the table

Rows: y with its encoded z_T, y with fixed noise, the prior alone (LDDIM), an untrained network, another subject's y;
and the autoencoder, which bounds them. Every scan is compared with its prepared scan, over the volume and in the head.
Writes OUT/reconstruction_table.{csv,json,md}, reconstruction_per_scan.csv and reconstruction.png. LPIPS needs
--lpips_weights. The same command again continues; under torchrun scans are shared out. Nine network calls per step and
scan: minutes at the tiny preset, most of an hour per scan at the paper's size on a CPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import UserError
from ldae.scripts.config import PRESETS, TableOptions


def main() -> None:
    options = cli.parse(TableOptions, description=__doc__, presets=PRESETS)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        evaluate(options, rt)


def evaluate(options: TableOptions, rt) -> dict | None:
    """Write the table of the chosen scans; returns its JSON content (rank 0)."""
    from common import schedulers
    from common.runlog import progress
    from ldae import dataset, evaluation, generation, latents

    # ---- setup
    out = Path(options.output_dir)
    ldae = generation.load_model(options, rt)
    for steps in options.table_steps:
        schedulers.respace(ldae.schedule.T, steps, ldae.spacing)
    rows = generation.select_rows(options, ldae)
    for path in options.lpips_weights:
        if not Path(path).is_file():
            raise UserError(f"no file {path}; correct --lpips_weights")
    partners = evaluation.partners([row.subject for row in rows])
    wanted = [name for name in options.rows if "shuffled" not in name or min(partners) >= 0]
    about = generation.about_model(ldae) | {
        "options": {name: getattr(options, name) for name in ("sampler", "seed", "precision", "preset", "lpips_net")},
        "lpips_weights": [latents.bytes_hash(Path(path).read_bytes()) for path in options.lpips_weights],
        "steps": list(options.table_steps), "rows": wanted, "part": options.part,
        "scans": dataset.fingerprint(rows),
    }  # fmt: skip
    study = Study(options, ldae, rows, partners, wanted, dataset.Volumes(ldae.preparation, options.cache_folder))
    lpips = load_lpips(options, ldae.preparation.shape, rt)
    records = evaluation.Records(out, about, options.overwrite, rt)

    # ---- loop over scans: always the same batches, so that a resumed table equals an uninterrupted one
    parts = [range(k, min(k + options.eval_batch, len(rows))) for k in range(0, len(rows), options.eval_batch)]
    mine = rt.shard([part for part in parts if any(rows[k].scan not in records.done for k in part)])
    with progress(sum(map(len, mine)), 0, "reconstruct", enabled=rt.is_main) as bar:
        for part in mine:
            for scan, entries in measure(study, part, lpips).items():
                records.add(scan, entries)
            bar.update(len(part))

    # ---- finish
    table = records.collect([row.scan for row in rows])
    result = None
    if rt.is_main:
        result = evaluation.write_table(out, table, about, options.seed)
        draw(out / "reconstruction.png", study)
        for line in evaluation.table_text(result):
            rt.print(line)
        rt.print(f"written to {out}")
    rt.barrier()
    return result


@dataclass(frozen=True)
class Study:
    """What is measured: options, model, scans with their partners of other subjects, rows of the table, volumes."""

    options: TableOptions
    ldae: object
    rows: list
    partners: list[int]
    wanted: list[str]
    volumes: object

    def stack(self, indices):
        """(B, 1, D, H, W) of these scans."""
        import torch

        return torch.stack([self.volumes.tensor(self.rows[k]) for k in indices])

    def outputs(self, indices, table_steps) -> tuple:
        """Scans x (B, 1, D, H, W), their z_0, and {(row, steps): (z_0_hat, z_T or None)}."""
        from ldae import evaluation

        ldae, x = self.ldae, self.stack(indices)
        z_0, y = ldae.compress(x), ldae.semantic(x)
        shuffled = any("shuffled" in name for name in self.wanted)
        y_other = ldae.semantic(self.stack([self.partners[k] for k in indices])) if shuffled else None
        scans, seed = [self.rows[k].scan for k in indices], self.options.seed
        noise = ldae.noise(scans, seed)
        z_drawn = ldae.compress(x, ldae.noise([f"posterior of {scan}" for scan in scans], seed))
        made = {(evaluation.AEKL, None): (z_0, None)}
        for steps in table_steps:
            found = evaluation.reconstruct(
                ldae, z_0, y, y_other, noise, steps, self.wanted, self.options.sampler, z_drawn
            )
            made |= {(name, steps): value for name, value in found.items()}
        return x, z_0, made


def measure(study: Study, indices, lpips) -> dict[str, list[dict]]:
    """{scan: one entry per row of the table and number of steps} of these scans."""
    from ldae import evaluation

    x, z_0, made = study.outputs(indices, study.options.table_steps)
    upstream, found = study.options.preset == "upstream", {}
    for (name, steps), (z_hat, z_T) in made.items():
        x_hat = study.ldae.decompress(z_hat).cpu()
        for k, index in enumerate(indices):
            row = study.rows[index]
            entry = {"scan": row.scan, "subject": row.subject, "row": name, "steps": steps}
            entry |= evaluation.image_metrics(x_hat[k, 0].numpy(), x[k, 0].numpy(), upstream=upstream, lpips=lpips)
            if name != evaluation.AEKL:
                entry["latent_rmse"] = (z_hat[k] - z_0[k]).cpu().double().square().mean().sqrt().item()
            if z_T is not None:
                entry |= evaluation.noise_statistics(z_T[k].cpu())
            found.setdefault(row.scan, []).append(entry)
    return found


def load_lpips(options: TableOptions, shape, rt):
    """A function of two volumes (D, H, W) of this shape, or None without weights."""
    import torch

    from ldae.losses import SliceLPIPS

    if not options.lpips_weights:
        return None
    published = dict(value_range=None, sum_axes=True) if options.preset == "upstream" else {}
    network = SliceLPIPS(options.lpips_net, options.lpips_weights, **published).to(rt.device).eval()
    if min(shape) < (smallest := getattr(network.distance, "smallest", 1)):
        raise UserError(f"volumes of {' x '.join(map(str, shape))} are too small for LPIPS, which needs {smallest} "
                        "voxels along each axis; leave --lpips_weights out")  # fmt: skip

    @torch.inference_mode()
    def lpips(pred, target):
        return network(*(torch.as_tensor(x)[None, None].float().to(rt.device) for x in (pred, target))).item()

    return lpips


def draw(path: Path, study: Study) -> None:
    """The first scan, the autoencoder and every row at the largest number of steps."""
    from common import figures
    from ldae import evaluation

    steps = max(study.options.table_steps)
    x, _, made = study.outputs([0], [steps])
    shown = {"scan": x[0, 0]}
    shown |= {evaluation.LABELS[name]: study.ldae.decompress(z)[0, 0] for (name, _), (z, _) in made.items()}
    figures.montage(path, shown, window=(0, 1), difference_to="scan", difference_of=list(shown)[1:4],
                    planes=("axial", "coronal"), title=f"{study.rows[0].scan}, {steps} steps",
                    spacing_mm=[study.ldae.preparation.spacing_mm] * 3)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
