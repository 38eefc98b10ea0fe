"""A scheme says what becomes how many bits, and nothing of formats or packing.

Schemes are TOML files beside this module; a user's own file is named by its path. Rules match layer names
("vision_model.encoder.layers.3.mlp.fc2"), the first match wins, and "leave alone" (32 bits) is a rule too.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from medge.errors import UsageError
from medge.spec import Frozen

Activations = Literal["none", "dynamic", "static"]
_FOLDER = Path(__file__).parent / "schemes"


class Rule(Frozen):
    """How the layers whose whole name matches a regular expression are stored."""

    match: str
    bits: Literal[32, 16, 8, 6, 5, 4]
    block: int | None = Field(default=None, ge=16, le=256)
    """Input columns that share one scale; None: one scale an output channel."""
    symmetric: bool = True
    """Whether zero is the middle of the levels; else each block has an offset beside its scale."""
    bfloat: bool = False
    """For 16 bits: bfloat16, which has float32's range, in place of float16, which has more of its digits."""
    method: Literal["absmax", "mse", "kmeans", "nonlinear", "superblock"] = "absmax"
    """How levels are chosen: evenly, by the largest weight or the least squared error over a grid; as a palette of
    k-means centres; unevenly, denser around zero, scaled by the least squared error; or in blocks whose scales and
    offsets are quantized too, a super-block of 256 at a time."""
    depth: Literal["all", "sensitive"] = "all"
    """`sensitive`: only in the first and last eighth of the layers and every third between, where llama.cpp's mixes
    spend more bits. See `Scheme.for_layers`."""
    group: int | None = Field(default=None, ge=1)
    """Output channels that share one palette (kmeans); None: the whole tensor."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"'{value}' is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if self.group is not None and self.method != "kmeans":
            raise ValueError("only palettes (method = 'kmeans') have a group")
        if self.method == "kmeans" and (self.block is not None or self.bits > 8):
            raise ValueError("palettes have at most 8 bits, and no block")
        if self.bits >= 16 and (self.block is not None or not self.symmetric):
            raise ValueError("floats have neither blocks nor offsets")
        if self.bfloat and self.bits != 16:
            raise ValueError("only 16 bits can be bfloat")
        return self


class Calibration(Frozen):
    """How activation ranges are read off real images and texts, for static activations."""

    samples: int = Field(default=32, gt=0)
    method: Literal["percentile", "minmax"] = "percentile"
    percentile: float = Field(default=99.99, gt=50, le=100)
    leave_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the layers, those with the largest measured error, that keep dynamic activations."""


class Budget(Frozen):
    """Bits chosen layer by layer, by measured sensitivity, for layers whose rule has the lower width."""

    low: Literal[4] = 4
    high: Literal[8] = 8
    mean_bits: float = Field(gt=4, lt=9)
    """The size budget: mean bits a weight over those layers, as the format stores them, scales counted."""
    samples: int = Field(default=8, gt=0)


class Scheme(Frozen):
    """An ordered list of rules, what happens to activations, and what must be measured first."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    activations: Activations
    attention: Literal[32, 8] = 32
    """Bits of attention's own two products; 8 only where a format has kernels for it and sequences are long."""
    parity_floor: float = Field(default=0.0, ge=0, le=1)
    """Least cosine to the reference that an export may show. It catches broken exports; `medge check` is the gate."""
    rules: tuple[Rule, ...] = Field(min_length=1)
    calibration: Calibration | None = None
    budget: Budget | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Scheme:
        if (self.activations == "static") != (self.calibration is not None):
            raise ValueError("static activations and a [calibration] table need each other")
        return self

    def rule(self, layer: str) -> Rule:
        """The first rule whose expression matches the whole layer name.

        Raises:
            UsageError: none does; end a scheme with match = ".*".
        """
        for rule in self.rules:
            if re.fullmatch(rule.match, layer):
                return rule
        raise UsageError(f"Scheme '{self.name}' has no rule for '{layer}'", "End it with match = '.*'")

    @property
    def block(self) -> int:
        """The multiple that rows must have for every rule's block to divide them."""
        return math.lcm(*(rule.block or 1 for rule in self.rules))

    @property
    def digest(self) -> str:
        """Identity of what the scheme says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def for_layers(self, count: int) -> Scheme:
        """The scheme for a model of `count` layers: rules for sensitive layers name them."""
        return self.model_copy(update={"rules": tuple(_spelled(rule, count) for rule in self.rules)})

    def with_high_layers(self, layers: frozenset[str]) -> Scheme:
        """The scheme after a budget was spent: `layers` keep the higher width, as rules in front."""
        assert self.budget is not None  # noqa: S101 - only called by who spent it
        high = tuple(Rule(match=re.escape(layer), bits=self.budget.high) for layer in sorted(layers))
        return self.model_copy(update={"rules": high + self.rules, "budget": None})


def _spelled(rule: Rule, count: int) -> Rule:
    if rule.depth == "all":
        return rule
    eighth = count // 8
    chosen = [i for i in range(count) if i < eighth or i >= 7 * count // 8 or (i - eighth) % 3 == 2]
    numbers = "|".join(map(str, chosen))
    return rule.model_copy(update={"match": rf"(?=.*\.layers\.(?:{numbers})\.){rule.match}", "depth": "all"})


@cache
def names() -> tuple[str, ...]:
    """The schemes that come with medge, from the most exact to the smallest."""
    order = (
        *("fp32", "fp16", "bf16", "int8", "int8-static", "palette6", "int5"),
        *("int4-mixed", "int4", "int4-affine", "int4-nl", "int4-k", "palette4"),
    )
    found = {path.stem for path in _FOLDER.glob("*.toml")}
    return tuple(sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)))


def load(name: str | Path) -> Scheme:
    """A scheme by name, or from a TOML file.

    Raises:
        UsageError: no such scheme, or an invalid file.
    """
    path = Path(name) if str(name).endswith(".toml") else _FOLDER / f"{name}.toml"
    if path.parent == _FOLDER and path.stem not in names():
        raise UsageError(f"'{name}' is no scheme", f"Schemes: {', '.join(names())}, or a path to a TOML file")
    try:
        return Scheme.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"Scheme file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Scheme file {path} is no TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"Scheme file {path} is invalid at '{where}': {first['msg']}") from None
