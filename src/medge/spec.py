"""What a model is, before any format: its parts, their tensors, its image and text contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medge.errors import UsageError

FloatArray = NDArray[np.float32]
Variant = Literal["bigvision", "hf", "finetune", "serving"]
"""The four official MedSigLIP preprocessings (Google-Health/medsiglip v1.0.0); see runtimes/preprocess.py."""


def variant(value: str) -> Variant:
    """A preprocessing variant by its name.

    Raises:
        UsageError: no such variant.
    """
    if value not in get_args(Variant):
        raise UsageError(f"'{value}' is no preprocessing variant", f"Variants: {', '.join(get_args(Variant))}")
    return cast("Variant", value)


class Frozen(BaseModel):
    """A value type: validated, immutable, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Frozen):
    """A part's input or output. A named dimension ("batch") is free; a number is fixed."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class ImageSpec(Frozen):
    """How an image becomes a tensor: (channels, size, size) float32 in [-1, 1] by (x/255 - mean) / std."""

    size: int = Field(gt=0, le=4096)
    variant: Variant = "bigvision"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class TokenizerSpec(Frozen):
    """How text becomes ids: a SentencePiece file, always padded to `length`."""

    kind: Literal["siglip"] = "siglip"
    file: str = "spiece.model"
    length: int = Field(default=64, gt=0, le=65536)
    pad_id: int = 1
    eos_id: int = 1


class ChatFormat(Frozen):
    """How a conversation becomes tokens. Token strings, since every runtime looks its ids up by itself."""

    template: str = "chat_template.jinja"
    """The checkpoint's own chat template, a file of the artifact."""
    bos: str = "<bos>"
    stop: tuple[str, ...] = ("<end_of_turn>", "<eos>")
    """Tokens that end a turn."""
    image_begin: str = "<start_of_image>"
    image_end: str = "<end_of_image>"
    image_tokens: int = Field(default=256, gt=0)
    """Tokens that an image becomes."""
    context: int = Field(gt=0)
    """Tokens that the model was made for."""


Task = Literal["embed", "generate"]


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint, read when an exporter reaches it, so that memory stays one tensor high.

    `name` is the name that scheme rules match and that artifacts keep.
    """

    name: str
    read: Callable[[], FloatArray]
    rows: Callable[[int], Iterator[NDArray[Any]]] | None = None
    """rows(step): a matrix piece by piece, float32 or the bits of bfloat16 as uint16, for whoever can do without the
    whole: Gemma's embedding table is 2.7 GB. Values that are not finite are the reader's to refuse."""

    def map(self, name: str, change: Callable[[FloatArray], FloatArray]) -> Weight:
        """The tensor after an exact rewrite (a slice, a zero-padding, a fold), still unread."""
        return Weight(name, lambda: change(self.read()))

    def pieces(self, step: int) -> Iterator[NDArray[Any]]:
        """The matrix, about `step` rows at a time where it can be read so; else whole."""
        return self.rows(step) if self.rows else iter([self.read()])


Value = TypeVar("Value")


class Ops(Protocol[Value]):
    """The few operations that the towers are made of. Each format implements them once.

    An architecture is written once against this protocol (models/*.py), and every exporter turns it into
    its own graph. Shapes: B batch, N tokens, D width. `at` names the place, as in the checkpoint.
    """

    def patches(self, pixels: Value, weight: Weight, bias: Weight, at: str) -> Value:
        """(B, 3, S, S) -> (B, N, D): a convolution whose stride is its kernel, tokens in row order."""
        ...

    def embedding(self, ids: Value, table: Weight, at: str) -> Value:
        """(B, N) int64 -> (B, N, D)."""
        ...

    def add(self, x: Value, y: Value, at: str) -> Value:
        """Elementwise sum of two values of one shape (a residual)."""
        ...

    def add_weight(self, x: Value, y: Weight, at: str) -> Value:
        """Sum with a weight that broadcasts over the batch (a position embedding)."""
        ...

    def layer_norm(self, x: Value, gain: Weight, bias: Weight, eps: float, at: str) -> Value:
        """Over the last axis."""
        ...

    def linears(self, x: Value, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[Value]:
        """Linear layers that read the same input: name -> ((out, in) weight, bias). One quantization of x."""
        ...

    def gelu_tanh(self, x: Value, at: str) -> Value:
        """The tanh approximation, which SigLIP and Gemma are trained with; never the erf form."""
        ...

    def attention(self, q: Value, k: Value, v: Value, heads: int, width: int, at: str) -> Value:
        """Bidirectional softmax attention, scale 1/sqrt(D / heads) where D is `width`.

        (B, M, D), (B, N, D), (B, N, D) -> (B, M, D).
        """
        ...

    def attention_pool(self, x: Value, scores: Weight, value: tuple[Weight, Weight], at: str) -> Value:
        """Attention with one constant query: (B, N, D) -> (B, 1, D).

        `scores` (D, H) maps a token to each head's score, query, key projection and scale folded together;
        `value` is the (D, D) projection of values and its bias, heads in row order. Tokens are averaged before
        they are projected, which is the same sum in another order and N times cheaper.
        """
        ...

    def token(self, x: Value, index: int, at: str) -> Value:
        """(B, N, D) -> (B, D): one token; -1 is the last."""
        ...


class ProjectorOps(Ops[Value], Protocol[Value]):
    """What a language model asks of the parts before its decoder: the embedding table, an image tower's projector."""

    def scale(self, x: Value, factor: float, at: str) -> Value:
        """Elementwise product with a number."""
        ...

    def rms_norm(self, x: Value, gain: Weight, eps: float, heads: int, at: str) -> Value:
        """x / sqrt(mean(x²) + eps) · gain over the last axis, or over each of `heads` equal parts of it."""
        ...

    def pool(self, x: Value, side: int, square: int, at: str) -> Value:
        """(B, (side · square)², D), patches in row order, averaged over squares of them: (B, side², D)."""
        ...


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: pair i of a head of width W turns by position / factor · base^(-2i/W)."""

    base: float
    factor: float = 1.0


@dataclass(frozen=True)
class CausalAttention:
    """One layer of attention over all tokens so far, whose keys and values a cache holds."""

    layer: int
    heads: int
    key_heads: int
    """Each serves heads / key_heads query heads."""
    head_width: int
    scale: float
    """Of the scores."""
    rope: Rope
    window: int | None = None
    """Tokens that a token sees, itself counted; None: all before it."""
    images: bool = False
    """Whether an image's tokens, which are then computed at once, also see those after them in that image."""


class DecoderOps(ProjectorOps[Value], Protocol[Value]):
    """The operations of a decoder, computed some tokens at a time (B = 1)."""

    def multiply(self, x: Value, y: Value, at: str) -> Value:
        """Elementwise product of two values of one shape (a gate)."""
        ...

    def causal_attention(self, q: Value, k: Value, v: Value, layer: CausalAttention, at: str) -> Value:
        """Rotate, append keys and values to the layer's cache, attend: (1, N, heads · W), 2 x (1, N, key heads · W)."""
        ...

    def kept(self, x: Value, at: str) -> Value:
        """The last rows, as many as are asked for: a long prompt's logits are wanted only after its last token."""
        ...

    def logits(self, x: Value, table: Weight, at: str) -> Value:
        """(1, N, D) times the embedding table (V, D) transposed: the output matrix is tied to it."""
        ...


class Watched:
    """An `Ops` that remembers what each operation gave, by its place."""

    def __init__(self, ops: Ops[Any]) -> None:
        self._ops = ops
        self.values: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._run, getattr(self._ops, name))

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        value = operation(*arguments)
        if isinstance(arguments[-1], str):  # every operation ends in `at`, but for `linears`
            self.values[arguments[-1]] = value
        return value


@dataclass(frozen=True)
class BuildOptions:
    """Exact rewrites that a format may ask of the architecture."""

    mlp_multiple: int = 1
    """Zero-pad the MLP's hidden width to a multiple of this. Exact: gelu(0) = 0 and fc2's new columns are 0."""
    residual_scale: float = 1.0
    """Multiply a decoder's residual stream by this, a power of two. Exact, since each reader normalizes it first (with
    eps scaled along). Gemma 3's passes float16's largest number: 103,795 was measured on the real 270M."""


Read = Callable[[str], Weight]
"""A checkpoint as the architecture sees it: tensor name -> Weight."""


@dataclass(frozen=True)
class Part:
    """A piece of a model that becomes one graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tokens: int
    """How many tokens attend to each other: what decides how attention is best computed."""
    build: Callable[[Any, Mapping[str, Any], Read, BuildOptions], Any]
    """build(ops, inputs by name, checkpoint, options) -> the part's single output value."""
    operators: type[Any] = Ops
    """The protocol that `build` is written against."""
    blocks: Mapping[str, str] = field(default_factory=dict)
    """Where to look inside, in order: an operation's `at` -> the checkpoint's module whose output it is."""

    def graph(
        self, ops: Ops[Any], inputs: Mapping[str, Any], read: Read, options: BuildOptions, *, tapped: bool = False
    ) -> list[tuple[str, Any]]:
        """The part's output by name and, when tapped, the output of each of its blocks: tap_0, tap_1, …"""
        watched = Watched(ops)
        output = self.build(cast("Ops[Any]", watched), inputs, read, options)
        outputs = [(self.outputs[0].name, output)]
        if tapped:
            outputs += [(f"tap_{i}", watched.values[at]) for i, at in enumerate(self.blocks)]
        return outputs

    def signature(self, *, tapped: bool = False) -> tuple[TensorSpec, ...]:
        """The tensors that `graph` gives."""
        taps = (
            TensorSpec(name=f"tap_{i}", dtype="float32", shape=("batch", "tokens", "width"))
            for i in range(len(self.blocks))
        )
        return (*self.outputs, *taps) if tapped else self.outputs


@dataclass(frozen=True)
class AnySpec:
    """One checkpoint's shape: everything that does not depend on format or scheme."""

    id: str
    hub_id: str
    revision: str
    parts: tuple[Part, ...]
    tensors: Mapping[str, tuple[int, ...]]
    """Every tensor that the checkpoint must hold, and no other."""
    config: Mapping[str, Any]
    """The Hugging Face config.json."""
    task: ClassVar[Task]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(sum(np.prod(shape, dtype=np.int64) for shape in self.tensors.values()))

    def part(self, name: str) -> Part:
        """The part of that name."""
        return next(part for part in self.parts if part.name == name)


@dataclass(frozen=True)
class ModelSpec(AnySpec):
    """A dual encoder: images and texts to embeddings."""

    image: ImageSpec
    tokenizer: TokenizerSpec
    scalars: Mapping[str, str]
    """Manifest scalar name -> checkpoint tensor: what scoring needs (SigLIP's logit scale and bias)."""
    task: ClassVar[Task] = "embed"


@dataclass(frozen=True)
class ChatSpec(AnySpec):
    """A chat model: messages, with images where it has an image tower, to text."""

    image: ImageSpec | None
    chat: ChatFormat
    task: ClassVar[Task] = "generate"
