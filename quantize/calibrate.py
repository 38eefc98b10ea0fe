"""Activation ranges and layer sensitivity, from activations observed on real images and texts.

An exporter runs a part with its linear layers' inputs tapped; this module only sees arrays. The same
observation serves every format: what a layer's input looks like does not depend on the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from medge.quantize.scheme import Budget, Calibration
from medge.quantize.weights import quantize
from medge.spec import FloatArray, Weight


@dataclass(frozen=True)
class Range:
    """The calibrated range of one activation tensor."""

    low: float
    high: float

    def affine(self) -> tuple[np.float32, np.uint8]:
        """uint8 scale and zero point, zero exactly representable: value = (q - zero) * scale."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32(max(high - low, 1e-8) / 255)
        return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))

    def round_trip(self, x: FloatArray) -> FloatArray:
        """What x becomes when it passes through the integers."""
        scale, zero = self.affine()
        levels = np.clip(np.rint(x / scale) + zero, 0, 255)
        return np.asarray((levels - zero) * scale, np.float32)


@dataclass(frozen=True)
class Layer:
    """A linear layer with what was observed of its input."""

    name: str
    weight: Weight
    inputs: FloatArray
    """(rows, in): tokens of many samples."""
    group: str
    """The same for layers that read the same input, and so share its quantization."""


def activation_range(inputs: FloatArray, calibration: Calibration) -> Range:
    """The range that a static scheme gives to a layer's input."""
    if calibration.method == "minmax":
        return Range(float(inputs.min()), float(inputs.max()))
    tail = 100 - calibration.percentile
    low, high = np.percentile(inputs, [tail, 100 - tail])
    return Range(float(low), float(high))


def static_ranges(layers: Iterable[Layer], calibration: Calibration) -> dict[str, Range]:
    """Ranges by layer name, without the `leave_share` of inputs that static activations hurt most.

    The measure is the error at a layer's output, relative to that output, when only its input is rounded; layers
    that share an input are left or kept together, by the worst of them.
    """
    ranges: dict[str, tuple[str, Range]] = {}
    errors: dict[str, float] = {}
    for layer in layers:
        found = activation_range(layer.inputs, calibration)
        matrix = layer.weight.read().T
        error = relative_error(layer.inputs @ matrix, found.round_trip(layer.inputs) @ matrix)
        ranges[layer.name] = layer.group, found
        errors[layer.group] = max(error, errors.get(layer.group, 0.0))
    left = sorted(errors, key=lambda group: errors[group], reverse=True)[: int(len(errors) * calibration.leave_share)]
    return {name: found for name, (group, found) in ranges.items() if group not in left}


def relative_error(exact: FloatArray, rounded: FloatArray) -> float:
    """Energy of the error over energy of the signal."""
    energy = float(np.square(exact, dtype=np.float64).sum())
    return float(np.square(exact - rounded, dtype=np.float64).sum()) / max(energy, 1e-30)


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one layer's weights does to its output, on real inputs."""

    layer: str
    weights: int
    errors: Mapping[int, float]
    """Relative output error by bits."""


def sensitivity(layers: Iterable[Layer], budget: Budget, block: int) -> Iterator[Sensitivity]:
    """Measure each layer at the budget's two widths."""
    for layer in layers:
        weight, inputs = (_pad_columns(x, block) for x in (layer.weight.read(), layer.inputs))
        exact = inputs @ weight.T
        rounded = {
            budget.low: quantize(weight, budget.low, block, "mse"),
            budget.high: quantize(weight, budget.high),
        }
        errors = {bits: relative_error(exact, inputs @ q.dequantize().T) for bits, q in rounded.items()}
        yield Sensitivity(layer.name, weight.size, errors)


def _pad_columns(x: FloatArray, multiple: int) -> FloatArray:
    return np.pad(x, [(0, 0), (0, -x.shape[1] % multiple)])


def spend(measured: list[Sensitivity], budget: Budget, costs: Mapping[int, float]) -> frozenset[str]:
    """The layers that get the higher width: most error removed a bit first, until the budget is spent.

    `costs` is what a weight takes in the target's file at each width, scales counted.
    """
    total = sum(one.weights for one in measured)
    room = (budget.mean_bits - costs[budget.low]) * total / (costs[budget.high] - costs[budget.low])
    chosen = set()
    gain = {one.layer: (one.errors[budget.low] - one.errors[budget.high]) / one.weights for one in measured}
    for one in sorted(measured, key=lambda one: gain[one.layer], reverse=True):
        if one.weights <= room:
            chosen.add(one.layer)
            room -= one.weights
    return frozenset(chosen)
