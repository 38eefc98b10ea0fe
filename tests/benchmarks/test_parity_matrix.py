"""The parity matrix on the demo model: what it measures, what it refuses, how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medge.benchmarks.datasets import load_dataset
from medge.benchmarks.parity_matrix import parity_matrix
from medge.benchmarks.records import ParityMatrix, Report
from medge.benchmarks.report import page
from medge.checkpoint import Checkpoint
from medge.demo import IMAGES, MODEL
from medge.errors import UsageError
from medge.export.pipeline import export
from medge.export.request import Request
from medge.quantize.scheme import load

Cli = Callable[..., tuple[int, str, str]]
COUNT = 26


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("matrix")
    for scheme, variant in (("fp32", "bigvision"), ("int4", "bigvision"), ("fp16", "hf")):
        request = Request(
            Checkpoint.open(MODEL), "onnx", load(scheme), root / scheme, {"parity": "off", "variant": variant}
        )
        export(request)
    return sorted(root.iterdir())


@pytest.fixture(scope="module")
def matrix(artifacts: list[Path]) -> ParityMatrix:
    return parity_matrix(MODEL, artifacts, IMAGES, count=COUNT, variants=True)


def test_rows_are_the_reference_the_artifacts_and_the_other_preprocessings(matrix: ParityMatrix) -> None:
    names = [row.name for row in matrix.rows]
    others = [f"reference, {variant}" for variant in ("hf", "finetune", "serving")]
    assert names == ["reference, bigvision", "fp16", "fp32", "int4", *others]
    assert matrix.images == COUNT
    assert {row.format for row in matrix.rows} == {"", "onnx"}


def test_an_exact_copy_is_exact_and_fewer_bits_move_further(matrix: ParityMatrix) -> None:
    cosine = {row.name: row.values["image_cosine_min"] or 0 for row in matrix.rows}
    assert cosine["reference, bigvision"] == pytest.approx(1, abs=1e-9)
    assert cosine["fp32"] > 0.999999
    assert 0.9 < cosine["int4"] < 0.999
    assert matrix.rows[0].auc is not None
    assert matrix.rows[0].auc > 0.95


def test_an_artifact_is_held_against_its_own_preprocessing(matrix: ParityMatrix) -> None:
    rows = {row.name: row for row in matrix.rows}
    moved = rows["reference, hf"].values["image_cosine_min"]
    kept = rows["fp16"].values["image_cosine_min"]  # exported with variant=hf
    assert moved is not None
    assert kept is not None
    assert moved < 0.9999 < kept


def test_a_part_of_the_data_shows_every_label() -> None:
    whole = load_dataset(IMAGES)
    part = whole.first(len(whole.labels))
    assert part.labels == whole.labels
    assert len(part.items) == len(whole.labels)
    assert whole.first(10**6).items == whole.items


def test_other_weights_and_nothing_are_refused(artifact: Path) -> None:
    with pytest.raises(UsageError, match="other weights"):
        parity_matrix(MODEL, [artifact], IMAGES)
    with pytest.raises(UsageError, match="Nothing to compare"):
        parity_matrix(MODEL, [], IMAGES)


def test_the_verb_prints_json_and_writes_a_page(artifacts: list[Path], cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "parity.html"
    code, stdout, _ = cli("parity", MODEL, artifacts[1], "--count", 13, "--json", "--report", out)
    assert code == 0
    assert [row["name"] for row in json.loads(stdout)["rows"]] == ["reference, bigvision", "fp32"]
    html = out.read_text()
    assert "no medical device" in html or "not a medical device" in html.lower()
    assert html.count("<tr>") == 3


def test_the_table_names_each_runtime(artifacts: list[Path], cli: Cli) -> None:
    code, stdout, stderr = cli("parity", MODEL, *artifacts, "--count", 13)
    assert code == 0
    assert "top1 agreement" in stdout
    assert "fp16, fp32, int4: onnxruntime" in " ".join(stderr.split())


def test_names_in_the_page_are_text_not_markup(matrix: ParityMatrix) -> None:
    row = matrix.rows[1].model_copy(update={"name": "<script>"})
    html = page(Report(parity=matrix.model_copy(update={"rows": (*matrix.rows, row)})))
    assert "<script>" not in html
