"""One tiny seeded checkpoint and its fp32 artifact a session, the command line as a function, no network, no cache."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from medge.checkpoint import Checkpoint
from medge.export.synth import synthesize

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no bug
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reaches the hub, or the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MedSigLIP, seed 0. Not to be written to: see `own_checkpoint`."""
    root = tmp_path_factory.mktemp("session") / "checkpoint"
    synthesize("medsiglip-448", "tiny", root)
    return root


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its fp32 ONNX artifact. Not to be written to: see `own_artifact`."""
    from medge.export.pipeline import export
    from medge.export.request import Request
    from medge.quantize.scheme import load

    root = tmp_path_factory.mktemp("session") / "artifact"
    export(Request(Checkpoint.open(checkpoint), "onnx", load("fp32"), root, {"parity": "off"}))
    return root


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def own_artifact(artifact: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`cli("verify", path)` -> exit code, stdout, stderr, through the very function of the medge command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from medge.cli import main

        monkeypatch.setattr(sys, "argv", ["medge", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run
