"""baseline capture, check and bench of a chat model through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from medge import runtimes
from medge.benchmarks import chat_latency
from medge.benchmarks.chat_baseline import ChatBaseline
from medge.checkpoint import Checkpoint
from medge.export.synth import synthesize
from medge.manifest import MANIFEST, Manifest, PartFiles, Source, describe, write_json
from medge.runtimes.base import RunOptions
from medge.runtimes.torch_generator import TorchGenerator, open_reference

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text-only MedGemma. Not to be written to."""
    root = tmp_path_factory.mktemp("cli") / "chat"
    synthesize("medgemma-27b-text-it", "tiny", root)
    return root


@pytest.fixture(scope="session")
def chat_artifact(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that says it is this model in GGUF; `opened` runs it in torch."""
    root = tmp_path_factory.mktemp("cli") / "artifact"
    root.mkdir()
    (root / "decoder.gguf").write_bytes(b"weights")
    source = Checkpoint.open(chat_model)
    manifest = Manifest(
        schema_version=1,
        source=Source(model=source.chat_spec.id, hub_id="", revision="main", weights_sha256=source.sha256),
        licence="HAI-DEF",
        task="generate",
        format="gguf",
        scheme="fp16",
        parts={"decoder": PartFiles(files=(describe(root, "decoder.gguf"),), inputs=(), outputs=())},
        chat=source.chat_spec.chat,
    )
    write_json(root / MANIFEST, manifest.model_dump(mode="json"))
    return root


@pytest.fixture
def opened(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> TorchGenerator:
    generator = open_reference(chat_model, device="cpu", options=RunOptions(threads=1))
    monkeypatch.setattr(runtimes, "open_generator", lambda path, options=None: generator)
    return generator


@pytest.fixture(scope="session")
def captured(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medge.benchmarks.chat_baseline import capture

    root = tmp_path_factory.mktemp("cli") / "base"
    capture(chat_model, "built-in", root, max_tokens=8)
    return root


def test_capture_records_the_built_in_prompts(cli: Cli, chat_model: Path, tmp_path: Path) -> None:
    code, _, err = cli("baseline", "capture", chat_model, "-o", tmp_path / "base", "--count", 4)
    assert code == 0, err
    assert "4 prompts" in err
    assert "fp32" in err
    assert len(ChatBaseline.open(tmp_path / "base").manifest.asked) == 4
    code, _, err = cli("baseline", "capture", chat_model, "-o", tmp_path / "base", "--count", 4)
    assert code == 2
    assert "exists" in err


def test_capture_reads_a_file_of_prompts(cli: Cli, chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"kind": "text", "prompt": "The lungs are clear."}\n')
    code, _, err = cli("baseline", "capture", chat_model, "--data", path, "-o", tmp_path / "base")
    assert code == 0, err
    path.write_text('{"kind": "text"}\n')
    code, _, err = cli("baseline", "capture", chat_model, "--data", path, "-o", tmp_path / "other")
    assert code == 2
    assert "line 1" in err


def test_options_of_the_other_kind_of_model_are_refused(
    cli: Cli, chat_model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    code, _, err = cli("baseline", "capture", chat_model, "-o", tmp_path / "base", "--variant", "hf")
    assert (code, "for encoders" in err) == (2, True)
    code, _, err = cli("baseline", "capture", checkpoint, "-o", tmp_path / "base", "--count", 3)
    assert (code, "for chat models" in err) == (2, True)


def test_check_passes_the_model_itself(
    cli: Cli, chat_artifact: Path, captured: Path, opened: TorchGenerator, tmp_path: Path
) -> None:
    report, kept = tmp_path / "report.html", tmp_path / "check.json"
    code, out, err = cli("check", chat_artifact, "--against", captured, "--report", report, "-o", kept)
    assert code == 0, err
    assert "kl_mean" in out
    assert "OK" in err
    assert "KL divergence, mean" in report.read_text()
    code, _, err = cli("report", kept, "-o", tmp_path / "again.html")
    assert code == 0, err


def test_check_fails_a_damaged_model(cli: Cli, chat_artifact: Path, captured: Path, opened: TorchGenerator) -> None:
    for parameter in opened._model.parameters():
        parameter.data = parameter.data * 1.2
    code, out, _ = cli("check", chat_artifact, "--against", captured, "--json")
    assert code == 1
    document = json.loads(out)
    assert document["overall"] == "regressed"
    assert document["replies"]


def test_a_generator_is_not_held_against_an_encoders_baseline(cli: Cli, chat_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text("{}")
    code, _, err = cli("check", chat_artifact, "--against", tmp_path)
    assert (code, "of an encoder" in err) == (2, True)


def test_an_encoder_is_not_held_against_a_generators_baseline(cli: Cli, artifact: Path, captured: Path) -> None:
    code, _, err = cli("check", artifact, "--against", captured)
    assert (code, "of a chat model" in err) == (2, True)


def test_bench_shows_a_row_for_each_number_of_threads(
    cli: Cli, chat_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(module: str, artifact: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        rows = [
            {"context": n, "first_token_seconds": [1.0], "prefill_rate": [99.0], "decode_rate": [12.3]}
            for n in request["contexts"]
        ]
        return {"runtime": "fake", "load_seconds": 1.0, "rows": rows, "vision_seconds": None, "peak_rss_bytes": 2e9}

    monkeypatch.setattr(chat_latency, "in_process", answer)
    monkeypatch.setattr(chat_latency, "read_bandwidth", lambda threads: 1e9)
    kept = tmp_path / "run.json"
    command = ("bench", chat_artifact, "--threads", 2, "--context", 64, "--context", 256, "--allow-noise", "-o", kept)
    code, out, err = cli(*command)
    assert code == 0, err
    assert out.count("12.3") == 2
    assert "decode tokens/s" in out
    assert cli("report", kept, "-o", tmp_path / "report.html")[0] == 0
    code, _, err = cli("bench", chat_artifact, "--context", 100_000, "--allow-noise")
    assert (code, "prompts of at most" in err) == (2, True)
