"""What XNNPACK is handed: positive bfloat16 scales, integers in range, one quantization of a shared input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medge.errors import UnsupportedError
from medge.quantize.calibrate import Range
from medge.quantize.executorch import BLOCK, Linears, quantize_blocks, refusal
from medge.quantize.scheme import Rule, Scheme, load
from medge.spec import Weight

BUILT = ("fp32", "fp16", "int8", "int8-static", "int4", "int4-mixed")
REFUSED = {"int5": "int8", "int4-affine": "int4", "int4-nl": "int4", "palette4": "int8", "palette6": "int8"}


@pytest.mark.parametrize("name", BUILT)
def test_xnnpack_has_kernels_for(name: str) -> None:
    assert refusal(load(name)) is None


@pytest.mark.parametrize(("name", "nearest"), REFUSED.items())
def test_xnnpack_has_none_for(name: str, nearest: str) -> None:
    found = refusal(load(name))
    assert found
    assert found[0].startswith("XNNPACK")
    assert found[1] == nearest
    assert refusal(load(nearest)) is None


@pytest.mark.parametrize(
    ("rule", "activations"),
    [
        (Rule(match=".*", bits=8, block=32), "dynamic"),
        (Rule(match=".*", bits=4, block=16), "dynamic"),
        (Rule(match=".*", bits=8), "none"),
        (Rule(match=".*", bits=8, symmetric=False), "dynamic"),
    ],
)
def test_a_user_s_own_rule_is_refused_with_a_reason(rule: Rule, activations: Any) -> None:
    found = refusal(Scheme(name="own", title="", activations=activations, rules=(rule,)))
    assert found
    assert refusal(load(found[1])) is None


@pytest.fixture
def weight() -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    return random.standard_t(4, (24, 4 * BLOCK)).astype(np.float32)


@pytest.mark.parametrize("search", [False, True])
def test_scales_are_positive_and_exact_in_bfloat16(weight: np.ndarray[Any, Any], search: bool) -> None:
    weight[:, :BLOCK] = 0
    found = quantize_blocks("x", weight, BLOCK, search=search)
    assert found.scales.shape == (24, 4)
    assert (found.scales >= np.finfo(np.float32).tiny).all()
    assert not (found.scales.view(np.uint32) & 0xFFFF).any()
    assert found.values.min() == -8
    assert found.values.max() == 7
    assert not found.dequantize()[:, :BLOCK].any()


def test_the_largest_weight_of_a_block_survives(weight: np.ndarray[Any, Any]) -> None:
    blocks = weight.reshape(-1, BLOCK)
    back = quantize_blocks("x", weight, BLOCK, search=False).dequantize().reshape(-1, BLOCK)
    where = np.abs(blocks).argmax(1)[:, None]
    large, found = (np.take_along_axis(x, where, 1) for x in (blocks, back))
    np.testing.assert_allclose(found, large, rtol=0.13)  # the scale rounds by 2^-9; a side's last step by half of 1/8


def test_a_search_for_the_scale_lowers_the_error(weight: np.ndarray[Any, Any]) -> None:
    def error(search: bool) -> float:
        return float(np.square(quantize_blocks("x", weight, BLOCK, search=search).dequantize() - weight).sum())

    assert error(True) < 0.95 * error(False)


def test_bfloat16_is_torch_s() -> None:
    torch = pytest.importorskip("torch")
    from medge.quantize.executorch import _to_bfloat16

    x = np.random.default_rng(1).lognormal(0, 20, 10_000).astype(np.float32)
    np.testing.assert_array_equal(_to_bfloat16(x), torch.from_numpy(x).bfloat16().float().numpy())


def test_blocks_that_do_not_divide_the_rows_are_refused(weight: np.ndarray[Any, Any]) -> None:
    with pytest.raises(UnsupportedError, match="'fc2'"):
        quantize_blocks("fc2", weight[:, :-16], BLOCK, search=False)


class Recorder:
    """A graph that only remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}

    def call(self, operation: str, *arguments: Any) -> str:
        self.calls.append(operation.split(".")[1] if "." in operation else operation)
        return f"{operation}:{len(self.calls)}"

    def weight(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.weights[name] = value
        return name

    def dtype(self, name: str) -> str:
        return name


def layers(*names: str) -> dict[str, tuple[Weight, Weight | None]]:
    matrix = np.ones((8, 64), np.float32)
    return {name: (Weight(f"{name}.weight", lambda: matrix), None) for name in names}


def test_layers_that_read_one_input_quantize_it_once() -> None:
    graph = Recorder()
    found = Linears(graph, load("int8")).emit("x", layers("q", "k", "v"))
    assert [width for _, width in found] == [8, 8, 8]
    assert graph.calls.count("quantize_per_token") == 1
    assert graph.calls.count("linear") == 3
    assert graph.weights["q.weight"].dtype == np.int8


def test_a_calibrated_layer_reads_and_writes_integers_and_another_stays_dynamic() -> None:
    graph = Recorder()
    linears = Linears(graph, load("int8-static"), {"fc1": Range(-1, 1)}, {"fc1": Range(-2, 2)})
    linears.emit("x", layers("fc1"))
    assert graph.calls.count("quantize_per_tensor") == 2
    linears.emit("y", layers("fc2"))
    assert graph.calls.count("quantize_per_tensor") == 2
    assert graph.calls.count("quantize_per_token") == 1
