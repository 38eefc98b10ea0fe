import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap, mannwhitneyu
from sklearn.metrics import roc_auc_score, roc_curve

from medge.benchmarks import stats


@given(st.data())
def test_auc_equals_scikit_learns_ties_included(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 60))
    scores = np.array(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)), float)
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    ours = stats.auc(scores, positive)
    if positive.all() or not positive.any():
        assert ours is None
    else:
        assert ours == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def test_auc_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=200), rng.random(200) < 0.3
    u = mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert stats.auc(scores, positive) == pytest.approx(u / positive.sum() / (~positive).sum(), abs=1e-12)


def test_macro_auc_equals_scikit_learns_and_leaves_out_undefined_labels() -> None:
    rng = np.random.default_rng(1)
    targets = rng.random((80, 4)) < 0.3
    scores = rng.normal(size=(80, 4)) + targets
    assert stats.macro_auc(scores, targets) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    targets[:, 0] = False
    expected = roc_auc_score(targets[:, 1:], scores[:, 1:])
    assert stats.macro_auc(scores, targets) == pytest.approx(expected, abs=1e-12)
    assert stats.macro_auc(scores, np.zeros_like(targets)) is None


def test_roc_equals_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    scores, positive = rng.integers(0, 12, 90).astype(float), rng.random(90) < 0.4
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    ours = stats.roc(scores, positive)
    np.testing.assert_allclose(ours, (false, true), atol=1e-12)
    assert [len(rates) for rates in stats.roc(scores, np.ones(90, bool))] == [0, 0]


def test_each_bootstrap_draw_is_the_auc_of_the_drawn_images() -> None:
    rng = np.random.default_rng(3)
    scores, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    drawn = rng.integers(0, 40, 40)
    weights = np.bincount(drawn, minlength=40)[None].astype(float)
    ours = stats._auc_statistic(scores, positive)(weights)[0]
    assert ours == pytest.approx(roc_auc_score(positive[drawn], scores[drawn]), abs=1e-12)


def test_identical_scores_differ_by_exactly_nothing() -> None:
    rng = np.random.default_rng(4)
    targets = np.eye(3, dtype=bool)[rng.integers(0, 3, 60)]
    scores = rng.normal(size=(60, 3))
    estimate = stats.auc_difference(scores, scores, targets)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_the_interval_covers_the_true_difference_about_95_times_in_100() -> None:
    """Scores of two normals: the true AUCs are Phi(1/sqrt 2) and Phi(0.8/sqrt 2)."""
    truth = 0.7142 - 0.7602  # candidate separates by 0.8, baseline by 1
    rng, covered, runs = np.random.default_rng(5), 0, 120
    for seed in range(runs):
        positive = np.arange(150) < 60
        noise = rng.normal(size=150)
        base, cand = noise + positive, noise * 0.9 + rng.normal(size=150) * 0.43589 + 0.8 * positive
        estimate = stats.auc_difference(cand[:, None], base[:, None], positive[:, None], resamples=400, seed=seed)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    # 95 % of 120 is 114; a binomial of 0.93 (percentile intervals run a little short) leaves this band 1 in 1,000
    assert binom.ppf(0.001, runs, 0.93) <= covered


def test_mean_difference_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(size=120)
    cand = base + rng.normal(size=120) * 0.2 + 0.1
    ours = stats.mean_difference(cand, base, resamples=8000)
    theirs = bootstrap(((cand - base),), np.mean, n_resamples=8000, method="percentile", rng=0)
    assert ours.value == pytest.approx((cand - base).mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=2e-3)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=2e-3)


def test_what_is_undefined_says_so() -> None:
    one = np.ones((5, 2), bool)
    estimate = stats.auc_difference(np.zeros((5, 2)), np.zeros((5, 2)), one)
    assert estimate.value is None
    assert "both outcomes" in estimate.undefined
    assert stats.proportion(0, 0).undefined == "no images"
    assert stats.mean_difference(np.empty(0), np.empty(0)).undefined == "no images"
    assert stats.median_ratio(np.empty(0), np.ones(3)).undefined == "no samples"


def test_draws_without_any_defined_label_are_counted_against_the_interval() -> None:
    """One positive in two images: half of all draws hold only one kind."""
    targets = np.array([[True], [False]])
    scores = np.array([[1.0], [0.0]])
    estimate = stats.auc_difference(scores, scores, targets, resamples=999, seed=1)
    assert estimate.value == 0
    assert (estimate.low is None) == bool(estimate.undefined)
    assert np.isfinite([v for v in (estimate.low, estimate.high) if v is not None]).all()


def test_bootstrap_blocks_bound_memory_and_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(stats._draws(50, 30, seed=7)))
    assert whole.sum(axis=1).tolist() == [50] * 30
    monkeypatch.setattr(stats, "_CELLS", 200)
    blocks = list(stats._draws(50, 30, seed=7))
    assert max(len(block) for block in blocks) == 4
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_proportion_at_the_edge_is_no_certainty() -> None:
    estimate = stats.proportion(100, 100)
    assert estimate.value == estimate.high == 1
    assert estimate.low == pytest.approx(0.9630, abs=1e-4)  # Wilson: n / (n + 1.96²)


def test_median_interval_covers_the_median() -> None:
    rng = np.random.default_rng(8)
    draws = rng.exponential(size=(1000, 41))
    ends = np.array([stats.median_interval(row) for row in draws])
    share = ((ends[:, 0] <= np.log(2)) & (np.log(2) <= ends[:, 1])).mean()
    assert 0.94 <= share <= 0.995


def test_median_ratio() -> None:
    rng = np.random.default_rng(9)
    estimate = stats.median_ratio(rng.normal(2, 0.1, 100), rng.normal(4, 0.1, 80))
    assert estimate.value == pytest.approx(0.5, abs=0.01)
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.48 < estimate.low < 0.5 < estimate.high < 0.52
