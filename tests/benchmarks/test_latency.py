import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medge.benchmarks import host, latency
from medge.benchmarks.host import Noise
from medge.benchmarks.latency import BenchOptions, bench, peak_rss, repeat, settled
from medge.errors import CorruptError, UnsupportedError, UsageError
from medge.manifest import PartFiles, describe
from medge.spec import TensorSpec, TokenizerSpec

QUICK = BenchOptions(processes=1, seconds=0.2, threads=1)


def _answer(**fields: Any) -> dict[str, Any]:
    samples = {"load_seconds": [0.5], "image_encoder_seconds": [0.1, 0.2], "peak_rss_bytes": [1e6]}
    return {"runtime": "onnxruntime cpu", "samples": samples, "unsettled": []} | fields


def _answers(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any]) -> None:
    left = iter(answers)
    monkeypatch.setattr(latency, "_measure_in_process", lambda *arguments: next(left))


def test_samples_of_all_processes_are_pooled(
    monkeypatch: pytest.MonkeyPatch, make_artifact: Callable[..., Path]
) -> None:
    second = _answer(samples={**_answer()["samples"], "image_encoder_seconds": [0.3]})
    _answers(monkeypatch, _answer(), second)
    seen: list[tuple[int, int]] = []
    run = bench(make_artifact(), BenchOptions(processes=2, threads=3), lambda *step: seen.append(step))
    assert run.samples["image_encoder_seconds"] == (0.1, 0.2, 0.3)
    assert run.samples["load_seconds"] == (0.5, 0.5)
    assert run.conditions.threads == 3
    assert run.conditions.variant == "bigvision"
    assert run.artifact.scheme == "int8"
    assert any("differ by 100%: image_encoder_seconds" in note for note in run.notes)
    assert seen == [(1, 2), (2, 2)]


def test_an_unsettled_median_is_said(monkeypatch: pytest.MonkeyPatch, make_artifact: Callable[..., Path]) -> None:
    _answers(monkeypatch, _answer(unsettled=["image_encoder"]))
    assert bench(make_artifact(), QUICK).notes == ("Not settled to ±3%: image_encoder.",)


def test_a_noisy_host_is_refused_unless_told(
    monkeypatch: pytest.MonkeyPatch, make_artifact: Callable[..., Path]
) -> None:
    monkeypatch.setattr(host, "noise", lambda: Noise(0.6, 0.0))
    artifact = make_artifact()
    with pytest.raises(UsageError, match=r"too noisy.*60%.*--allow-noise"):
        bench(artifact, QUICK)
    _answers(monkeypatch, _answer())
    notes = bench(artifact, BenchOptions(processes=1, allow_noise=True)).notes
    assert any("noisy host: other programs take 60%" in note for note in notes)


def test_a_fixed_batch_is_refused_before_any_work(make_artifact: Callable[..., Path], tmp_path: Path) -> None:
    fixed = TensorSpec(name="pixel_values", dtype="float32", shape=(1, 3, 8, 8))
    artifact = make_artifact()
    part = PartFiles(files=(describe(artifact, "image_encoder.onnx"),), inputs=(fixed,), outputs=())
    path = artifact / "manifest.json"
    document = json.loads(path.read_text())
    document["parts"]["image_encoder"] = part.model_dump(mode="json")
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="takes batches of 1, not of 4"):
        bench(artifact, BenchOptions(batch=4))


def test_repeat_stops_when_the_median_is_known_or_the_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def takes(times: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            clock.now += times()

        return run

    assert len(repeat(takes(lambda: 1.0), BenchOptions(seconds=1e9))) == latency.MIN_REPEATS
    rng = np.random.default_rng(0)
    noisy = repeat(takes(lambda: rng.uniform(0.1, 10)), BenchOptions(seconds=1e9))
    assert len(noisy) == latency.MAX_REPEATS
    assert len(repeat(takes(lambda: rng.uniform(0.1, 10)), BenchOptions(seconds=50))) < 60
    a_little = repeat(takes(lambda: rng.normal(1, 0.1)), BenchOptions(seconds=1e9))
    assert latency.MIN_REPEATS < len(a_little) < latency.MAX_REPEATS
    assert settled(a_little, 0.03)


def test_peak_memory_is_this_process_alone() -> None:
    """A child of a large parent must not report the parent's peak, as getrusage does on Linux."""
    large = np.ones(300_000_000 // 8)
    code = "from medge.benchmarks.latency import peak_rss; print(peak_rss())"
    env = {"PYTHONPATH": ":".join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert 1e6 < float(child.stdout) < 250e6 < large.nbytes < peak_rss()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "status -9, killed: out of memory"),
        ("raise SystemExit('boom')", "status 1.*: boom"),
        ("pass", "no output"),
    ],
)
def test_a_crash_is_one_line(
    monkeypatch: pytest.MonkeyPatch, make_artifact: Callable[..., Path], code: str, message: str
) -> None:
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: real([sys.executable, "-c", code], **kw))
    with pytest.raises(CorruptError, match=message):
        bench(make_artifact(), QUICK)


def test_an_error_of_the_process_arrives_as_itself(make_artifact: Callable[..., Path]) -> None:
    """This artifact has no tokenizer: the runtime refuses it, in the child."""
    with pytest.raises(UnsupportedError, match="is a chat model"):
        bench(make_artifact(), QUICK)


def test_a_real_graph_in_a_real_process(make_artifact: Callable[..., Path]) -> None:
    onnx = pytest.importorskip("onnx")
    artifact = make_artifact()
    nodes = [onnx.helper.make_node("ReduceMean", ["pixel_values", "axes"], ["image_embeds"], keepdims=0)]
    pixels = onnx.helper.make_tensor_value_info("pixel_values", 1, ["batch", 3, 8, 8])
    embeds = onnx.helper.make_tensor_value_info("image_embeds", 1, ["batch", 3])
    axes = onnx.helper.make_tensor("axes", 7, [2], [2, 3])
    graph = onnx.helper.make_graph(nodes, "g", [pixels], [embeds], [axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, artifact / "image_encoder.onnx")
    path = artifact / "manifest.json"
    document = json.loads(path.read_text())
    document["parts"]["image_encoder"]["files"] = [describe(artifact, "image_encoder.onnx").model_dump()]
    document["tokenizer"] = TokenizerSpec().model_dump()
    (artifact / "spiece.model").write_bytes(b"never read: no text part")
    document["files"] = [describe(artifact, "spiece.model").model_dump()]
    document["scalars"] = {"logit_scale": 1.0, "logit_bias": 0.0}
    path.write_text(json.dumps(document))
    run = bench(artifact, BenchOptions(processes=2, seconds=0.2, threads=1, batch=2))
    assert run.conditions.runtime.startswith("onnxruntime")
    assert len(run.samples["load_seconds"]) == 2
    assert len(run.samples["image_encoder_seconds"]) >= 2 * latency.MIN_REPEATS
    assert run.images_per_second is not None
    assert run.images_per_second > 100
    rss = run.quantile("peak_rss_bytes", 1)
    assert rss is not None
    assert 2e7 < rss < 1e9
