"""Schemes are data: what they say is read, and what they cannot say is refused by the file's and field's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from medge.errors import UsageError
from medge.quantize.scheme import Budget, Rule, Scheme, load, names

GOOD = 'name = "mine"\ntitle = "x"\nactivations = "dynamic"\nrules = [{ match = ".*", bits = 8 }]\n'


@pytest.mark.parametrize("name", names())
def test_every_scheme_loads_under_its_own_name(name: str) -> None:
    scheme = load(name)
    assert scheme.name == name
    assert scheme.rule("vision_model.encoder.layers.26.mlp.fc2")
    assert scheme.rule("anything at all")


def test_the_schemes_are_there_from_exact_to_small() -> None:
    wide = ("fp32", "fp16", "bf16", "int8", "int8-static", "palette6", "int5")
    assert names() == (*wide, "int4-mixed", "int4", "int4-affine", "int4-nl", "int4-k", "palette4")


@pytest.mark.parametrize(("count", "chosen"), [(34, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29, 30]), (6, [2, 5])])
def test_sensitive_layers_are_those_of_llama_cpp(count: int, chosen: list[int]) -> None:
    rules = (Rule(match=r".*\.down_proj", bits=6, method="superblock", depth="sensitive"), Rule(match=".*", bits=4))
    scheme = Scheme(name="x", title="", activations="none", rules=rules).for_layers(count)
    found = [i for i in range(count) if scheme.rule(f"model.layers.{i}.mlp.down_proj").bits == 6]
    assert found[: len(chosen)] == chosen
    assert scheme.rule("model.layers.0.mlp.up_proj").bits == 4


def test_the_first_rule_that_matches_the_whole_name_wins() -> None:
    rules = (Rule(match="a", bits=32), Rule(match="a.*", bits=16), Rule(match=".*", bits=8))
    scheme = Scheme(name="x", title="", activations="none", rules=rules)
    assert [scheme.rule(layer).bits for layer in ("a", "ab", "ba")] == [32, 16, 8]


def test_a_layer_without_a_rule_is_named() -> None:
    scheme = Scheme(name="x", title="", activations="none", rules=(Rule(match="a", bits=32),))
    with pytest.raises(UsageError, match="'x' has no rule for 'b'"):
        scheme.rule("b")


def test_a_user_s_own_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    assert load(tmp_path / "mine.toml").name == load(str(tmp_path / "mine.toml")).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("name =", "is no TOML", id="no TOML"),
        pytest.param("", "invalid at 'name'", id="empty"),
        pytest.param(GOOD.replace("bits = 8", "bits = 3"), r"invalid at 'rules\.0\.bits'", id="bits"),
        pytest.param(GOOD.replace('".*"', '"("'), r"rules\.0\.match.*no regular expression", id="bad regex"),
        pytest.param(GOOD.replace("bits = 8", "bits = 8, size = 3"), r"'rules\.0\.size'", id="unknown rule field"),
        pytest.param("colour = 3\n" + GOOD, "'colour'", id="unknown field"),
        pytest.param(GOOD.replace("bits = 8", "bits = 4, block = 8"), "block", id="block too small"),
        pytest.param(GOOD.replace('{ match = ".*", bits = 8 }', ""), "'rules'", id="no rule"),
        pytest.param(GOOD.replace("mine", "My Scheme/.."), "'name'", id="name"),
        pytest.param(GOOD.replace("dynamic", "static"), "need each other", id="static without calibration"),
        pytest.param(GOOD + "[calibration]\n", "need each other", id="calibration without static"),
        pytest.param(GOOD + "[budget]\nmean_bits = 9\n", "mean_bits", id="budget beyond its widths"),
        pytest.param(GOOD.replace("bits = 8", "bits = 8, group = 32"), "only palettes", id="group without palette"),
        pytest.param(GOOD.replace("bits = 8", 'bits = 4, method = "kmeans", block = 32'), "no block", id="palette"),
        pytest.param(GOOD.replace("bits = 8", "bits = 16, symmetric = false"), "floats have", id="float offset"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_one_line_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["int3", "", "../int8", "FP32", "missing.toml", "a folder.toml", "binary.toml"])
def test_what_is_no_scheme_is_a_usage_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a folder.toml").mkdir()
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        load(name)


def test_the_padding_suits_every_block() -> None:
    rules = (Rule(match="a", bits=4, block=32), Rule(match="b", bits=4, block=48), Rule(match=".*", bits=8))
    assert Scheme(name="x", title="", activations="dynamic", rules=rules).block == 96
    assert load("int8").block == 1


def test_high_layers_come_first_and_literally() -> None:
    rules = (Rule(match=".*", bits=4, block=32),)
    scheme = Scheme(name="x", title="", activations="dynamic", rules=rules, budget=Budget(mean_bits=5))
    spent = scheme.with_high_layers(frozenset({"a.b"}))
    assert [spent.rule(layer).bits for layer in ("a.b", "axb", "a.b.c")] == [8, 4, 4]
    assert spent.budget is None
    assert spent.digest != scheme.digest
