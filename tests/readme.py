"""The commands of a paper's README, and running them as they stand in a copy of what they need."""

import json
import re
import shlex
import shutil

from tests.helpers import ROOT, run_script

OFFLINE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "http_proxy": "http://127.0.0.1:9",
           "https_proxy": "http://127.0.0.1:9"}  # fmt: skip
WRITTEN_BY_USE = ("__pycache__", "data", "datasets", "checkpoints", "logs", "results", "runs", "*.csv")


def commands(paper: str) -> list[list[str]]:
    """[script, argument, ...] of section "Commands, in order"; reproduce.py has a test of its own."""
    text = (ROOT / paper / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## Commands, in order\n(.*?)\n## ", text, re.DOTALL)[1]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "python"]


def copy_code(paper: str, root) -> None:
    """Put what the commands need into `root`: the paper and common/, without what their use has written."""
    for folder in (paper, "common"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns(*WRITTEN_BY_USE))


def run(found: list[list[str]], root) -> None:
    """Run these commands in turn from `root`, offline and on a CPU; AssertionError tells what a failing one printed."""
    (root / "commands.json").write_text(json.dumps(found))
    done = run_script([ROOT / "tests" / "run_commands.py", "commands.json"], cwd=root, env=OFFLINE)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert sum(line.startswith("+ ") for line in done.stdout.splitlines()) == len(found)
