"""The arithmetic of the full-size benchmark; its measurements take half an hour and are `just bench-full`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from medge.benchmarks import full_size, peers
from medge.benchmarks.full_size import CONTENDERS, Goal, Usage, fidelity, goals, prepare, seconds, spend
from medge.quantize.scheme import names


def test_a_command_is_accounted_for_alone() -> None:
    usage = spend([sys.executable, "-c", "x = bytearray(300_000_000); sum(range(10**6))"])
    assert usage.rss > 300_000_000
    assert 0 < usage.cpu < usage.wall + 1


def test_a_failed_command_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="failed with 3"):
        spend([sys.executable, "-c", "raise SystemExit(3)"])


def test_usage_outlives_a_run_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fake(command: list[str]) -> Usage:
        made.append(command[-1])
        path = Path(command[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if not path.suffix else path.touch()
        return Usage(1.0, 2.0, 3)

    monkeypatch.setattr(full_size, "spend", fake)
    first = prepare(tmp_path)
    assert len(first) == len(made) == 2 + sum(bool(one.make) for one in CONTENDERS)
    assert prepare(tmp_path) == first
    assert len(made) == len(first)


@pytest.mark.parametrize(("value", "at_least", "met"), [(3.0, True, True), (2.9, True, False), (2.9, False, True)])
def test_a_goal_is_met_on_its_own_side(value: float, at_least: bool, met: bool) -> None:
    assert Goal("x", value, 3.0, at_least).met is met


def test_every_contender_can_be_made() -> None:
    for one in CONTENDERS:
        assert not one.make or hasattr(peers, one.make) or one.make in names()


def test_goals_are_ratios_of_medians(tmp_path: Path) -> None:
    times = {"plain fp32 ONNX": 3.0, "OpenVINO int8 weights, bf16": 1.2, "medge int8": 1.0, "medge int4": 1.05}
    found = {one.name: [{"times": [times.get(one.name, 5.0)] * 3, "rss": 100}] * 3 for one in CONTENDERS}
    found["medge int8"] = [{"times": [1.0, 1.0, 9.0], "rss": 20}] * 3
    (tmp_path / "int4").mkdir()
    (tmp_path / "int4" / "image_encoder.onnx.data").write_bytes(b"0" * 1_000_000)
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((4, 8)).astype(np.float32)
    for i in range(len(CONTENDERS)):
        np.save(tmp_path / f"embeds-{i}.npy", reference * 2)  # length does not matter
    usage = {
        full_size.OPTIMUM: Usage(1.0, 100.0, 8 * 10**9),
        "medge export int8, both towers": Usage(1.0, 40.0, 2 * 10**9),
    }
    values = {goal.what.partition(":")[2].strip(): goal.value for goal in goals(tmp_path, found, usage)}
    assert values["times faster than plain fp32 ONNX"] == pytest.approx(3.0)
    assert values["peak memory over torch's"] == pytest.approx(0.2)
    assert values["least cosine to fp32"] == pytest.approx(1.0)
    assert values["CPU time of the slowest of fp32, fp16, int8 over optimum-cli's"] == pytest.approx(0.4)
    assert seconds(found, "medge int8") == 1.0
    assert fidelity(tmp_path, "medge int4")[0] == pytest.approx(1.0)
    json.dumps(values)
