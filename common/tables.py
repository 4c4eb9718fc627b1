"""CSV tables as text: read with one-line errors, written whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from common.checkpoint import replacing
from common.cli import UserError


def read_csv(path: str | Path, hint: str) -> tuple[list[str], list[dict]]:
    """Column names and rows (text) of a CSV; UserError if it is missing (with the `hint`), empty or no table."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no table {path}; {hint}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV table in UTF-8 ({error}); save it as one") from error
    if not rows:
        raise UserError(f"{path} has no rows; give one row per scan")
    broken = next((i for i, row in enumerate(rows, 2) if None in row or None in row.values()), None)
    if broken:
        raise UserError(f"{path}: row {broken} has not as many cells as the header has columns; repair it")
    return list(reader.fieldnames), rows


def write_csv(path: str | Path, rows: list[dict], columns: Sequence[str] | None = None, digits: int = 0) -> None:
    """A CSV of these records, written whole or not at all; None and what a record lacks are blank.

    columns: None takes all that occur, in the order of their first appearance. digits: significant ones of a float; 0
    writes as many as tell it from every other.
    """

    def cell(value):
        return f"{value:.{digits}g}" if digits and isinstance(value, float) else value

    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else list(columns)
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
