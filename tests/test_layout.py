"""The repository holds to what its README and its tools rely on."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medge

ROOT = Path(__file__).parent.parent
LINKS = ("export", "quantize", "runtimes", "benchmarks", "distill")
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "sklearn", "matplotlib", "pydicom", "numpy", "rich.progress")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    path = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | path | environment)


@pytest.mark.parametrize("name", LINKS)
def test_the_libraries_are_links_to_the_top_level(name: str) -> None:
    link = ROOT / "src" / "medge" / name
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / name
    assert importlib.import_module(f"medge.{name}").__file__ == str(link / "__init__.py")


def test_the_public_names_are_these() -> None:
    assert set(medge.__all__) == {"__version__", "open", "open_embedder", "open_generator"}
    from medge.runtimes import open as opener

    assert medge.open is opener
    with pytest.raises(AttributeError, match="'medge' has no attribute 'load'"):
        _ = medge.load


@pytest.mark.parametrize("statement", ["import medge", "import medge.cli"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    done = python(f"{statement}; import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("module", ["medge.runtimes", "medge.runtimes.onnx_backend", "medge.runtimes.probe"])
def test_runtimes_load_no_torch_and_no_exporter(module: str) -> None:
    names = ("torch", "transformers", "onnx", "medge.export", "medge.quantize")
    done = python(f"import {module}, sys; print(*[m for m in {names!r} if m in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_ci_runs_the_readme_s_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- test command -->\n```sh\n(.+)\n```", readme)
    assert found is not None
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    (extract,) = [line for line in script if line.startswith("command=")]
    done = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found[1].strip()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_lock_has_hashes_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|//|\bindex-url|\bfind-links|@ ", lock)
    requirements = [r for r in lock.replace("\\\n", "").splitlines() if r.strip() and not r.startswith("#")]
    assert len(requirements) > 50
    for requirement in requirements:
        assert re.match(r"^[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==\S+ .*--hash=sha256:[0-9a-f]{64}", requirement), requirement


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_the_package_s() -> None:
    assert f'version = "{medge.__version__}"' in (ROOT / "pyproject.toml").read_text()
