"""What `medge demo` asks the generator, what answers, and what stands there where llama.cpp is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medge.demo import IMAGES, asking
from medge.demo.asking import QUESTIONS, SCHEMES, ask
from medge.demo.findings import KINDS, reports
from medge.demo.run import Demo
from medge.demo.table import Table
from medge.errors import MissingExtraError

Cli = Callable[..., tuple[int, str, str]]
LABEL = "chest x-ray"
IMAGE = min((IMAGES / LABEL).iterdir())


def quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


@pytest.fixture
def without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> None:
        raise MissingExtraError(f"'{module}' is not installed", f"Run: pip install 'medge[{extra}]'")

    monkeypatch.setattr(asking, "require_installed", missing)


def test_reference_and_artifacts_describe_a_real_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(asking, "PROMPTS", 4)
    answers = ask(IMAGE, LABEL, tmp_path, quiet)
    said, verdicts = answers.tables
    kind = next(kind for kind in KINDS if kind.label == LABEL)
    assert said.title == f"{LABEL}/{IMAGE.name}, asked"
    assert said.columns == ["by", *QUESTIONS, "kind"]
    assert [row[0] for row in said.rows] == ["torch fp32", "gguf int8", "gguf int4-k"]
    assert all(row[1:] == [kind.kind[0], reports(kind)[0], "right"] for row in said.rows)
    assert verdicts.columns[0] == "gguf"
    assert [row[0] for row in verdicts.rows] == list(SCHEMES)
    assert "–" not in verdicts.rows[0]
    assert [one.overall for one in answers.checks] == ["ok", "ok"]
    assert [(path / "manifest.json").is_file() for path in answers.artifacts] == [True, True]
    assert answers.missing == ""


@pytest.mark.usefixtures("without_llama")
def test_without_llama_cpp_transformers_answers_alone_and_says_why(tmp_path: Path) -> None:
    answers = ask(IMAGE, LABEL, tmp_path, quiet)
    (said,) = answers.tables
    assert [(row[0], row[-1]) for row in said.rows] == [("torch fp32", "right")]
    assert (answers.checks, answers.artifacts) == ((), ())
    assert "pip install 'medge[gguf]'" in answers.missing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "verdict"), [("This is a chest x-ray.", "right"), ("A head ct.", "wrong")])
def test_an_answer_is_judged_by_the_kind_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_llama: None, answer: str, verdict: str
) -> None:
    monkeypatch.setattr(asking, "open_reference", lambda path: None)
    monkeypatch.setattr(asking, "_answers", lambda by, generator, image: [by, answer, answer])
    assert ask(IMAGE, LABEL, tmp_path, quiet).tables[0].rows == [["torch fp32", answer, answer, verdict]]


@pytest.mark.parametrize("missing", ["", "In GGUF it answers too, but 'gguf' is not installed"])
def test_the_command_prints_tables_and_what_to_do_next(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    table = Table("asked", ["by", "What is this?"], [["torch fp32", "This is a chest x-ray."]])
    artifacts = () if missing else (tmp_path / "generator-int8", tmp_path / "generator-int4-k")
    demo = Demo(tmp_path / "report.html", (table,), IMAGE, artifacts, missing)
    monkeypatch.setattr("medge.demo.run.run", lambda out, show: demo)
    code, out, err = cli("demo", "-o", tmp_path)
    assert code == 0
    assert "This is a chest x-ray." in out
    assert (missing or "Ask it more: medge generate") in err
    assert err.count("medge generate") == len(artifacts[:1])
    assert "no medical claim" in err


@pytest.mark.slow
def test_the_whole_demo(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("demo", "-o", tmp_path / "demo")
    assert code == 0, err
    assert "onnx" in out
    assert out.count("right") >= 1
    assert "wrong" not in out
    assert "regressed" not in out
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
