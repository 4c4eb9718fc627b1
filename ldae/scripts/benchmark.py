"""Speed and memory of LDAE, compression included, beside a voxel-space diffusion autoencoder of equal depth.

    python ldae/scripts/benchmark.py --preset tiny             # a minute on a CPU, every step run
    python ldae/scripts/benchmark.py                           # the paper's size: one call per network, times the steps
    python ldae/scripts/benchmark.py --measure full --device cuda --precision bf16

Both models have random weights (time does not depend on them), the same volumes, batch, steps, precision and threads,
and take turns in every round. Seconds per scan of what a user waits for: compress (autoencoder), encode (semantic code
and DDIM inversion), sample (DDIM), decode (autoencoder). The voxel-space model needs no compress and decode. With
--measure passes the times of encode and sample are those of one network call, multiplied by the steps, and say so.
GMAC are multiply-accumulates of one call, counted on the meta device. Memory on a CPU is computed: weights and the
largest sum of live tensors in a call, without workspace of libraries; on CUDA it is measured.
Writes JSON and prints a table. The paper's size needs about 16 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import UserError
from ldae.scripts.config import BENCHMARK_PRESETS, BenchmarkOptions

PHASES = ("compress", "encode", "sample", "decode")


def main() -> None:
    options = cli.parse(BenchmarkOptions, description=__doc__, presets=BENCHMARK_PRESETS)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        benchmark(options, rt)


def benchmark(options: BenchmarkOptions, rt) -> dict:
    """Measure, write OUT and print the table; returns what OUT holds."""
    import torch

    from common.runlog import environment, git_revision, write_json

    out = Path(options.out)
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} is there already; name another --out or add --overwrite")
    if rt.world_size > 1:
        raise UserError("benchmark.py measures one process; start it without torchrun")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        models = build_models(options, rt)
        seconds, memory = measure(options, models, rt)
        parts = {name: networks(name, ldae, options.batch_size) for name, ldae in models.items()}
        result = {
            "options": cli.to_dict(options) | {"root": None, "out": out.name}, "about": environment(rt),
            "commit": git_revision(), "extrapolated": options.measure == "passes",
            "how": "one call per network, encode and sample multiplied by the steps" if options.measure == "passes"
            else "every step run",
            "networks": parts,
            "seconds_per_scan": {name: totals(rounds) for name, rounds in seconds.items()}, "rounds": seconds,
            "memory": {name: peak(memory[name], parts[name]) for name in models},
            "latent": {name: list(ldae.latent_shape) for name, ldae in models.items()},
            "volume": list(next(iter(models.values())).preparation.shape),
        }  # fmt: skip
    finally:
        torch.set_num_threads(before)
    result["gmac_per_scan"] = {name: gmac_per_scan(part, options.steps) for name, part in parts.items()}
    result["ratios"] = ratios(seconds) if len(models) == 2 else {}
    write_json(out, result)
    for line in report(result):
        rt.print(line)
    return result


# ---- what is measured -----------------------------------------------------------------------------------------------


def build_models(options: BenchmarkOptions, rt) -> dict:
    """{"ldae", "voxel"} as asked for, untrained, with the stages' options of --size."""
    from common import schedulers
    from ldae import aekl, config, model, prior, representation, voxel_dae

    stages = {name: config.CONFIGS[name](**config.PRESETS[name][options.size])
              for name in ("aekl", "ldae_pretrain", "ldae_repr_learn")}  # fmt: skip
    first, second, third = stages.values()
    settings = {"aekl": aekl.aekl_settings(first), "unet": prior.unet_settings(second, first.latent_channels),
                "encoder": representation.encoder_settings(third)}  # fmt: skip
    shared = {"schedule": prior.schedule_settings(second), "preparation": aekl.preparation(first), "plane": third.plane}
    schedulers.respace(second.timesteps, options.steps)
    channels, models = first.latent_channels, {}
    if "ldae" in options.models:
        stats = {"mean": [0.0] * channels, "std": [1.0] * channels}
        models["ldae"] = model.build(settings, stats=stats, seed=options.seed, rt=rt, **shared)
    if "voxel" in options.models:
        models["voxel"] = voxel_dae.build(voxel_dae.voxel_settings(settings), seed=options.seed, rt=rt, **shared)
    return models


def phases(ldae, options: BenchmarkOptions, rt) -> dict:
    """{phase: (function, factor)}: what one round times, and what its seconds are multiplied by."""
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    x = torch.rand(options.batch_size, 1, *ldae.preparation.shape, generator=generator).to(rt.device)
    z = torch.randn(options.batch_size, *ldae.latent_shape, generator=generator).to(rt.device)
    y = ldae.semantic(x)
    t = torch.full((options.batch_size,), ldae.schedule.T // 2, device=rt.device)
    identity = ldae.aekl.compression == 1
    found = {} if identity else {"compress": (lambda: ldae.compress(x), 1), "decode": (lambda: ldae.decompress(z), 1)}
    if options.measure == "full":
        found["encode"] = lambda: ldae.invert(z, ldae.semantic(x), options.steps), 1
        found["sample"] = lambda: ldae.decode(z, y, options.steps), 1
    else:

        @torch.inference_mode()
        def step():
            ldae.shift(z, t, y)

        found |= {"semantic": (lambda: ldae.semantic(x), 1), "step": (step, options.steps)}
    return found


def measure(options: BenchmarkOptions, models: dict, rt) -> tuple[dict, dict]:
    """({model: [{phase: seconds per scan} of each round]}, {model: memory}); models take turns, phases too."""
    import time

    import torch

    from common.runlog import progress

    def synchronise():
        if rt.device.type == "cuda":
            torch.cuda.synchronize(rt.device)

    calls = {name: phases(ldae, options, rt) for name, ldae in models.items()}
    seconds, memory = {name: [] for name in models}, {name: resting(ldae) for name, ldae in models.items()}
    total = (options.repeats + 1) * sum(map(len, calls.values()))
    with progress(total, 0, "benchmark", enabled=rt.is_main) as bar:
        for number in range(options.repeats + 1):
            for name in models:
                taken = {}
                for phase, (call, factor) in calls[name].items():
                    held = start_peak(rt)
                    start = time.perf_counter()
                    call()
                    synchronise()
                    taken[phase] = (time.perf_counter() - start) * factor / options.batch_size
                    note_peak(memory[name], phase, held, rt)
                    bar.update()
                if number:  # the first round warms up
                    seconds[name].append(as_phases(taken))
    return seconds, memory


def as_phases(taken: dict) -> dict[str, float]:
    """Seconds of the four phases and their sum; from single calls if that was measured."""
    if "step" in taken:
        taken = taken | {"encode": taken["semantic"] + taken["step"], "sample": taken["step"]}
    found = {phase: taken.get(phase, 0.0) for phase in PHASES}
    return found | {"total": sum(found.values())}


def totals(rounds: list[dict]) -> dict[str, float]:
    """Median over rounds of every phase."""
    import statistics

    return {phase: statistics.median(taken[phase] for taken in rounds) for phase in rounds[0]}


def ratios(seconds: dict) -> dict[str, dict]:
    """voxel / ldae of encode, sample and all phases: median, smallest and largest over rounds."""
    import statistics

    found = {}
    for phase in ("encode", "sample", "total"):
        values = [b[phase] / a[phase] for a, b in zip(seconds["ldae"], seconds["voxel"], strict=True)]
        found[phase] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found


# ---- counting -------------------------------------------------------------------------------------------------------


def networks(name: str, ldae, batch: int) -> dict[str, dict]:
    """{network: parameters, GMAC of one call for one volume, GiB of live tensors in a call of `batch`}.

    Networks: autoencoder encoder and decoder, semantic encoder, prior alone, decoder (prior and estimator); on the
    meta device, so that it takes neither time nor memory.
    """
    import torch

    from ldae import model
    from ldae.autoencoder import AutoencoderKL
    from ldae.encoder import SemanticEncoder, to_slices

    settings = ldae.settings
    with torch.device("meta"):
        decoder = model.build_decoder(settings).eval()
        encoder = SemanticEncoder(**settings["encoder"]).eval()

        def inputs(n):
            x, z = torch.empty(n, 1, *ldae.preparation.shape), torch.empty(n, *ldae.latent_shape)
            return x, z, torch.zeros(n, dtype=torch.long), torch.empty(n, ldae.code_dim)

        calls = {
            "semantic encoder": (encoder, lambda x, z, t, y: encoder(to_slices(x, ldae.plane))),
            "prior": (decoder.prior, lambda x, z, t, y: decoder.prior(z, t)),
            "decoder": (decoder, lambda x, z, t, y: decoder(z, t, y)),
        }
        if name == "ldae":
            aekl = AutoencoderKL(**settings["aekl"]).eval()
            calls["compress"] = aekl, lambda x, z, t, y: aekl.encode(x)
            calls["decompress"] = aekl, lambda x, z, t, y: aekl.decode(z)
        return {
            part: {"parameters": sum(p.numel() for p in network.parameters()), "gmac": gmac(call, inputs(1)),
                   "live_gib": live_gib(call, inputs(batch))}
            for part, (network, call) in calls.items()
        }  # fmt: skip


def gmac_per_scan(parts: dict, steps: int) -> float:
    """GMAC of compress, encode, sample and decode together: what the times would be if arithmetic were all."""
    once = sum(part["gmac"] for name, part in parts.items() if name not in ("prior", "decoder"))
    return once + 2 * steps * parts["decoder"]["gmac"]


def gmac(call, inputs) -> float:
    """Multiply-accumulates of convolutions, matrix products and attention, in 1e9."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call(*inputs)
    return counter.get_total_flops() / 2e9


def live_gib(call, inputs) -> float:
    """Largest sum of tensors alive at once during a call without gradients, inputs and weights not counted."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes, self.now, self.peak = {}, 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            old = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in {*old, *self.sizes}:
                    self.add(x.untyped_storage())
            return out

        def add(self, storage):
            self.sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, id(storage))

        def remove(self, key):
            self.now -= self.sizes.pop(key)

    with torch.no_grad(), Live() as live:
        call(*inputs)
    return live.peak / 2**30


def resting(ldae) -> dict:
    """Memory of the weights, in GiB."""
    parts = (ldae.aekl, ldae.decoder, ldae.encoder)
    return {"weights_gib": sum(p.numel() * p.element_size() for part in parts for p in part.parameters()) / 2**30}


def peak(memory: dict, parts: dict) -> dict:
    """Memory with peak_gib, measured where there is a GPU and else computed, and how it was come by."""
    measured = memory.get("measured_gib")
    if measured:
        how, most = "measured by the CUDA allocator", max(measured.values())
    else:
        how, most = "computed: weights and live tensors of the largest call", max(p["live_gib"] for p in parts.values())
    return memory | {"peak_gib": memory["weights_gib"] + most, "peak_is": how}


def start_peak(rt) -> int:
    """Bytes in use on a GPU, whose peak is counted from here."""
    import torch

    if rt.device.type != "cuda":
        return 0
    torch.cuda.synchronize(rt.device)
    torch.cuda.reset_peak_memory_stats(rt.device)
    return torch.cuda.memory_allocated(rt.device)


def note_peak(memory: dict, phase: str, held: int, rt) -> None:
    """Keep what a phase needed on a GPU beside what was there."""
    import torch

    if rt.device.type == "cuda":
        extra = (torch.cuda.max_memory_allocated(rt.device) - held) / 2**30
        measured = memory.setdefault("measured_gib", {})
        measured[phase] = max(measured.get(phase, 0.0), extra)


# ---- report ---------------------------------------------------------------------------------------------------------


def report(result: dict) -> list[str]:
    """The table, line by line."""
    about, options, names = result["about"], result["options"], list(result["seconds_per_scan"])
    shape = " x ".join(map(str, result["volume"]))
    head = "".join(f"{name:>14}" for name in names) + "   voxel / ldae" * bool(result["ratios"])
    lines = [
        f"{about['gpu'] or about['cpu']} ({about['device']}, {about['threads']} threads of {about['cores']} cores, "
        f"load {about['load']:.1f}), torch {about['torch']}, {about['precision']}, commit {result['commit']}",
        f"size {options['size']}: volumes {shape}, batch {options['batch_size']}, {options['steps']} steps, median of "
        f"{options['repeats']} rounds; {result['how']}",
        f"{'seconds per scan':26}{head}",
    ]
    for phase in (*PHASES, "total"):
        line = f"{phase:26}" + "".join(f"{result['seconds_per_scan'][name][phase]:14.3f}" for name in names)
        if phase in result["ratios"]:
            ratio = result["ratios"][phase]
            line += f"   {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(line)
    work = [result["gmac_per_scan"][name] for name in names]
    ratio = f"   {work[1] / work[0]:.2f}" if len(work) == 2 else ""
    lines.append(f"{'GMAC per scan':26}" + "".join(f"{value:14,.1f}" for value in work) + ratio)
    parts = dict.fromkeys(part for table in result["networks"].values() for part in table)
    for label, key, form in (("GMAC of one call", "gmac", ",.2f"), ("parameters", "parameters", ",d"),
                             ("live tensors, GiB", "live_gib", ".3f")):  # fmt: skip
        lines.append(label)
        for part in parts:
            cells = [result["networks"][name].get(part) for name in names]
            lines.append(f"  {part:24}" + "".join(f"{format(c[key], form) if c else '-':>14}" for c in cells))
    for label, key in (("weights, GiB", "weights_gib"), ("peak, GiB", "peak_gib")):
        lines.append(f"{label:26}" + "".join(f"{result['memory'][name][key]:14.3f}" for name in names))
    return [*lines, f"peak memory: {next(iter(result['memory'].values()))['peak_is']}"]


if __name__ == "__main__":
    cli.run(main)
