"""What holds for the whole repository: layout, requirements, documents, Makefile, every entry script's --help."""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("il_cldm", "lapt", "neuroldm3d", "ldae", "mgdcr")
FOLDERS = {*PAPERS, "common", "tests"}
PLAIN_FILES = {"README.md", "CHANGELOG.md", "LICENSE", "NOTICE.md", "Makefile", "pyproject.toml"}
PLAIN_FILES |= {"requirements.txt", "requirements-dev.txt"}


def git_files(*options: str) -> list[Path]:
    """Files that git knows, relative to the root; empty where this is no clone."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return []
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@cache
def sources(suffix: str) -> list[Path]:
    """Files of the repository with this suffix, not yet committed ones included, ignored ones not."""
    files = git_files("--cached", "--others", "--exclude-standard")
    if not files:
        skip = {".venv", "data", "data_info", "result", "__pycache__"}
        files = [p for p in (q.relative_to(ROOT) for q in ROOT.rglob("*") if q.is_file()) if not skip & set(p.parts)]
    return sorted(p for p in files if p.suffix == suffix)


def entry_scripts() -> list[Path]:
    inside = (p for p in sources(".py") if p.parts[0] in PAPERS)
    return [p for p in inside if re.search(r"__name__\s*==\s*[\"']__main__", (ROOT / p).read_text(encoding="utf-8"))]


@cache
def help_of(script: Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # scripts find the repository by themselves
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


# --- layout -----------------------------------------------------------------------------------------------------------


def test_only_the_agreed_entries_are_at_the_top():
    tracked = git_files()
    if not tracked:
        pytest.skip("not a git clone with committed files")
    folders = {p.parts[0] for p in tracked if len(p.parts) > 1 and not p.parts[0].startswith(".")}
    files = {p.name for p in tracked if len(p.parts) == 1 and not p.name.startswith(".")}
    assert folders <= FOLDERS
    assert files == PLAIN_FILES


def test_no_volume_weight_pickle_or_large_file_is_in_the_repository():
    files = git_files("--cached", "--others", "--exclude-standard")
    if not files:
        pytest.skip("not a git clone")
    command = [sys.executable, ".ci/check_files.py", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_notebooks_are_valid():
    assert len(sources(".ipynb")) >= len(PAPERS)
    for path in sources(".ipynb"):  # that they hold no outputs is the file guard's
        nbformat.validate(nbformat.read(ROOT / path, as_version=4))


@pytest.mark.parametrize("name", ["scan.nii.gz", "AAE.pth.tar", "last.pt", "big.bin", "ran.ipynb"])
def test_file_guard_refuses(name, tmp_path):
    ran = '{"cells": [{"cell_type": "code", "outputs": [{"text": "1"}], "execution_count": 1, "source": "1"}]}'
    (tmp_path / name).write_text(ran if name.endswith(".ipynb") else "0" * 500_001 if name.startswith("big") else "x")
    command = [sys.executable, ROOT / ".ci/check_files.py", tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and name in done.stderr


@pytest.mark.parametrize("name", ["il_cldm/result/e/log.jsonl", "il_cldm/data_info/val.txt", "x/s.nii.gz", ".venv/a"])
def test_git_ignores_what_runs_write(name):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git clone")
    assert subprocess.run(["git", "check-ignore", "-q", "--no-index", name], cwd=ROOT).returncode == 0
    for kept in ("tests/golden/il_cldm/aae_small.npz", "il_cldm/notebooks/visualize.ipynb", "il_cldm/dataset.py"):
        assert subprocess.run(["git", "check-ignore", "-q", "--no-index", kept], cwd=ROOT).returncode == 1, kept


def test_no_absolute_paths_in_python_files():
    pattern = re.compile(r"[\"'](?:/(?:work|home|Users|root|mnt|media|data|scratch|opt|srv|tmp)/|[A-Za-z]:\\)")
    lines = ((p, i, line) for p in sources(".py") for i, line in enumerate((ROOT / p).read_text().splitlines(), 1))
    assert [f"{p}:{i}: {line.strip()}" for p, i, line in lines if pattern.search(line)] == []


# --- requirements -----------------------------------------------------------------------------------------------------


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    parsed = (Requirement(line) for line in lines if line and not line.startswith("-"))
    return {canonicalize_name(r.name): r for r in parsed}


def test_torch_range():
    torch_range = requirements("requirements.txt")["torch"].specifier
    assert all(torch_range.contains(v) for v in ("2.10.0", "2.12.1", "2.13.0", "2.13.0+cpu"))
    assert not any(torch_range.contains(v) for v in ("2.9.1", "2.14.0", "2.14.1", "2.15.0"))
    pinned = re.search(r"^TORCH_CPU\s*:=\s*torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch_range.contains(pinned[1])
    assert "torchvision" not in requirements("requirements.txt") | requirements("requirements-dev.txt")


def test_installed_packages_meet_the_requirements():
    for name, requirement in (requirements("requirements.txt") | requirements("requirements-dev.txt")).items():
        assert requirement.specifier.contains(importlib.metadata.version(name), prereleases=True), name


@pytest.mark.parametrize("tests", [False, True], ids=["run time", "tests"])
def test_every_import_is_declared(tests):
    """An import is the standard library's, our own by its full name, or a required package (no bare siblings)."""
    declared = requirements("requirements.txt") | (requirements("requirements-dev.txt") if tests else {})
    distributions = importlib.metadata.packages_distributions()
    undeclared = []
    for path in sources(".py"):
        if bool({"tests", "notebooks"} & set(path.parts)) != tests:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - FOLDERS:
                if not {canonicalize_name(d) for d in distributions.get(top, [])} & set(declared):
                    undeclared.append(f"{path}:{node.lineno}: {top}")
    assert undeclared == []


# --- documents --------------------------------------------------------------------------------------------------------


def test_licence_and_notice():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    notice = (ROOT / "NOTICE.md").read_text()
    assert all(f"`{paper}/`" in notice for paper in PAPERS)
    assert "McConnell Brain Imaging Centre" in notice and "IXI" in notice


def test_linked_files_exist():
    missing = []
    for page in sources(".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|#", target) and not (ROOT / page.parent / target.split("#")[0]).exists():
                missing.append(f"{page}: {target}")
    assert missing == []


def test_paper_table_tells_which_papers_are_here():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for paper in PAPERS:
        row = next(line for line in readme.splitlines() if line.startswith("|") and f"`{paper}/`" in line)
        here = (ROOT / paper / "README.md").exists()
        assert (f"({paper}/README.md)" in row) == here and ("not in this version" in row) != here, row


def test_tree_has_one_line_per_module():
    tree = re.search(r"## Tree\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    listed, folder = set(), None
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        listed.add(folder + name if line.startswith(" ") else name)
    modules = {p.as_posix() for p in sources(".py") if p.parts[0] in FOLDERS - {"tests"} and p.name != "__init__.py"}
    assert {name for name in listed if name.endswith(".py")} == modules


def documented_commands() -> list[tuple[Path, list[str]]]:
    """Command lines of the fenced blocks of all README files that start one of our scripts."""
    commands = []
    for page in sources(".md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if any(w.endswith(".py") for w in words) and any(w.endswith(("python", "torchrun")) for w in words):
                    commands.append((page, words))
    return commands


def test_documented_commands_exist(elsewhere):
    """Every script and every --option shown in a README is real."""
    commands = documented_commands()
    assert commands
    wrong = []
    for page, words in commands:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        script = Path(words[at])
        if not (ROOT / script).is_file():
            wrong.append(f"{page}: no {script}")
            continue
        known = set(re.findall(r"--\w[\w-]*", help_of(script, elsewhere).stdout))
        options = {w.split("=")[0] for w in words[at + 1 :] if w.startswith("--")}
        wrong += [f"{page}: {script} has no {option}" for option in options - known]
    assert wrong == []


# --- entry scripts ----------------------------------------------------------------------------------------------------


def test_every_entry_script_answers_help_from_elsewhere(elsewhere):
    scripts = entry_scripts()
    assert scripts
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda script: help_of(script, elsewhere), scripts))
    for script, answer in zip(scripts, answers, strict=True):
        assert answer.returncode == 0, f"{script}: {answer.stderr}"
        assert "--help" in answer.stdout and "usage:" in answer.stdout, script
        assert answer.stderr == "", f"{script}: {answer.stderr}"
    assert list(elsewhere.iterdir()) == []


# --- Makefile and CI --------------------------------------------------------------------------------------------------


def make(*words: str) -> subprocess.CompletedProcess:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PAPER", "ARGS", "VENV", "PYTHON")  # set when `make test` runs us
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_help_names_every_target():
    done = make("help")
    assert done.returncode == 0
    assert all(f"make {target}" in done.stdout for target in ("demo", "test", "bench", "lint", "clean"))


def test_make_demo_sets_up_and_runs_the_paper(tmp_path):
    done = make("-n", "demo", f"VENV={tmp_path}/venv", "PAPER=il_cldm")
    assert done.returncode == 0, done.stderr
    assert "-m venv" in done.stdout and "-r requirements.txt" in done.stdout and "torch==2.13.0" in done.stdout
    script = re.search(rf"{tmp_path}/venv/bin/python (il_cldm/\S+\.py)", done.stdout)
    assert (ROOT / script[1]).is_file()


def test_make_demo_of_an_absent_paper_is_one_line_and_installs_nothing(tmp_path):
    done = make("demo", "PAPER=nosuchpaper", f"VENV={tmp_path}/venv")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nosuchpaper is not in this version")
    assert not (tmp_path / "venv").exists()


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18\nexit 1\n')
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode == 2
    assert "error: Python 3.10 or newer is needed" in done.stderr and "Python 2.7.18" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_script():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert "set -euo pipefail" in text and "rm -rf .venv" in text and "make test" in text
