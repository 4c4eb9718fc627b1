"""The guide stage: a 3D network that finds the lesion in DWI and ADC, trained on real images, frozen ever after.

Post-training of volumes is told by it whether a lesion can be found where it is; evaluation uses it as the fixed
segmenter. `guide_loss` of lapt/losses.py is the objective, `train` the loop around it (entry script: main.py).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, figures, runtime, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, progress, write_json
from lapt import dataset
from lapt.config import GuideConfig
from lapt.dataset import Intensity
from lapt.diffusion import read_file
from lapt.guide import SegmentationGuide
from lapt.losses import guide_loss
from lapt.vqgan import (
    check_finite,
    check_split,
    checked,
    claim_report,
    mean_or_none,
    open_log,
    rate,
    spread,
    with_lesion,
)

KIND = "lapt guide"
COMMAND = "main.py --base lapt/configs/guide.yaml -t"
ARCHITECTURE = ("channels", "channel_mult", "num_res_blocks", "norm_groups")


def segment(guide, x: torch.Tensor, multiple: int, background: float) -> torch.Tensor:
    """Logits (B, 1, X, Y, Z) of normalised volumes (B, 2, X, Y, Z) of any size: padded for the network, then cut."""
    shape = x.shape[2:]
    return dataset.unpad(guide(dataset.pad_to_multiple(x, multiple, background, axes=3)), shape)


def objective(logits: torch.Tensor, lesion: torch.Tensor, config, reduction: str = "batch") -> torch.Tensor:
    """Half Tversky, half focal Dice of the logits with the options of `config`; a scalar."""
    return guide_loss(logits, lesion, alpha=config.tversky_alpha, beta=config.tversky_beta, gamma=config.focal_gamma,
                      smooth=config.smooth, reduction=reduction)  # fmt: skip


def train(config: GuideConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (highest held-out IoU); resumes RUN/checkpoints/last.ckpt."""
    # ---- data
    training.check_options(config, rt)
    intensity = Intensity.of_folder(config.data, config.normalisation, config.statistics)
    data = open_volumes(config, "train", intensity, window=config.window, augment=config.augment)
    held_out = open_volumes(config, "val", intensity)
    chosen = spread(len(held_out), config.val_items)
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    guide = build_guide(config).to(rt.device)
    if config.compile:
        guide.compile()
    print_memory(config, rt)

    # ---- optimizer and EMA
    optimizer = torch.optim.Adam(guide.parameters(), lr=rate(config, rt), betas=(0.5, 0.9),
                                 **runtime.fused_optimizer_kwargs(rt.device))  # fmt: skip
    ema = EMA(guide, config.ema_decay, config.ema_start) if config.ema_decay else None
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    best_path, last_path = config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "model", "loss", "training"})
    settings |= {"seed": config.seed, "precision": config.precision}
    settings |= {"intensity": intensity.to_dict(), "cases": [case.name for case in data.cases]}
    objects = {"guide": guide, "optimizer": optimizer, "scaler": scaler, "means": means} | ({"ema": ema} if ema else {})
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", -math.inf), extra.get("stale", 0)
    if training.is_complete("guide", step, last_step, stale, best_path, config, rt):
        return
    kept = ema.module if ema else guide  # what is validated and written

    def save_last():
        check_finite("guide", means, step)
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_guide(best_path, kept, config, intensity, step=step, scores=scores)

    # ---- loop
    model = runtime.wrap_ddp(guide, rt)
    batches = runtime.training_batches(data, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"split": intensity.split_hash, "train": len(data), "val": len(held_out)}
    with (
        open_log(config, step, fingerprint, rt) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "guide", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = config.learning_rate * training.learning_rate_factor(config, step, total)
            training.set_learning_rate(lr, optimizer)
            batch = next(batches)
            x_batch, lesion_batch = (batch[name].to(rt.device, non_blocking=True) for name in ("mri", "lesion"))
            optimizer.zero_grad(set_to_none=True)
            for x, lesion in runtime.micro_batches(config.accumulate, x_batch, lesion_batch):
                with rt.autocast():
                    logits = segment(model, x, guide.multiple, intensity.background)
                loss = objective(logits.float(), lesion, config)
                scaler.scale(loss / config.accumulate).backward()
                means.add({"loss": loss})
            means.add(runtime.update_weights(scaler, config.grad_clip, grad_norm=(optimizer, guide)))
            if ema:
                ema.update(guide)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses("guide", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()})
            if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                picture = config.run / "samples" / "latest.png"
                log.image("segmentation", step, draw(picture, kept, held_out, config, rt))
            if step % every["val_every"] == 0 or step == total:
                scores = evaluate(kept, held_out, chosen, config, rt)[0]
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["iou"] > best:
                    best, stale = scores["iou"], 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"guide: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("guide", step, last_step, rt)


# ---- data and network -----------------------------------------------------------------------------------------------


def open_volumes(config: GuideConfig, split: str, intensity: Intensity, **more) -> dataset.Volumes:
    how = dict(size=config.size, seed=config.seed, with_ctp=False)
    return checked(dataset.Volumes(config.data, split, intensity, **how, **more))


def guide_settings(config: GuideConfig) -> dict:
    """Constructor arguments of the network."""
    return {"in_channels": 2, "out_channels": 1} | {name: getattr(config, name) for name in ARCHITECTURE}


def build_guide(config: GuideConfig) -> SegmentationGuide:
    try:
        return SegmentationGuide(**guide_settings(config))
    except ValueError as error:
        raise UserError(f"{error}; change model.channels, channel_mult or norm_groups") from error


@dataclass(frozen=True)
class TrainedGuide:
    """A frozen segmenter with the intensities of its images, its threshold, and the hash of its weights."""

    model: SegmentationGuide
    settings: dict
    intensity: Intensity
    threshold: float
    hash: str
    rt: runtime.Runtime = field(repr=False)

    def logits(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, 1, X, Y, Z) of normalised images (B, 2, X, Y, Z), which become what it was trained on: clipped, masked.

        With gradients. Deviation (original code): there it sees images as they were never shown to it.
        """
        low, high = self.intensity.bounds
        x = torch.where(mask > 0, x.clamp(low, high), self.intensity.background)
        with self.rt.autocast():
            return segment(self.model, x, self.model.multiple, self.intensity.background).float()

    @torch.inference_mode()
    def probability(self, dwi: np.ndarray, adc: np.ndarray, mask: np.ndarray, stats: dict | None = None) -> np.ndarray:
        """Probability of lesion (X, Y, Z), float32, of DWI and ADC (X, Y, Z) in physical units; 0 outside the mask.

        stats: of the case, needed by a guide that was trained with statistics "case".
        """
        x = torch.from_numpy(self.intensity.normalise(dwi, adc, mask, stats))[None].to(self.rt.device)
        inside = torch.from_numpy(mask > 0)[None, None].to(self.rt.device)
        return (self.logits(x, inside).sigmoid() * inside)[0, 0].cpu().numpy()


def save_guide(path: Path, guide: SegmentationGuide, config: GuideConfig, intensity: Intensity, **more) -> None:
    training.save_network(path, KIND, guide.state_dict(), guide_settings(config), intensity=intensity.to_dict(),
                          threshold=config.threshold, **more)  # fmt: skip


def load_guide(path: Path | str, rt: runtime.Runtime, *, trust_pickle=False, option="paths.guide=RUN") -> TrainedGuide:
    """The guide of a run folder or file, frozen; UserError if it is missing or anything else."""
    saved = read_file(path, KIND, COMMAND, option, trust_pickle)
    model = SegmentationGuide(**saved["config"])
    checkpoint.load_weights(model, saved["state_dict"], path)
    # Deviation (original code): there the guide keeps requires_grad and collects gradients that are never cleared.
    model = runtime.frozen_network(model, rt)
    intensity = Intensity.from_dict(saved["intensity"])
    return TrainedGuide(model, saved["config"], intensity, saved["threshold"], saved["hash"], rt)


# ---- using the guide ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(guide: SegmentationGuide, data: dataset.Volumes, indices: list[int], config: GuideConfig, rt):
    """(scores, values of each case): mean loss, mean Dice of cases with lesion, IoU of all voxels together."""
    was_training = guide.training
    guide.eval()
    found = []
    for index in rt.shard(indices):
        item = data[index]
        x, lesion, mask = (item[name][None].to(rt.device) for name in ("mri", "lesion", "mask"))
        with rt.autocast():
            logits = segment(guide, x, guide.multiple, data.intensity.background).float()
        p, truth = (logits.sigmoid() > config.threshold) & (mask > 0), lesion > 0
        tp, n_p, n = (int(part.sum()) for part in (p & truth, p, truth))
        found.append((index, {"case": item["case"], "loss": objective(logits, lesion, config).item(), "tp": tp,
                              "predicted": n_p, "lesion": n, "dice": 2 * tp / (n_p + n) if n else None}))  # fmt: skip
    guide.train(was_training)
    pairs = sorted((pair for part in rt.gather(found) for pair in part), key=lambda pair: pair[0])
    each = [values for _, values in pairs]
    tp, n_p, n = (sum(values[name] for values in each) for name in ("tp", "predicted", "lesion"))
    scores = {name: mean_or_none([values[name] for values in each]) for name in ("loss", "dice")}
    return scores | {"iou": tp / max(n_p + n - tp, 1)}, each


def draw(path: Path, guide: SegmentationGuide, data: dataset.Volumes, config: GuideConfig, rt) -> Path:
    """The slice with most lesion of a held-out case, its true lesion and the predicted probability."""
    was_training = guide.training
    guide.eval()
    item = data[with_lesion(data, look_at=8)]
    x = item["mri"][None].to(rt.device)
    with torch.inference_mode(), rt.autocast():
        p = segment(guide, x, guide.multiple, data.intensity.background).float().sigmoid()[0, 0].cpu()
    guide.train(was_training)
    z = int(item["lesion"].sum((0, 1, 2)).argmax())
    pictures = [("DWI", item["mri"][0]), ("ADC", item["mri"][1]), ("lesion", item["lesion"][0]), ("probability", p)]
    pictures = [(name, image[:, :, z : z + 1].numpy()) for name, image in pictures]
    return figures.montage(path, pictures, window=data.intensity.bounds, planes=("axial",), unit="normalised")


def test(config: GuideConfig, rt: runtime.Runtime) -> None:
    """Overlap with the lesions of the test cases, to RUN/test.json."""
    if (path := claim_report(config, rt)) is None:
        return
    trained = load_guide(config.best_path, rt, trust_pickle=config.trust_pickle, option="--resume RUN")
    check_split(trained.intensity, config, "the guide")
    data = open_volumes(config, "test", trained.intensity)
    scores, each = evaluate(trained.model, data, list(range(len(data))), config, rt)
    if rt.is_main:
        about = {"stage": config.stage, "model": trained.hash, "split": trained.intensity.split_hash, "n": len(each),
                 "threshold": config.threshold, "normalisation": trained.intensity.to_dict()}  # fmt: skip
        write_json(path, about | {"scores": scores, "each": each, "options": training.recorded(config)})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)
        rt.print(f"guide on {len(each)} test cases: {shown} ({path})")


def print_memory(config: GuideConfig, rt: runtime.Runtime) -> None:
    """Parameter count and an estimate of the memory that training takes on one rank."""
    local = max(config.batch_size // rt.world_size // config.accumulate, 1)
    with torch.device("meta"):
        guide = build_guide(config)
        x = torch.zeros(local, 2, *config.size[:2], config.window)
        with runtime.SavedBytes() as saved:
            segment(guide, x, guide.multiple, 0.0)
    rt.print(f"windows {tuple(x.shape)}")
    copies = ("weights", "gradients", "Adam", "Adam") + (("EMA",) if config.ema_decay else ())
    training.print_memory(guide, saved, copies, rt)


def dry_run(config: GuideConfig, rt: runtime.Runtime) -> None:
    """Print the resolved options, parameter count, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    rt.print(json.dumps(training.recorded(config), indent=2))
    print_memory(config, rt)
