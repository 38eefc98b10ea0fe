"""The Core ML exporter: an architecture written against `Ops` becomes one ML program a part, made anywhere.

The program is written directly with coremltools' builder, which checks each operation's types and shapes: no
torch, no tracing, and none of the passes that turn the tanh GELU into the erf form or skip weights whose size no
block divides. The batch is 1 and every shape is fixed, which the Neural Engine needs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medge.errors import UnsupportedError
from medge.export.base import PartJob, Support, Written
from medge.export.coreml_package import facts, write_package
from medge.export.coreml_program import Target, Toolkit, start, toolkit
from medge.manifest import Format
from medge.quantize.calibrate import Range
from medge.quantize.coreml import StoredWeights, refusal, refusal_ios17, stored_bits
from medge.quantize.scheme import Rule, Scheme
from medge.spec import AnySpec, BuildOptions, Ops, Part, Weight


@dataclass
class CoremlOps:
    """`medge.spec.Ops` over coremltools' Vars."""

    builder: Any
    weights: StoredWeights
    scheme: Scheme
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Calibrated input ranges by layer name; a layer without one keeps float activations."""

    def patches(self, pixels: Any, weight: Weight, bias: Weight, at: str) -> Any:
        """A strided convolution, then (1, D, H, W) -> (1, N, D)."""
        kernel = weight.read()
        y = self.builder.conv(
            x=pixels,
            weight=self.weights.floats(f"{at}.weight", kernel),
            bias=self.weights.floats(f"{at}.bias", bias.read()),
            strides=list(kernel.shape[2:]),
            pad_type="valid",
            name=f"{at}.conv",
        )
        y = self.builder.reshape(x=y, shape=[1, len(kernel), -1], name=f"{at}.flat")
        return self.builder.transpose(x=y, perm=[0, 2, 1], name=f"{at}.out")

    def embedding(self, ids: Any, table: Weight, at: str) -> Any:
        """Rows of a table; up to 8 bits: int8 rows with a scale each."""
        rule = self.scheme.rule(at)
        rows = Rule(match="", bits=8) if rule.bits <= 8 else rule
        stored = self.weights.matrix(at, table, rows)
        return self.builder.gather(x=stored, indices=ids, axis=0, validate_indices=False, name=f"{at}.out")

    def add(self, x: Any, y: Any, at: str) -> Any:
        """A residual."""
        return self.builder.add(x=x, y=y, name=f"{at}.out")

    def add_weight(self, x: Any, y: Weight, at: str) -> Any:
        """A position embedding."""
        return self.builder.add(x=x, y=self.weights.floats(f"{at}.weight", y.read()[None]), name=f"{at}.out")

    def layer_norm(self, x: Any, gain: Weight, bias: Weight, eps: float, at: str) -> Any:
        """MIL's own layer_norm."""
        return self.builder.layer_norm(
            x=x,
            axes=[-1],
            gamma=self.weights.floats(f"{at}.weight", gain.read()),
            beta=self.weights.floats(f"{at}.bias", bias.read()),
            epsilon=self._scalar(eps),
            name=f"{at}.out",
        )

    def linears(self, x: Any, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[Any]:
        """Stored by the scheme's rules; where the input has a calibrated range, it passes through 8 bits once."""
        first = next(iter(layers))
        if first in self.ranges and self.scheme.rule(first).bits <= 8:
            x = self._through_integers(x, self.ranges[first], first)
        return [self._linear(x, at, weight, bias) for at, (weight, bias) in layers.items()]

    def gelu_tanh(self, x: Any, at: str) -> Any:
        """MIL's gelu in its tanh form."""
        return self.builder.gelu(x=x, mode="TANH_APPROXIMATION", name=f"{at}.out")

    def attention(self, q: Any, k: Any, v: Any, heads: int, width: int, at: str) -> Any:
        """One operation from iOS 18 on; before, two products and a softmax."""
        names = (f"{at}.{n}" for n in ("query", "key", "value"))
        query, key, value = (self._heads(x, heads, name) for x, name in zip((q, k, v), names, strict=True))
        if self.weights.ios18:
            y = self.builder.scaled_dot_product_attention(query=query, key=key, value=value, name=f"{at}.attended")
        else:
            query = self.builder.mul(x=query, y=self._scalar((width // heads) ** -0.5), name=f"{at}.scaled")
            y = self.builder.matmul(x=query, y=key, transpose_y=True, name=f"{at}.scores")
            y = self.builder.softmax(x=y, axis=-1, name=f"{at}.probabilities")
            y = self.builder.matmul(x=y, y=value, name=f"{at}.attended")
        y = self.builder.transpose(x=y, perm=[0, 2, 1, 3], name=f"{at}.tokens")
        return self.builder.reshape(x=y, shape=[1, q.shape[1], width], name=f"{at}.out")

    def attention_pool(self, x: Any, scores: Weight, value: tuple[Weight, Weight], at: str) -> Any:
        """Softmax over the tokens a head, the tokens' mean a head, then the head's own slice of the projection."""
        by_token = np.ascontiguousarray(scores.read().T)
        weight, heads = value[0].read(), len(by_token)
        y = self.builder.linear(x=x, weight=self.weights.floats(f"{at}.scores", by_token), name=f"{at}.scores.tokens")
        y = self.builder.transpose(x=y, perm=[0, 2, 1], name=f"{at}.scores.heads")
        y = self.builder.softmax(x=y, axis=-1, name=f"{at}.probabilities")
        y = self.builder.matmul(x=y, y=x, name=f"{at}.means")  # (1, H, D)
        y = self.builder.expand_dims(x=y, axes=[2], name=f"{at}.means.row")
        slices = self.weights.floats(f"{at}.v_proj.weight", weight.reshape(1, heads, -1, weight.shape[1]))
        y = self.builder.matmul(x=y, y=slices, transpose_y=True, name=f"{at}.values")  # (1, H, 1, D / H)
        y = self.builder.reshape(x=y, shape=[1, 1, len(weight)], name=f"{at}.joined")
        bias = self.weights.floats(f"{at}.v_proj.bias", value[1].read())
        return self.builder.add(x=y, y=bias, name=f"{at}.out")

    def token(self, x: Any, index: int, at: str) -> Any:
        """One token of each sequence."""
        _, tokens, width = x.shape
        first = index % tokens
        return self.builder.slice_by_index(
            x=x,
            begin=[0, first, 0],
            end=[1, first + 1, width],
            squeeze_mask=[False, True, False],
            name=f"{at}.out",
        )

    def output(self, x: Any, name: str) -> Any:
        """The value as float32 under its public name."""
        if self.weights.half:
            return self.builder.cast(x=x, dtype="fp32", name=name)
        return self.builder.identity(x=x, name=name)

    def _linear(self, x: Any, at: str, weight: Weight, bias: Weight | None) -> Any:
        stored = self.weights.matrix(at, weight, self.scheme.rule(at))
        added = None if bias is None else self.weights.floats(f"{at}.bias", bias.read())
        return self.builder.linear(x=x, weight=stored, bias=added, name=f"{at}.out")

    def _through_integers(self, x: Any, found: Range, at: str) -> Any:
        scale, zero = found.affine()
        scale = np.maximum(scale.astype(np.float16), np.finfo(np.float16).smallest_subnormal)  # 0 does not compile
        levels = self.builder.quantize(
            input=x, scale=scale, zero_point=zero, output_dtype="uint8", name=f"{at}.input.levels"
        )
        return self.builder.dequantize(input=levels, scale=scale, zero_point=zero, name=f"{at}.input")

    def _heads(self, x: Any, heads: int, name: str) -> Any:
        """(1, N, D) -> (1, H, N, D / H)."""
        _, tokens, width = x.shape
        x = self.builder.reshape(x=x, shape=[1, tokens, heads, width // heads], name=f"{name}.split")
        return self.builder.transpose(x=x, perm=[0, 2, 1, 3], name=name)

    def _scalar(self, value: float) -> Any:
        return np.float16(value) if self.weights.half else np.float32(value)


class CoremlExporter:
    """Writes image_encoder.mlpackage, text_encoder.mlpackage, …"""

    format: Format = "coreml"
    extra = "coreml"
    operators = (Ops,)

    def parts(self, spec: AnySpec) -> tuple[Part, ...]:
        """All: each is a graph."""
        return spec.parts

    def supports(self, spec: AnySpec, part: Part, scheme: Scheme) -> Support:
        """Whether MIL has an operation for every rule. Dynamic activations are computed in fp16, which is finer."""
        for rule in scheme.rules:
            found = refusal(rule)
            if found is not None:
                return Support(False, *found)
        return Support(True)

    def stored_bits(self, rule: Rule) -> float:
        """Bits a weight."""
        return stored_bits(rule)

    def write(self, job: PartJob, folder: Path) -> Written:
        """Build the part's program, and save it.

        Raises:
            UnsupportedError: weights beyond float16, or a rule that the target's operations cannot store.
        """
        target = Target(job.settings.get("target", "ios18"), job.settings.get("input", "array"))
        _require_target(job.scheme, target)
        tools = toolkit()
        function = _function(job, target, tools)
        job.on_step(f"save {job.part.name}.mlpackage", 0, 0)
        package = write_package(job, target, tools, function, folder / f"{job.part.name}.mlpackage")
        del function
        gc.collect()  # a program is full of cycles, and would keep all weights of this part while the next is built
        files = [str(path.relative_to(folder).as_posix()) for path in package]
        return Written(files, facts(package[0].parent))

    def session(self, scheme: Scheme) -> dict[str, str]:
        """Core ML has no settings of its own."""
        return {}

    def tools(self) -> dict[str, str]:
        """Versions of what wrote the files."""
        return {"coremltools": version("coremltools")}


def _require_target(scheme: Scheme, target: Target) -> None:
    for rule in scheme.rules if target.name == "ios17" else ():
        reason = refusal_ios17(rule)
        if reason:
            raise UnsupportedError(
                f"Scheme '{scheme.name}' needs iOS 18: iOS 17 stores {reason}",
                "Use --set target=ios18 or --scheme int8",
            )


def _function(job: PartJob, target: Target, tools: Toolkit) -> Any:
    half = any(rule.bits != 32 for rule in job.scheme.rules)
    function = start(tools, job.part, target)
    with function:
        weights = StoredWeights(tools.builder, tools.small, half, target.name == "ios18")
        ops = CoremlOps(tools.builder, weights, job.scheme, job.ranges)
        inputs = dict(function.inputs)
        if half and "pixel_values" in inputs:
            inputs["pixel_values"] = tools.builder.cast(x=inputs["pixel_values"], dtype="fp16", name="pixels")
        outputs = job.graph(ops, inputs, BuildOptions(mlp_multiple=_multiple(job.scheme)))
        function.set_outputs([ops.output(value, name) for name, value in outputs])
    return function


def _multiple(scheme: Scheme) -> int:
    """What the MLP's width must be a multiple of: every block, and every group of channels that share a palette."""
    return math.lcm(scheme.block, *(rule.group or 1 for rule in scheme.rules))
