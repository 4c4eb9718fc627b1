"""Executing a notebook as a user would, without a screen, and what it showed."""

from dataclasses import dataclass
from pathlib import Path

import nbformat


@dataclass
class Shown:
    """What an executed notebook displayed: printed text, pictures and animations (base64)."""

    text: str
    pictures: list[str]
    animations: list[str]


def execute(path: Path, tmp_path: Path, monkeypatch) -> Shown:
    """Run all cells, temporary files in `tmp_path`; CellExecutionError where one fails."""
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine are slower than one
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]

    def shown(kind: str) -> list[str]:
        return [out["data"][kind] for out in outputs if kind in out.get("data", {})]

    pictures = shown("image/png")
    assert all(len(picture) > 5000 for picture in pictures)
    text = "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")
    return Shown(text, pictures, shown("image/gif"))
