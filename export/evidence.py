"""What a scheme must know before it can quantize: activation ranges and layer sensitivity, measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from medge.export.observe import observe
from medge.export.request import Request
from medge.quantize.calibrate import Layer, Range, Sensitivity, sensitivity, spend, static_ranges
from medge.quantize.scheme import Scheme
from medge.runtimes.base import Tensors
from medge.runtimes.images import load_image
from medge.runtimes.preprocess import preprocess
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.samples import sample_texts
from medge.spec import Part


@dataclass(frozen=True)
class Evidence:
    """A scheme with nothing left to measure."""

    scheme: Scheme
    ranges: dict[str, dict[str, Range]] = field(default_factory=dict)
    """Part -> layer -> input range."""
    layers: dict[str, str] = field(default_factory=dict)
    """What the measurement decided, layer by layer, for the manifest."""


def gather(request: Request, work: Path) -> Evidence:
    """Measure what the scheme asks for; nothing, for most."""
    scheme = request.scheme
    if scheme.calibration is None and scheme.budget is None:
        return Evidence(scheme)
    ranges: dict[str, dict[str, Range]] = {}
    measured: list[Sensitivity] = []
    for part in request.checkpoint.spec.parts:
        layers = _observe(request, part, work)
        if scheme.calibration is not None:
            ranges[part.name] = static_ranges(layers, scheme.calibration)
        if scheme.budget is not None:
            low = [layer for layer in layers if scheme.rule(layer.name).bits == scheme.budget.low]
            measured += sensitivity(low, scheme.budget, scheme.block)
    return _decide(scheme, ranges, measured)


def _decide(scheme: Scheme, ranges: dict[str, dict[str, Range]], measured: list[Sensitivity]) -> Evidence:
    layers = {name: "static" for found in ranges.values() for name in found}
    if scheme.budget is not None:
        high = spend(measured, scheme.budget)
        layers |= {
            one.layer: f"{scheme.budget.high if one.layer in high else scheme.budget.low} bits" for one in measured
        }
        scheme = scheme.with_high_layers(high)
    return Evidence(scheme, ranges, layers)


def _observe(request: Request, part: Part, work: Path) -> list[Layer]:
    wanted = request.scheme.calibration or request.scheme.budget
    assert wanted is not None  # noqa: S101 - the caller asked
    samples = _samples(request, part, wanted.samples)
    on_sample = partial(request.counter(f"observe {part.name}", len(samples)), 1)
    return observe(request.checkpoint, part, samples, work / "observe", on_sample)


def _samples(request: Request, part: Part, count: int) -> Sequence[Tensors]:
    spec = request.checkpoint.spec
    if part.inputs[0].name == "pixel_values":
        image = spec.image.model_copy(update={"variant": request.variant})
        pixels = (preprocess(load_image(path), image) for path in request.calibration_images(count))
        return [{"pixel_values": np.ascontiguousarray(x[None])} for x in pixels]
    tokenizer = SiglipTokenizer(request.checkpoint.tokenizer_file(), spec.tokenizer)
    return [{"input_ids": ids[None]} for ids in tokenizer(sample_texts(count))]
