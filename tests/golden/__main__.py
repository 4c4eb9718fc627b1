"""python -m tests.golden [DIR ...]: run every reference case below the folders (default: those in tests/golden).

Prints case, largest difference, tolerance and pass or fail, and exits with status 1 if any failed or none was found.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from tests.golden import find_cases, run_case


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.split(":", 1)[1])
    parser.add_argument("folders", nargs="*", metavar="DIR", default=[str(Path(__file__).parent)])
    folders = parser.parse_args(argv).folders
    torch.set_num_threads(min(2, torch.get_num_threads()))
    try:
        paths = find_cases(folders)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}: not a folder of reference cases", file=sys.stderr)
        return 2
    width = max((len(path.stem) for path in paths), default=4)
    print(f"{'case':{width}}  difference  tolerance  {'result':14}  seconds  output it is largest for")
    failed = 0
    for path in paths:
        start = time.perf_counter()
        result = run_case(path)
        failed += result.status == "FAIL"
        numbers = f"{result.difference:10.3g}  {result.tolerance:9.3g}" if result.output else f"{'-':>10}  {'-':>9}"
        rest = "; ".join(part for part in (result.output, result.note) if part)
        seconds = time.perf_counter() - start
        print(f"{path.stem:{width}}  {numbers}  {result.status:14}  {seconds:7.1f}  {rest}", flush=True)
    print(f"{len(paths)} cases, {failed} failed")
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
