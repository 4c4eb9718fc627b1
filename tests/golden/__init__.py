"""Runs the reference cases: what the original programs compute, against our modules through `<paper>/upstream.py`.

A case is <case>.json (what is built, the original's state-dict keys with shapes, inputs, tolerances, and under
"expected" small results that are no arrays) beside <case>.npz (expected outputs), in a folder named after its paper.
Weights and inputs are drawn by `fill`. `upstream` must have:

    build(module, config) -> model      load(model, state_dict)       run(module, model, inputs) -> {name: output}
    to_upstream(model) -> state dict under the original's names      not_reproduced(case) -> {output: reason} (optional)
    read_words(case) -> {name: input} that the case states in words only (optional)
    then(words, tensor, inputs) -> the tensor after what the words under "then" of an input say; `inputs`: drawn so far
"""

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.golden import fill

ROOT = Path(__file__).resolve().parents[2]


class CaseError(Exception):
    """A case that cannot be run or whose structure differs from ours."""


@dataclass
class Result:
    case: str
    status: str  # "pass", "FAIL" or "not reproduced"
    output: str = ""  # the output closest to, or furthest beyond, its tolerance
    difference: float = 0.0
    tolerance: float = 0.0
    note: str = ""


@dataclass
class Family:
    """Tensors whose seed text has indices: family(i=3), or family(shape, k=1, key=...) where the shape is not fixed."""

    spec: dict
    then: Callable | None = None  # tensor -> tensor

    def __call__(self, shape=None, **indices) -> torch.Tensor:
        seed = self.spec["seed"]
        for name, value in indices.items():
            seed = seed.replace(f"{{{name}}}", str(value)).replace(f"<{name}>", str(value))
        drawn = fill.tensor(seed, self.spec["shape"] if shape is None else shape, self.spec.get("scale", 1.0))
        return drawn if self.then is None else self.then(drawn)

    def values(self, index: str) -> range:
        """Values of an index from its description, e.g. "1 to 8" or "999 down to 2, ..."."""
        first, last = map(int, re.findall(r"\d+", self.spec[index])[:2])
        return range(first, last + 1) if last >= first else range(first, last - 1, -1)


def find_cases(folders) -> list[Path]:
    """Case files below the given folders (or case files themselves), sorted; FileNotFoundError for a missing one."""
    found = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(folder)
        found += [folder] if folder.is_file() else folder.rglob("*.json")
    return sorted(path for path in found if path.with_suffix(".npz").exists() or "keys" in _read(path))


def _read(path: Path) -> dict:
    case = json.loads(path.read_text())
    return case if isinstance(case, dict) else {}


def upstream_of(path: Path, case: dict):
    """The `upstream` module of the case's paper: by folder name, by the key "paper", else the one that can build it."""
    for name in (*reversed(path.resolve().parent.parts), case.get("paper", "")):
        if name and (ROOT / name / "upstream.py").is_file():
            return importlib.import_module(f"{name}.upstream")
    for file in sorted(ROOT.glob("*/upstream.py")):
        upstream = importlib.import_module(f"{file.parent.name}.upstream")
        part = next(iter(case.get("modules", {"": case}).values()))
        try:
            upstream.build(part["module"], part["config"])
            return upstream
        except Exception:  # noqa: BLE001, S112
            continue
    raise CaseError("no paper's upstream.py knows it: name the paper in its path or under 'paper'")


def draw_inputs(specs: dict, then: Callable | None = None) -> dict:
    """All inputs of a case, in their order; `then` is the paper's, for operations that are given in words."""
    inputs = {}

    def after(words, drawn):
        return then(words, drawn, inputs)

    for name, spec in specs.items():
        inputs[name] = draw(spec, then and after)
    return inputs


def draw(spec, then: Callable | None = None):
    """An input as the case describes it: a tensor for {seed, shape}, a family for a seed with indices, else literal.

    then(words, tensor): what an operation in words does; without it, such an operation is unknown.
    """
    if isinstance(spec, dict) and "seed" in spec:
        after = partial(then, spec["then"]) if then and "then" in spec else None
        if after:
            spec = {name: value for name, value in spec.items() if name != "then"}
        if re.search(r"\{\w+\}|<\w+>", spec["seed"]):
            return Family(spec, after)
        unknown = spec.keys() - {"seed", "shape", "scale", "shift", "above", "zero_samples", "zero_last_axis"}
        if unknown:
            raise CaseError(f"input operation {', '.join(sorted(unknown))} is unknown")
        drawn = fill.tensor(spec["seed"], spec["shape"], spec.get("scale", 1.0)) + spec.get("shift", 0.0)
        if "above" in spec:
            drawn = (drawn > spec["above"]).float()
        if "zero_samples" in spec:
            drawn[spec["zero_samples"]] = 0
        if "zero_last_axis" in spec:
            drawn[..., spec["zero_last_axis"]] = 0
        return drawn if after is None else after(drawn)
    return {name: draw(item, then) for name, item in spec.items()} if isinstance(spec, dict) else spec


def make_model(upstream, case: dict):
    """Our network for the case, filled by the rule after checking its keys, shapes and parameter count."""
    model = upstream.build(case["module"], case["config"])
    if not case.get("keys"):
        return model
    state = {key: value.clone() for key, value in upstream.to_upstream(model).items()}
    theirs, ours = case["keys"], {key: list(value.shape) for key, value in state.items()}
    if theirs != ours:
        odd = [key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)]
        raise CaseError(f"{len(odd)} state-dict entries differ, e.g. {min(odd)}")
    n_params = sum(p.numel() for p in model.parameters())
    if n_params != case.get("n_params", n_params):
        raise CaseError(f"{n_params} parameters instead of {case['n_params']}")
    upstream.load(model, fill.fill_(state, case.get("skip", ())))
    return model


def compare(got, expected: np.ndarray, atol: float, rtol: float | None, more=0.0) -> tuple[float, float, float]:
    """(largest violation, its difference, its tolerance); a violation above 1 fails. Infinities must be the same.

    The tolerance is atol + more * |expected|, or with `rtol` that alone.
    """
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if got.shape != expected.shape:
        raise CaseError(f"has shape {got.shape} instead of {expected.shape}")
    if expected.size == 0:
        return 0.0, 0.0, atol
    with np.errstate(invalid="ignore"):
        difference = np.where((got == expected) | (np.isnan(got) & np.isnan(expected)), 0.0, np.abs(got - expected))
    difference[np.isnan(difference)] = np.inf
    tolerance = atol + more * np.nan_to_num(np.abs(expected))
    if rtol is not None:  # lists of norms over several decades; what is below float32 resolution is rounding noise
        floor = 1e-6 * np.abs(expected).max()
        tolerance = np.where(np.abs(expected) < floor, floor, rtol * np.abs(expected))
    with np.errstate(divide="ignore", invalid="ignore"):
        violation = np.where(difference == 0, 0.0, difference / tolerance)
    worst = np.unravel_index(np.argmax(violation), violation.shape)
    return float(violation[worst]), float(difference[worst]), float(tolerance[worst])


def mismatch(got, expected, rtol: float) -> str:
    """Where small results of numbers, words, lists and dicts differ, or an empty text."""
    if isinstance(expected, dict):
        if not isinstance(got, dict) or {str(key) for key in got} != expected.keys():
            return f"has {got} instead of the entries {', '.join(expected)}"
        got = {str(key): value for key, value in got.items()}
        pairs = {key: (got[key], value) for key, value in expected.items()}
    elif isinstance(expected, list):
        if not isinstance(got, list | tuple) or len(got) != len(expected):
            return f"is {got} instead of {expected}"
        pairs = dict(enumerate(zip(got, expected, strict=True)))
    elif isinstance(expected, float | int) and not isinstance(expected, bool):
        close = isinstance(got, float | int) and abs(got - expected) <= rtol * abs(expected)
        return "" if close else f"is {got} instead of {expected}"
    else:
        return "" if got == expected else f"is {got!r} instead of {expected!r}"
    found = ((key, mismatch(*pair, rtol)) for key, pair in pairs.items())
    return next((f"[{key}] {what}" for key, what in found if what), "")


def run_case(path) -> Result:
    """Run one case; whatever goes wrong, an unknown case included, is a failure and never an exception."""
    path = Path(path)
    try:
        return _run_case(path, _read(path))
    except Exception as error:  # noqa: BLE001
        return Result(path.stem, "FAIL", note=f"{type(error).__name__}: {error}".splitlines()[0])


def _run_case(path: Path, case: dict) -> Result:
    upstream = upstream_of(path, case)
    left_out = {}
    if not case.get("required", True) and hasattr(upstream, "not_reproduced"):
        left_out = upstream.not_reproduced(case)
    names = [name for name in case["outputs"] if name not in left_out]
    literal = {name: value for name, value in case.get("expected", {}).items() if name not in left_out}
    note = "; ".join(f"not reproduced: {reason}" for reason in sorted(set(left_out.values())))
    if not names and not literal:
        return Result(case["case"], "not reproduced", note=note)

    if "modules" in case:
        parts = {name: {**part, "config": case["config"] | part["config"]} for name, part in case["modules"].items()}
        model = {name: make_model(upstream, part) for name, part in parts.items()}
    else:
        model = make_model(upstream, case)
    if isinstance(model, torch.nn.Module):
        words = f"{case.get('what', '')} {case.get('notes', '')}"
        model.train("training mode" in words.lower())  # unless `run` knows better
    inputs = draw_inputs(case["inputs"], getattr(upstream, "then", None)) | _extra(case)
    inputs |= upstream.read_words(case) if hasattr(upstream, "read_words") else {}
    got = upstream.run(case["module"], model, inputs)

    for name, value in literal.items():
        if name not in got:
            raise CaseError(f"result {name} is missing")
        if what := mismatch(got[name], value, case.get("expected_rtol", 1e-6)):
            raise CaseError(f"result {name}: {what}"[:300])
    worst = (0.0, 0.0, 0.0, "")
    subset = {**case.get("subset", {}), **case.get("strided", {})}
    with np.load(path.with_suffix(".npz")) as expected:
        for name in names:
            if name not in got:
                raise CaseError(f"output {name} is missing")
            value = np.asarray(got[name].detach().cpu() if isinstance(got[name], torch.Tensor) else got[name])
            if part := subset.get(name):
                if list(value.shape) != part["full_shape"]:
                    raise CaseError(f"output {name} has shape {value.shape} instead of {part['full_shape']}")
                value = value[tuple(slice(part.get("offset", 0), None, step) for step in part["strides"])]
            atol = case.get("atol_by_output", {}).get(name, case["atol"])
            reference = expected[name]
            if name in case.get("compare_only_where", {}):
                other, least = case["compare_only_where"][name]
                where = expected[other] > least
                value, reference = value[where], reference[where]
            if np.issubdtype(expected[name].dtype, np.integer):
                atol = 0.0
            try:
                rtol = case.get("rtol_by_output", {}).get(name)
                candidate = (*compare(value, reference, atol, rtol, case.get("rtol", 0.0)), name)
            except CaseError as error:
                raise CaseError(f"output {name} {error}") from None
            worst = candidate if not worst[3] or candidate[0] > worst[0] else worst
    violation, difference, tolerance, name = worst
    return Result(case["case"], "pass" if violation <= 1 else "FAIL", name, difference, tolerance, note)


def _extra(case: dict) -> dict:
    return {name: value for name, value in case.get("extra", {}).items() if name != "constructor_defaults_not_listed"}
