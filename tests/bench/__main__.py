"""Print speed and memory of the full-size networks; minutes per paper on two CPU cores.

    python -m tests.bench
    python -m tests.bench --device cuda --repeats 20 --out bench.json
    python -m tests.bench --size small
"""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import option

PAPERS = ("il_cldm", "lapt", "neuroldm3d", "ldae", "mgdcr")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options(cli.CommonOptions):
    size: str = option("full", "full: the networks and volumes of the paper; small: seconds, to try the program",
                       choices=("small", "full"))
    batch: int = option(1, "batch of the training steps; all else is one volume", unit="volumes")
    repeats: int = option(0, "timed calls after an untimed one, while all take less than 10 s; the fastest "
                             "counts; 0: 3 on the CPU, 10 elsewhere")
    paper: tuple[str, ...] = option(PAPERS, "papers to measure", choices=PAPERS)
    only: str = option("", "measure only the items whose name contains this")
    out: str = option("", "JSON file of the results; empty: none")
    item: str = option("", "measure PAPER/ITEM in this process and print JSON (how the program calls itself)")


def run_item(options):
    from common import runtime

    paper, _, name = options.item.partition("/")
    with runtime.start(options.device, options.precision, options.seed) as rt:
        options.repeats = options.repeats or (3 if rt.device.type == "cpu" else 10)
        print(json.dumps(importlib.import_module(f"tests.bench.{paper}").ITEMS[name](options, rt)))


def in_child(options, paper, name):
    """The item's dict, or {"failed": reason}: running out of memory in one item must not end the others."""
    same = ("device", "precision", "seed", "num_workers", "size", "batch", "repeats")
    arguments = [word for key in same for word in (f"--{key}", str(getattr(options, key)))]
    done = subprocess.run([sys.executable, "-m", "tests.bench", *arguments, "--item", f"{paper}/{name}"], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no message; killed for memory?"])[-1]
    return {"failed": f"exit status {done.returncode}: {last}"}


def environment(options):
    from common import runlog, runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        return runlog.environment(rt) | {"commit": runlog.git_revision()}


def main():
    options = cli.parse(Options, description=__doc__)
    if options.item:
        return run_item(options)
    about = environment(options)
    print(f"{about['gpu'] or about['cpu']} ({about['device']}, {about['threads']} threads of {about['cores']} cores, "
          f"load {about['load']:.1f}), torch {about['torch']}, {about['precision']}, commit {about['commit']}")
    print(f"size {options.size}, training steps with batch {options.batch}; each item in its own process", flush=True)
    start, all_results = time.perf_counter(), {}
    for paper in options.paper:
        module, results = importlib.import_module(f"tests.bench.{paper}"), {}
        for name in module.ITEMS:
            if options.only in name:
                print(f"  ... {paper}: {name}", file=sys.stderr, flush=True)
                results[name] = in_child(options, paper, name)
        print(f"\n{paper}", *module.report(results), sep="\n", flush=True)
        all_results[paper] = results
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if options.out:
        from common.runlog import write_json

        write_json(options.out, {"options": cli.to_dict(options), "environment": about, "results": all_results})
    failed = [f"{paper}/{name}" for paper, items in all_results.items() for name, r in items.items() if "failed" in r]
    if failed:
        raise cli.UserError(f"{len(failed)} item(s) failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
