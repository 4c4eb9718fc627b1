"""An evaluation as one HTML page to hand on: tables with intervals, figures inside the file, nothing to fetch."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from common.checkpoint import replacing
from lapt.inference import NOTICE

STYLE = """body { font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: 3px 10px; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .notice { background: #fff3cd; padding: .5em 1em }"""


def write(path: Path, report: dict, figures: Iterable[Path]) -> None:
    """The page of a report of `evaluation.evaluate`, with these PNG files in it; written whole or not at all."""
    with replacing(path) as file:
        file.write(page(report, figures).encode())


def page(report: dict, figures: Iterable[Path]) -> str:
    """The page as text: UTF-8, valid without its surroundings."""
    parts = [
        "<h1>LAPT: synthetic against real DWI and ADC</h1>", f'<p class="notice">{escape(NOTICE.capitalize())}.</p>',
        f"<p>{report['n_cases']} cases of {report['n_patients']} patients, {report['n_with_lesion']} with lesion, list "
        f"{escape(report['split'])} of split {escape(report['split_hash'])}. Means over cases with 95 % intervals over "
        "patients; errors in physical units.</p>",
        f"<p>{escape(report['note'])}</p>" if report["note"] else "",
    ]  # fmt: skip
    for title, by_method in (("Images", report["images"]), ("Segmentation", report["segmentation"])):
        methods = {f"{m}, {name}": values for m, named in by_method.items() for name, values in named.items()}
        parts += [f"<h2>{title}</h2>", measures(methods)]
    for title, named in report.get("synthetic_minus_baseline", {}).items():
        parts += [f"<h2>Synthetic minus baseline: {escape(title)}</h2>", *map(differences, named, named.values())]
    if sizes := {m: rows for m, rows in report["lesion_sizes"].items() if rows}:
        parts.append("<h2>Lesions by size</h2>")
        for method, rows in sizes.items():
            body = [[row["size"], *(number(value) for key, value in row.items() if key != "size")] for row in rows]
            parts.append(table([method, *(key for key in rows[0] if key != "size")], body))
    if "realism" in report:
        found = {name: f for name, f in report["realism"].items() if isinstance(f, dict) and "fid" in f}
        body = [[name, number(f["fid"]), number(1000 * f["kid"]), str(f["n_real"])] for name, f in found.items()]
        parts += ["<h2>Realism of slices</h2>", table(["slices against real", "FID", "KID x 1000", "n"], body)]
    parts.append("<h2>Definitions</h2>" + table(["", ""], [[k, str(v)] for k, v in report["definitions"].items()]))
    parts.append("<h2>Figures</h2>")
    for path in figures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>')
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><title>LAPT evaluation</title>\n<style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def measures(methods: dict[str, dict]) -> str:
    """One table row per measure, of {method: {measure: metrics.summary or None}}; without those that have no value."""
    names = dict.fromkeys(name for values in methods.values() for name in values)
    body = [[name, *(with_interval(values[name], "mean") for values in methods.values())]
            for name in names if any(values[name] for values in methods.values())]  # fmt: skip
    return table(["", *methods], body)


def differences(name: str, tests: dict) -> str:
    """Paired tests of one modality or rule, one table row per measure."""
    body = [[column, with_interval(found, "mean_difference"), number(found["wilcoxon_p"]),
             number(found.get("share_improved")), str(found["n_patients"])]
            for column, found in tests.items() if found]  # fmt: skip
    return table([name, "difference", "Wilcoxon p", "share of patients improved", "patients"], body)


def with_interval(found: dict | None, key: str) -> str:
    if found is None:
        return number(None)
    low, high = found["ci95"]
    return number(found[key]) + ("" if low is None else f" [{number(low)}, {number(high)}]")


def number(value) -> str:
    return "–" if value is None else f"{value:.4g}"


def table(head: list[str], body: list[list[str]]) -> str:
    rows = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{escape(cell)}</td>" for cell in cells) for cells in body]
    return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
