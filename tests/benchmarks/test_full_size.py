"""The arithmetic of the full-size benchmark; its measurements take half an hour and are `just bench-full`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.benchmarks import full_size, peers
from medge.benchmarks.full_size import prepare, spend
from medge.benchmarks.races import OPTIMUM, RACES, Goal, Measured, Race, Usage, embeds, export_job
from medge.export.formats import FORMATS
from medge.quantize.scheme import names

EVERY = pytest.mark.parametrize("race", RACES.values(), ids=RACES)


def test_a_command_is_accounted_for_alone() -> None:
    usage = spend([sys.executable, "-c", "x = bytearray(300_000_000); sum(range(10**6))"])
    assert usage.rss > 300_000_000
    assert 0 < usage.cpu < usage.wall + 1


def test_a_failed_command_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="failed with 3"):
        spend([sys.executable, "-c", "raise SystemExit(3)"])


@EVERY
def test_usage_outlives_a_run_that_is_cut(race: Race, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fake(command: list[str]) -> Usage:
        out = command[command.index("-o") + 1] if "-o" in command else command[-1]
        made.append(out)
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if not path.suffix else path.touch()
        return Usage(1.0, 2.0, 3)

    monkeypatch.setattr(full_size, "spend", fake)
    first = prepare(tmp_path, race)
    made_by = sum(bool(one.peer or one.export) for one in race.contenders)
    assert len(first) == len(made) == 1 + race.optimum + made_by + len(race.exports)
    assert prepare(tmp_path, race) == first
    assert len(made) == len(first)


@pytest.mark.parametrize(("value", "at_least", "met"), [(3.0, True, True), (2.9, True, False), (2.9, False, True)])
def test_a_goal_is_met_on_its_own_side(value: float, at_least: bool, met: bool) -> None:
    assert Goal("x", value, 3.0, at_least).met is met


@EVERY
def test_every_contender_can_be_made(race: Race) -> None:
    for one in race.contenders:
        assert not one.peer or hasattr(peers, one.peer)
    for format, scheme in (*(one.export for one in race.contenders if one.export), *race.exports):
        assert format in FORMATS
        assert scheme in names()
    assert race.base in {one.name for one in race.contenders}


def measured(race: Race, folder: Path, times: dict[str, float], **usage: Usage) -> Measured:
    """Every contender takes 5 s but for those named; all answer as the reference does."""
    rounds: dict[str, list[dict[str, Any]]] = {
        one.name: [{"times": [times.get(one.name, 5.0)] * 3, "rss": 100, "load": 1.0}] * 3 for one in race.contenders
    }
    reference = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    for one in race.contenders:
        np.save(embeds(folder, one.name), reference * 2)  # length does not matter
    return Measured(folder, race.contenders, rounds, usage)


def test_the_peers_goals_are_ratios_of_medians(tmp_path: Path) -> None:
    race = RACES["peers"]
    times = {"plain fp32 ONNX": 3.0, "OpenVINO int8 weights, bf16": 1.2, "onnx int8": 1.0, "onnx int4": 1.05}
    usage = {OPTIMUM: Usage(1.0, 100.0, 8 * 10**9), export_job("onnx", "int8"): Usage(1.0, 40.0, 2 * 10**9)}
    m = measured(race, tmp_path, times, **usage)
    m.rounds["onnx int8"][:] = [{"times": [1.0, 1.0, 9.0], "rss": 20, "load": 1.0}] * 3
    (tmp_path / "onnx-int4").mkdir()
    (tmp_path / "onnx-int4" / "image_encoder.onnx.data").write_bytes(b"0" * 1_000_000)
    (tmp_path / "onnx-int4" / "text_encoder.onnx.data").write_bytes(b"0" * 1_000_000)
    values = {goal.what.partition(":")[2].strip(): goal.value for goal in race.goals(m)}
    assert values["times faster than plain fp32 ONNX"] == pytest.approx(3.0)
    assert values["peak memory over torch's"] == pytest.approx(0.2)
    assert values["least cosine to fp32"] == pytest.approx(1.0)
    assert values["CPU time of the slowest of fp32, fp16, int8 over optimum-cli's"] == pytest.approx(0.4)
    assert values["peak memory, GB"] == pytest.approx(2.0)
    assert values["image tower, MB"] == pytest.approx(1.0)
    assert m.seconds("onnx int8") == 1.0
    json.dumps(values)


def test_the_formats_goals_hold_each_format_against_onnx(tmp_path: Path) -> None:
    race = RACES["formats"]
    times = {"onnx int8": 1.0, "executorch int8": 1.2, "executorch fp32": 3.0, "gguf int8": 2.4}
    usage = {
        export_job("coreml", "int4"): Usage(1.0, 40.0, 6 * 10**9),
        export_job("executorch", "int8"): Usage(1.0, 330.0, 10**9),
    }
    goals = {goal.what: goal for goal in race.goals(measured(race, tmp_path, times, **usage))}
    assert goals["ExecuTorch int8: times faster than its fp32"].value == pytest.approx(2.5)
    assert goals["ExecuTorch int8: time over ONNX int8's"].met
    assert goals["GGUF int8 (Q8_0): time over ONNX int8's"].met
    assert not goals[f"{export_job('coreml', 'int4')}: peak memory, GB"].met
    assert not goals[f"{export_job('executorch', 'int8')}: CPU minutes"].met
    assert goals["gguf fp16: least cosine to fp32"].bound == 0.9999
