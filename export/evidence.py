"""What a scheme must know before it can quantize: activation ranges and layer sensitivity, measured once.

What a layer's input looks like, and what rounding the layer costs, depends on no file format: one measurement,
kept in the user's cache under the weights' hash, serves all of them. Only the spending of a budget knows its
target, by what a weight costs in the format's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from medge.export import importance
from medge.export.observe import observe
from medge.export.request import Request
from medge.manifest import write_json
from medge.quantize.calibrate import Layer, Range, Sensitivity, sensitivity, spend, static_ranges
from medge.quantize.importance import ImportanceMatrix
from medge.quantize.scheme import Budget, Rule, Scheme
from medge.runtimes.base import Tensors
from medge.runtimes.images import load_image
from medge.runtimes.preprocess import preprocess
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.samples import digest, sample_texts
from medge.spec import Part

_MEASURED = TypeAdapter(list[Sensitivity])


@dataclass(frozen=True)
class Evidence:
    """A scheme with nothing left to measure."""

    scheme: Scheme
    ranges: dict[str, dict[str, Range]] = field(default_factory=dict)
    """Part -> layer -> input range."""
    layers: dict[str, str] = field(default_factory=dict)
    """What the measurement decided, layer by layer, for the manifest."""
    importance: ImportanceMatrix | None = None


StoredBits = Callable[[Rule], float]
"""A format's cost: bits that a weight takes in its file under a rule, scales counted."""


def gather(request: Request, stored_bits: StoredBits, work: Path) -> Evidence:
    """Measure what the scheme asks for; nothing, for most."""
    scheme = request.scheme
    ranges = {}
    if scheme.calibration is not None:
        for part in request.checkpoint.spec.parts:
            layers = _observe(request, part, scheme.calibration.samples, work)
            ranges[part.name] = static_ranges(layers, scheme.calibration)
    decided = {name: "static" for found in ranges.values() for name in found}
    if scheme.budget is not None:
        scheme, bits = _spend(request, scheme.budget, stored_bits, work)
        decided |= bits
    return Evidence(scheme, ranges, decided, importance.gather(request, work))


def samples(request: Request, part: Part, count: int) -> Iterator[Tensors]:
    """Real inputs of a part, a batch of one each: the calibration images, or prompts."""
    spec = request.checkpoint.spec
    if part.inputs[0].name == "pixel_values":
        image = spec.image.model_copy(update={"variant": request.variant})
        for path in request.calibration_images(count):
            yield {"pixel_values": np.ascontiguousarray(preprocess(load_image(path), image)[None])}
        return
    tokenizer = SiglipTokenizer(request.checkpoint.tokenizer_file(), spec.tokenizer)
    for ids in tokenizer(sample_texts(count)):
        yield {"input_ids": ids[None]}


def _spend(request: Request, budget: Budget, stored_bits: StoredBits, work: Path) -> tuple[Scheme, dict[str, str]]:
    """The scheme with the budget spent, and each layer's bits."""
    scheme = request.scheme
    measured = [one for part in request.checkpoint.spec.parts for one in _sensitivity(request, part, budget, work)]
    open_ = {one.layer: rule for one in measured if (rule := scheme.rule(one.layer)).bits == budget.low}
    low = max((stored_bits(rule) for rule in open_.values()), default=float(budget.low))
    costs = {budget.low: low, budget.high: stored_bits(Rule(match="", bits=budget.high))}
    high = spend([one for one in measured if one.layer in open_], budget, costs)
    bits = {layer: f"{budget.high if layer in high else budget.low} bits" for layer in open_}
    return scheme.with_high_layers(high), bits


def _sensitivity(request: Request, part: Part, budget: Budget, work: Path) -> list[Sensitivity]:
    """Every linear layer of a part, from the cache or measured now."""
    path = _cache_path(request, part, budget)
    with suppress(OSError, ValidationError):  # absent or damaged: a cache may be either
        return _MEASURED.validate_json(path.read_bytes())
    layers = _observe(request, part, budget.samples, work)
    advance = partial(request.counter(f"sensitivity {part.name}", len(layers)), 1)
    measured = []
    for one in sensitivity(layers, budget, block=request.scheme.block):
        measured.append(one)
        advance()
    with suppress(OSError):  # a full disk or a read-only home costs time at the next export, and nothing now
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _MEASURED.dump_python(measured, mode="json"))
    return measured


def _cache_path(request: Request, part: Part, budget: Budget) -> Path:
    import platformdirs

    images = request.calibration_images(budget.samples)
    inputs = digest(images, sample_texts(budget.samples))[:16]
    name = f"{request.checkpoint.sha256[:32]}-{part.name}-{request.variant}-{inputs}-{request.scheme.block}.json"
    return platformdirs.user_cache_path("medge") / "sensitivity" / name


def _observe(request: Request, part: Part, count: int, work: Path) -> list[Layer]:
    inputs: Sequence[Tensors] = list(samples(request, part, count))
    on_sample = partial(request.counter(f"observe {part.name}", len(inputs)), 1)
    return observe(request.checkpoint, part, inputs, work / "observe", on_sample)
