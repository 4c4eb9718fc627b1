"""Run command lines in turn, each in a fork of one process that has torch imported: `python run_commands.py FILE`.

FILE is a JSON list of [script, argument, ...], scripts as seen from the working directory. Stops at the first failure.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

# What takes long to import: once, for all forks.
import matplotlib.pyplot  # noqa: F401
import omegaconf  # noqa: F401
import pandas  # noqa: F401
import scipy.interpolate  # noqa: F401
import scipy.ndimage  # noqa: F401
import skimage.metrics  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401


def run(words):
    """Exit status of a script in a forked process."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        sys.argv = words
        status = 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for command in json.loads(Path(sys.argv[1]).read_text()):
        print("+", *command, flush=True)
        if code := run(command):
            sys.exit(f"status {code}: {' '.join(command)}")
