"""Refuse files that do not belong in the repository: large ones, volumes, weights, pickles, notebooks with outputs.

    python .ci/check_files.py FILE...      exit status 1 and one line for each refused file
"""

import json
import sys
from pathlib import Path

LARGEST_BYTES = 500_000
VOLUMES = (".nii", ".nii.gz", ".dcm", ".mgz", ".nrrd", ".mdb")
WEIGHTS = (".pt", ".pth", ".pth.tar", ".ckpt", ".safetensors", ".pkl")


def complaint(path: Path) -> str | None:
    """Why this file may not be committed, or None."""
    if path.name.lower().endswith(VOLUMES + WEIGHTS):
        return "volumes, weights and pickles are not committed"
    if path.stat().st_size > LARGEST_BYTES:
        return f"{path.stat().st_size} bytes, more than {LARGEST_BYTES}"
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if any(cell.get("outputs") or cell.get("execution_count") for cell in cells):
            return "notebook with outputs: strip them (jupyter nbconvert --clear-output --inplace FILE)"
    return None


def main() -> int:
    refused = [(name, why) for name in sys.argv[1:] if Path(name).is_file() and (why := complaint(Path(name)))]
    for name, why in refused:
        print(f"error: {name}: {why}", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
