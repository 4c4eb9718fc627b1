"""IL-CLDM: synthesize amyloid PET from T1 MRI with an image- and label-conditioned latent diffusion model.

Ou et al., IEEE JBHI 29(2):1221-1231, 2025 (doi 10.1109/JBHI.2024.3492020). In order, on a phantom that needs no data:

    python il_cldm/make_phantom.py --n_train 48 --n_val 8 --n_test 24 --shape 32 32 32
    python il_cldm/main.py --preset smoke --check --train_aae --test_aae --enc --train_ldm --gen --evaluate

Several flags in one call run in the order of --help. Minutes at this size; at 112x128x112, as in the paper, days on
one GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from il_cldm.config import PRESETS, Config

STAGES = ("prepare", "check", "train_aae", "test_aae", "enc", "enc_val", "enc_test", "train_ldm", "gen", "evaluate")


def main() -> None:
    config = cli.parse(Config, description=__doc__, presets=PRESETS)
    chosen = [name for name in STAGES if getattr(config, name)]
    if not chosen and not config.dry_run:
        raise cli.UserError(f"nothing to do: give one or more of {', '.join('--' + s for s in STAGES)} (or --dry_run)")

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from il_cldm import aae, checks, evaluate, generate, ldm, prepare

    run = {
        "prepare": prepare.prepare,
        "check": checks.check,
        "train_aae": aae.train_aae,
        "test_aae": aae.test_aae,
        "enc": lambda config, rt: aae.encode(config, rt, "train"),
        "enc_val": lambda config, rt: aae.encode(config, rt, "validation"),
        "enc_test": lambda config, rt: aae.encode(config, rt, "test"),
        "train_ldm": ldm.train_ldm,
        "gen": generate.generate,
        "evaluate": evaluate.evaluate,
    }
    with runtime.start(config.device, config.precision, config.seed) as rt:
        if config.dry_run:
            checks.dry_run(config, rt)
            return
        for name in chosen:
            run[name](config, rt)


if __name__ == "__main__":
    cli.run(main)
