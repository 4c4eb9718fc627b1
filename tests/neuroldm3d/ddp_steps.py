"""Three DiT steps on every rank, with averaged gradients ("together") or each rank for itself ("apart").

Arguments: STUDY OUT together|apart. Writes the weights of each rank to OUT/rank<n>.pt.
"""

import sys
from pathlib import Path

import torch

from common import checkpoint, runtime
from neuroldm3d.diffusion import sampling, trainer
from neuroldm3d.diffusion.config import Config
from neuroldm3d.diffusion.model import DiT3D
from neuroldm3d.VAE import latents


def main(study: Path, out: Path, how: str) -> None:
    config = Config(root=str(study), patch_size=(2, 5, 2), hidden_size=48, depth=2, num_heads=2, bs=4)
    with runtime.start("cpu") as rt:
        record = latents.read_record(Path(config.dataroot))
        stats = latents.statistics(Path(config.dataroot), record, "channel")
        data = latents.LatentDataset(Path(config.dataroot), "train", record, stats, seed=0)
        torch.manual_seed(0)
        dit = DiT3D(**trainer.architecture(config, data.shape))
        model = runtime.wrap_ddp(dit, rt) if how == "together" else dit
        schedule = sampling.noise_schedule(**trainer.schedule_settings(config))
        optimizer = torch.optim.Adam([p for p in dit.parameters() if p.requires_grad], lr=1e-3)
        batches = runtime.training_batches(data, config.bs, 0, 0, rt, 0)
        for step in range(3):
            z_0, label = next(batches)
            t, eps, _ = trainer.draw(config, step, data.shape, rt)
            optimizer.zero_grad()
            trainer.dit_loss(model, schedule, z_0, label, t, eps).mean().backward()
            optimizer.step()
        checkpoint.save(out / f"rank{rt.rank}.pt", dit.state_dict())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
