import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medge.benchmarks import regress
from medge.benchmarks.baseline import Baseline
from medge.benchmarks.host import Host
from medge.benchmarks.records import CheckResult, Conditions, Report, RunRecord
from medge.benchmarks.report import Scale, number, page, rate, render, seconds, size
from medge.errors import UsageError
from medge.runtimes.embed import Embedder

VOID = {"meta", "rect", "line", "circle", "path", "link", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that closes another than the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG's `<rect …/>` closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def check(
    baseline: Baseline, tmp_path: Path, make_artifact: Callable[..., Path], fake: Callable[..., Embedder]
) -> CheckResult:
    embedder = fake(name="onnxruntime 1.32.0 cpu", damage=0.6)
    return regress.check(make_artifact(), tmp_path / "base", opener=lambda _: embedder)


@pytest.fixture
def run(check: CheckResult, host: Host) -> RunRecord:
    return RunRecord(
        artifact=check.artifact,
        host=host,
        conditions=Conditions(runtime="onnxruntime 1.32.0 cpu", threads=2, batch=1, variant="hf"),
        samples={
            "image_encoder_seconds": (2.0, 2.2),
            "load_seconds": (0.5,),
            "peak_rss_bytes": (4.7e8,),
        },
        notes=("Measured on a noisy host: x.",),
    )


def test_the_page_says_what_was_tested_on_what(check: CheckResult, run: RunRecord) -> None:
    html = page(Report(checks=(check,), runs=(run,)))
    for needed in (
        "medsiglip-448, onnx int8",
        "No GPU: the reference is torch 2.13.0 cpu fp32",
        check.artifact.digest[:16],
        check.reference.dataset_digest[:16],
        "36 images, 3 labels (chest x-ray, eye, skin)",
        "bigvision",
        "Not a medical device",
        "HAI-DEF",
        "✕ regressed",
        "beyond the limit",
        check.host.cpu,
        check.cases[0].name,
        "Parity at export",
        "2.10 s",
        "0.476",  # images a second
        "470 MB",
        "Measured on a noisy host",
        "Example 9000",
    ):
        assert needed in html, needed
    for verdict in check.verdicts:
        assert verdict.title in html
        assert number(verdict.limit, verdict.metric) in html


def test_the_page_is_whole_and_fetches_nothing(check: CheckResult, run: RunRecord) -> None:
    html = page(Report(checks=(check, check), runs=(run, run)))
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert html.lstrip().lower().startswith("<!doctype html>")


def test_every_value_is_escaped(check: CheckResult) -> None:
    attack = "<img src=x onerror=alert(1)>"
    artifact = check.artifact.model_copy(update={"model": attack})
    case = check.cases[0].model_copy(update={"name": attack, "baseline_label": attack})
    curve = check.curves[0].model_copy(update={"label": attack})
    hostile = check.model_copy(update={"artifact": artifact, "cases": (case,), "curves": (curve,), "notes": (attack,)})
    html = page(Report(checks=(hostile,)))
    assert "<img" not in html
    assert "&lt;img src=x" in html


def test_undefined_values_and_missing_parts_are_shown_as_such(check: CheckResult) -> None:
    unknown = check.verdicts[0].model_copy(
        update={"value": None, "low": None, "high": None, "outcome": "inconclusive", "detail": "no images"}
    )
    bare = check.model_copy(update={"verdicts": (unknown,), "cases": (), "curves": (), "dots": None})
    html = page(Report(checks=(bare,)))
    assert "undefined" in html
    assert "no images" in html
    assert "Not a pass" in html
    assert "nan" not in html.lower().replace("provenance", "")


def test_benchmarks_alone_make_a_page(run: RunRecord) -> None:
    html = page(Report(runs=(run,)))
    assert "Benchmarks of 1 artifact<" in html
    assert "Verdicts" not in html


def test_it_is_written_whole_or_not_at_all(check: CheckResult, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    render(Report(checks=(check,)), out)
    assert out.read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(UsageError, match="nothing to report"):
        render(Report(), out)
    with pytest.raises(UsageError, match="cannot be written"):
        render(Report(checks=(check,)), tmp_path / "no" / "folder.html")
    assert not list(tmp_path.glob(".*partial"))


def test_numbers_for_people() -> None:
    assert [size(n) for n in (None, 12, 4.7e8, 1.71e9, 999_999_999)] == [
        "–", "12 B", "470 MB", "1.71 GB", "1.00 GB",
    ]  # fmt: skip
    assert [seconds(s) for s in (None, 0.0021, 2.134)] == ["–", "2.1 ms", "2.13 s"]
    assert size(99_960_000) == "100 MB"
    assert [rate(r) for r in (None, 0.476, 14486.04)] == ["–", "0.476", "14,486"]
    assert number(-0.0012, "auc_delta") == "−0.0012"
    assert number(-0.01, "accuracy_delta") == "−1.0 points"
    assert number(-0.00001, "auc_delta") == number(0.0, "auc_delta") == "0.0000"
    assert number(0.995, "top1_agreement") == "99.5 %"
    assert number(0.34, "latency_ratio") == "0.34×"
    assert number(0.999715, "image_cosine_min") in ("0.99971", "0.99972")


def test_a_scale_keeps_to_its_line() -> None:
    x = Scale(0, 10, 100, 200)
    assert [x(v) for v in (0, 5, 10, -3, 99)] == [100, 150, 200, 100, 200]
    assert Scale(1, 1, 0, 50)(1) == 25
