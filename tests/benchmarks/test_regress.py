import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medge.benchmarks import host as host_facts
from medge.benchmarks import regress
from medge.benchmarks.baseline import BASELINE, Baseline
from medge.benchmarks.host import Host, Noise
from medge.benchmarks.records import CheckResult, Verdict
from medge.errors import RegressedError, UsageError
from medge.runtimes.embed import Embedder
from medge.spec import ImageSpec

pytestmark = pytest.mark.usefixtures("baseline")

CPU = "onnxruntime 1.32.0 cpu"


@pytest.fixture
def check(
    tmp_path: Path, make_artifact: Callable[..., Path], fake: Callable[..., Embedder]
) -> Callable[..., CheckResult]:
    """Checks a fresh artifact; the fake's fields first, `manifest` overrides the artifact's."""

    def run(manifest: dict[str, Any] | None = None, data: Path | None = None, **fields: Any) -> CheckResult:
        embedder = fake(**({"name": CPU} | fields))
        artifact = make_artifact(**(manifest or {}))
        return regress.check(artifact, tmp_path / "base", data=data, opener=lambda _: embedder)

    return run


def _verdicts(result: CheckResult) -> dict[str, Verdict]:
    return {verdict.metric: verdict for verdict in result.verdicts}


def _no_time(result: CheckResult) -> list[str]:
    return [v.outcome for v in result.verdicts if v.metric != "latency_ratio"]


def test_a_faithful_artifact_is_ok(check: Callable[..., CheckResult]) -> None:
    result = check(damage=0.002)
    assert set(_no_time(result)) == {"ok"}
    assert _verdicts(result)["top1_agreement"].value == 1
    assert result.runtime == CPU
    assert result.reference.runtime == "torch 2.13.0 cpu fp32"
    assert result.reference.images == len(result.cases) == 36
    assert any("No GPU: the reference is torch 2.13.0 cpu fp32" in note for note in result.notes)
    assert any("with 3 labels" in note for note in result.notes)


def test_a_damaged_artifact_has_regressed(check: Callable[..., CheckResult]) -> None:
    result = check(damage=1.0)
    assert result.overall == "regressed"
    verdicts = _verdicts(result)
    assert verdicts["image_cosine_mean"].outcome == "regressed"
    assert verdicts["top1_agreement"].outcome == "regressed"
    assert verdicts["auc_delta"].outcome == "regressed"
    cosines = [case.cosine for case in result.cases]
    assert cosines == sorted(cosines)
    assert any(case.baseline_label != case.candidate_label for case in result.cases)


def test_damage_near_the_limit_is_inconclusive_on_auc(check: Callable[..., CheckResult]) -> None:
    """The observed AUC is hardly lower, but 36 images cannot exclude a loss beyond the limit."""
    auc = _verdicts(check(damage=0.2))["auc_delta"]
    assert auc.value is not None
    assert auc.low is not None
    assert auc.high is not None
    assert auc.low < -0.005 <= auc.high
    assert auc.outcome == "inconclusive"


def test_inconclusive_is_between_ok_and_regressed(check: Callable[..., CheckResult]) -> None:
    result = check(damage=0.002)
    verdicts = [v.model_copy(update={"outcome": "ok"}) for v in result.verdicts]
    assert result.model_copy(update={"verdicts": tuple(verdicts)}).overall == "ok"
    verdicts[3] = verdicts[3].model_copy(update={"outcome": "inconclusive"})
    assert result.model_copy(update={"verdicts": tuple(verdicts)}).overall == "inconclusive"
    verdicts[5] = verdicts[5].model_copy(update={"outcome": "regressed"})
    assert result.model_copy(update={"verdicts": tuple(verdicts)}).overall == "regressed"
    assert result.model_copy(update={"verdicts": ()}).overall == "inconclusive"


def test_the_scheme_chooses_the_limits(check: Callable[..., CheckResult]) -> None:
    strict, loose = check(damage=0.05), check({"scheme": "int4"}, damage=0.05)
    assert _verdicts(strict)["image_cosine_min"].outcome == "regressed"
    assert _verdicts(loose)["image_cosine_min"].outcome == "ok"


def test_other_weights_are_refused(check: Callable[..., CheckResult]) -> None:
    source = {"model": "other", "hub_id": "", "revision": "main", "weights_sha256": "ab" * 32}
    with pytest.raises(UsageError, match=r"other weights \('other', abababababab…\)"):
        check({"source": source})


@pytest.mark.parametrize("image", [ImageSpec(size=8, variant="hf"), ImageSpec(size=16)])
def test_another_preprocessing_is_refused(check: Callable[..., CheckResult], image: ImageSpec) -> None:
    with pytest.raises(UsageError, match="preprocesses as"):
        check({"image": image})


def test_a_scheme_without_limits_is_refused(check: Callable[..., CheckResult]) -> None:
    with pytest.raises(UsageError, match="No limits for scheme 'ternary'"):
        check({"scheme": "ternary"})


def test_an_added_image_is_another_dataset(check: Callable[..., CheckResult], data: Path) -> None:
    shutil.copy(data / "eye" / "0.png", data / "eye" / "99.png")
    with pytest.raises(UsageError, match="other images or labels"):
        check()


def test_moved_data_is_asked_for_and_found(check: Callable[..., CheckResult], data: Path, tmp_path: Path) -> None:
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"not at .*--data DIR"):
        check()
    assert check({"scheme": "int8-again"}, data=moved, damage=0.002).reference.images == 36


def test_an_artifact_that_gives_nan_has_regressed(check: Callable[..., CheckResult]) -> None:
    with pytest.raises(RegressedError, match="NaN"):
        check(poison=float("nan"))


def test_time_is_compared_on_the_same_host_and_device_only(
    check: Callable[..., CheckResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host
) -> None:
    assert "latency_ratio" in _verdicts(check())
    gpu = check({"scheme": "int8-b"}, name="onnxruntime 1.32.0 NVIDIA H100")
    assert "latency_ratio" not in _verdicts(gpu)
    assert any("different devices" in note for note in gpu.notes)
    with monkeypatch.context() as busy:
        busy.setattr(host_facts, "noise", lambda: Noise(others=0.7, spread=0.0))
        noisy = check({"scheme": "int8-d"})
    assert "latency_ratio" not in _verdicts(noisy)
    assert any("not quiet: other programs take 70%" in note for note in noisy.notes)
    monkeypatch.setattr(regress, "fingerprint", lambda: host)
    elsewhere = check({"scheme": "int8-c"})
    assert "latency_ratio" not in _verdicts(elsewhere)
    assert any("captured on another host" in note for note in elsewhere.notes)


def test_a_slower_artifact_regresses(check: Callable[..., CheckResult], tmp_path: Path) -> None:
    path = tmp_path / "base" / BASELINE
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"latency_seconds": [1e-9] * 36}))
    slow = _verdicts(check())["latency_ratio"]
    assert slow.outcome == "regressed"
    assert "ms, reference" in slow.detail


def test_multilabel_data(
    tmp_path: Path, data: Path, make_artifact: Callable[..., Path], fake: Callable[..., Embedder]
) -> None:
    from medge.benchmarks.baseline import Identity, record
    from medge.benchmarks.datasets import load_dataset

    rows = [f"{kind}/{i}.png,{int(kind == 'eye')},{int(i % 2)}" for kind in ("eye", "skin") for i in range(12)]
    path = data / "labels.csv"
    path.write_text("\n".join(["path,eye,odd", *rows]))
    base: Baseline = Baseline.open(tmp_path / "base")
    identity = Identity("m", "", base.manifest.weights_sha256)
    record(fake(), identity, load_dataset(path), tmp_path / "multi")
    result = regress.check(make_artifact(), tmp_path / "multi", opener=lambda _: fake(name=CPU))
    assert [curve.positives for curve in sorted(result.curves, key=lambda c: c.label)] == [12, 12]
    assert {case.labels for case in result.cases} == {(), ("eye",), ("odd",), ("eye", "odd")}


def test_the_result_survives_json(check: Callable[..., CheckResult], tmp_path: Path) -> None:
    result = check(damage=0.3)
    result.save(tmp_path / "check.json")
    assert CheckResult.load(tmp_path / "check.json") == result
    document = json.loads((tmp_path / "check.json").read_text())
    assert document["overall"] == "regressed"
    (tmp_path / "check.json").write_text(json.dumps(document | {"overall": "ok"}))
    assert CheckResult.load(tmp_path / "check.json").overall == "regressed"
