from pathlib import Path

import pytest

from medge.benchmarks.host import Host
from medge.benchmarks.records import Conditions, RunRecord, Subject, worst
from medge.errors import CorruptError, UsageError


@pytest.fixture
def run(host: Host) -> RunRecord:
    return RunRecord(
        artifact=Subject(
            name="a", digest="0" * 64, model="m", format="onnx", scheme="int8",
            settings={}, licence="", bytes=10, parity={},
        ),
        host=host,
        conditions=Conditions(runtime="onnxruntime cpu", threads=2, batch=4, variant="hf"),
        samples={"image_encoder_seconds": (2.0, 1.0, 3.0), "load_seconds": (0.5,)},
    )  # fmt: skip


def test_quantiles_and_throughput(run: RunRecord) -> None:
    assert run.quantile("image_encoder_seconds", 0.5) == 2
    assert run.quantile("image_encoder_seconds", 0.9) == pytest.approx(2.8)
    assert run.quantile("text_encoder_seconds", 0.5) is None
    assert run.images_per_second == 2  # 4 images in 2 s


def test_it_survives_json(run: RunRecord, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("[]", "invalid"),
        ('{"schema_version": 2}', "schema version 2, newer than 1.*Update medge"),
        ('{"schema_version": 1, "host": 3}', "invalid at"),
    ],
)
def test_a_bad_file_is_corrupt(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CorruptError, match=message):
        RunRecord.load(tmp_path / "run.json")


def test_samples_are_finite(run: RunRecord, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace("0.5", "NaN"))
    with pytest.raises(CorruptError, match="finite"):
        RunRecord.load(tmp_path / "run.json")


def test_an_unwritable_place_is_named(run: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        run.save(tmp_path / "no" / "folder.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there"):
        RunRecord.load(tmp_path / "run.json")


def test_the_worst_outcome_is_the_whole() -> None:
    assert worst(("ok", "inconclusive", "ok")) == "inconclusive"
    assert worst(("inconclusive", "regressed", "ok")) == "regressed"
    assert worst(()) == "inconclusive"
