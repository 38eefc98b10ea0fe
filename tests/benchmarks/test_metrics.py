import tomllib
from pathlib import Path

import numpy as np
import pytest

from medge.benchmarks.baseline import Goldens
from medge.benchmarks.metrics import (
    BY_NAME,
    LIMITS,
    METRICS,
    MIN_IMAGES,
    Evidence,
    Limit,
    hits,
    judge,
    load_limits,
)
from medge.benchmarks.stats import Estimate
from medge.errors import UsageError
from medge.runtimes.base import normalize
from medge.spec import FloatArray

FAMILIES = ("fp32", "fp16", "bf16", "int8", "int8-static", "palette6", "int5", "int4", "int4-mixed", "palette4")


def _goldens(images: FloatArray, targets: FloatArray | None = None, classes: FloatArray | None = None) -> Goldens:
    labels = np.eye(images.shape[1], dtype=np.float32) if classes is None else classes
    if targets is None:
        targets = np.eye(len(labels), dtype=np.float32)[np.arange(len(images)) % len(labels)]
    return Goldens(normalize(images.astype(np.float32)), labels, targets)


def _measure(metric: str, evidence: Evidence) -> Estimate | str:
    measure = BY_NAME[metric].measure
    assert measure is not None
    return measure(evidence)


def _value(metric: str, evidence: Evidence) -> float:
    estimate = _measure(metric, evidence)
    assert isinstance(estimate, Estimate)
    assert estimate.value is not None
    return estimate.value


def _random(n: int = 40, d: int = 8, seed: int = 0) -> FloatArray:
    return np.asarray(np.random.default_rng(seed).normal(size=(n, d)), np.float32)


def test_an_exact_copy_moves_nothing() -> None:
    goldens = _goldens(_random())
    evidence = Evidence(goldens, goldens)
    for metric in METRICS:
        if metric.measure is None:
            continue
        expected = 0.0 if metric.name.endswith("_delta") else 1.0
        assert _value(metric.name, evidence) == pytest.approx(expected, abs=1e-6), metric.name


def test_cosines_have_known_values() -> None:
    base = _goldens(np.eye(4, dtype=np.float32))
    turned = np.eye(4, dtype=np.float32)
    turned[0] = [np.cos(0.2), np.sin(0.2), 0, 0]
    evidence = Evidence(base, _goldens(turned))
    assert _value("image_cosine_min", evidence) == pytest.approx(np.cos(0.2), abs=1e-6)
    assert _value("image_cosine_mean", evidence) == pytest.approx((3 + np.cos(0.2)) / 4, abs=1e-6)


def test_centring_reveals_what_a_common_direction_hides() -> None:
    """Images that are all alike but for a little, as with random weights: plain cosine stays near one."""
    common = np.full(8, 10.0, np.float32)
    base, moved = common + _random(seed=1), common + _random(seed=2)
    evidence = Evidence(_goldens(base), _goldens(moved))
    assert _value("image_cosine_mean", evidence) > 0.98
    assert abs(_value("centred_cosine_mean", evidence)) < 0.2


def test_centred_cosine_of_equal_images_is_undefined_and_no_pass() -> None:
    same = _goldens(np.ones((30, 8), np.float32))
    estimate = _measure("centred_cosine_min", Evidence(same, same))
    assert isinstance(estimate, Estimate)
    assert "fewer than 3" in estimate.undefined
    verdict = judge(BY_NAME["centred_cosine_min"], estimate, Limit(limit=0.9, reason="x"))
    assert verdict.outcome == "inconclusive"
    assert verdict.value is None


def test_one_changed_answer_in_forty() -> None:
    targets = np.eye(8, dtype=np.float32)[np.arange(40) % 8]
    base = targets + 0.01
    moved = base.copy()
    moved[0] = base[1]
    evidence = Evidence(_goldens(base, targets), _goldens(moved, targets))
    assert _value("top1_agreement", evidence) == pytest.approx(39 / 40)
    assert _value("accuracy_delta", evidence) == pytest.approx(-1 / 40)
    assert _value("auc_delta", evidence) < 0


def test_recall_at_k_by_hand() -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])
    targets = np.array([[False, True, False], [True, False, False]])
    assert hits(scores, targets, 1).tolist() == [0, 0]
    assert hits(scores, targets, 2).tolist() == [1, 0]
    assert hits(scores, targets, 3).tolist() == [1, 1]


def test_recall_at_five_of_three_labels_does_not_apply() -> None:
    goldens = _goldens(_random(d=3))
    reason = _measure("recall5_image_text_delta", Evidence(goldens, goldens))
    assert isinstance(reason, str)
    assert "3 labels" in reason


def test_images_without_findings_do_not_count_for_recall() -> None:
    targets = np.zeros((40, 8), np.float32)
    targets[:10, 0] = targets[10:20, 1] = 1
    goldens = _goldens(_random(), targets)
    assert _value("accuracy_delta", Evidence(goldens, goldens)) == 0


def test_few_images_cannot_prove_an_auc() -> None:
    goldens = _goldens(_random(n=MIN_IMAGES - 1))
    estimate = _measure("auc_delta", Evidence(goldens, goldens))
    assert isinstance(estimate, Estimate)
    verdict = judge(BY_NAME["auc_delta"], estimate, Limit(limit=-0.005, reason="x"))
    assert verdict.outcome == "inconclusive"
    assert "too few" in verdict.detail


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.004, 0.001, "ok"),
        (-0.005, 0.0, "ok"),
        (-0.006, 0.001, "inconclusive"),
        (-0.02, -0.006, "regressed"),
    ],
)
def test_an_inferred_metric_is_judged_by_its_whole_interval(low: float, high: float, outcome: str) -> None:
    verdict = judge(BY_NAME["auc_delta"], Estimate(0.0, low, high), Limit(limit=-0.005, reason="x"))
    assert verdict.outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(0.5, 0.9, "ok"), (0.9, 1.1, "inconclusive"), (1.1, 2.0, "regressed")]
)
def test_at_most_turns_the_direction(low: float, high: float, outcome: str) -> None:
    verdict = judge(BY_NAME["latency_ratio"], Estimate(1.0, low, high), Limit(limit=1.0, reason="x"))
    assert verdict.outcome == outcome


def test_an_exact_metric_is_judged_by_its_value() -> None:
    limit = Limit(limit=0.99, reason="x")
    metric = BY_NAME["top1_agreement"]
    assert judge(metric, Estimate(0.99, 0.945, 0.998), limit).outcome == "ok"
    assert judge(metric, Estimate(0.98, 0.93, 0.994), limit).outcome == "regressed"


def test_an_inferred_metric_without_interval_is_no_pass() -> None:
    assert judge(BY_NAME["auc_delta"], Estimate(0.0), Limit(limit=-0.005, reason="x")).outcome == "inconclusive"


def test_every_family_limits_every_metric_with_a_reason() -> None:
    assert set(tomllib.loads(LIMITS.read_text())) == set(FAMILIES)
    for family in FAMILIES:
        limits = load_limits(family)
        left_out = set(BY_NAME) - set(limits)
        assert left_out == ({"latency_ratio"} if family == "fp16" else set()), family
        assert all(len(limit.reason) > 10 for limit in limits.values())


def test_the_clinical_limits() -> None:
    clinical = {family: load_limits(family)["auc_delta"].limit for family in FAMILIES}
    assert clinical["int8"] == clinical["int8-static"] == -0.005
    assert clinical["int4"] == clinical["int4-mixed"] == -0.010


def test_a_better_family_is_never_allowed_more() -> None:
    pairs = (("fp32", "fp16"), ("fp16", "int8"), ("int8", "int8-static"), ("int8", "int5"), ("int4-mixed", "int4"))
    for better, worse in pairs:
        ours, theirs = load_limits(better), load_limits(worse)
        for metric in METRICS:
            if metric.direction == "at_least":
                assert ours[metric.name].limit >= theirs[metric.name].limit, (better, metric.name)


def test_the_longest_family_name_wins() -> None:
    assert load_limits("int4-mixed-90mb") == load_limits("int4-mixed")
    assert load_limits("int8-dynamic") == load_limits("int8")
    with pytest.raises(UsageError, match="No limits for scheme 'ternary'"):
        load_limits("ternary")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[int8]\nspeed = { limit = 1.0, reason = 'x' }", "no metric 'speed'"),
        ("[int8]\nauc_delta = { limit = 1.0 }", "'auc_delta' needs a limit and its reason"),
        ("[int8", "holds no limits"),
    ],
)
def test_bad_limits_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_limits("int8", path)
