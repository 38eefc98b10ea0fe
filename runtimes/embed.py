"""The one Embedder over every format: images and texts in, embeddings and zero-shot scores out.

Scores follow the SigLIP paper (arXiv:2303.15343): logit = exp(scale) * cosine + bias. Zero-shot follows the
published MedSigLIP evaluation: cosine between the image and the mean of a class's prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, UsageError
from medge.runtimes.base import Session, normalize
from medge.runtimes.images import ImageLike, load_image
from medge.runtimes.preprocess import preprocess
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.spec import FloatArray, ImageSpec, TokenizerSpec

T = TypeVar("T")

IMAGE, TEXT = "image_encoder", "text_encoder"
SCALARS = ("logit_scale", "logit_bias")
"""What scoring needs beside the embeddings."""
CACHED_TEXTS = 4096
"""About 20 MB of MedSigLIP's embeddings: who serves texts of others would else fill the memory with them."""


class Embedder:
    """A dual encoder: `embed_images`, `embed_texts`, `classify`.

    Embeddings are (N, D) float32 rows of length one. Text embeddings are cached by text, the latest CACHED_TEXTS of
    them. Not a medical device.
    """

    def __init__(
        self,
        open_part: Callable[[str], Session],
        *,
        name: str,
        image: ImageSpec,
        tokenizer: tuple[Path, TokenizerSpec],
        scalars: Mapping[str, float],
        root: Path,
        batch_size: int = 1,
    ) -> None:
        self.name = name
        self.image = image
        self.scalars = scalars
        self.root = root
        """The artifact or checkpoint folder."""
        self.batch_size = batch_size
        """Inputs a run. One, by default: dynamic int8 scales a batch by its largest value, so an input's embedding
        would depend on its neighbours, and a CPU gains nothing from batches of this size."""
        self._open_part = open_part
        self._sessions: dict[str, Session] = {}
        self._tokenizer_source = tokenizer
        self._tokenizer: SiglipTokenizer | None = None
        self._texts: dict[str, FloatArray] = {}

    def session(self, part: str) -> Session:
        """The part's session, loaded at its first use."""
        if part not in self._sessions:
            self._sessions[part] = self._open_part(part)
        return self._sessions[part]

    def release(self, part: str) -> None:
        """Drop a part's session and its memory; the next use loads it again."""
        self._sessions.pop(part, None)

    @property
    def tokenizer(self) -> SiglipTokenizer:
        """The text contract, loaded at its first use."""
        if self._tokenizer is None:
            self._tokenizer = SiglipTokenizer(*self._tokenizer_source)
        return self._tokenizer

    def pixels(self, images: Sequence[ImageLike], frame: int = 0) -> FloatArray:
        """(N, 3, S, S) float32 in [-1, 1], by the artifact's preprocessing variant."""
        return np.stack([preprocess(load_image(image, frame), self.image) for image in images])

    def embed_images(
        self, images: Sequence[ImageLike], on_batch: Callable[[int], None] | None = None, *, frame: int = 0
    ) -> FloatArray:
        """(N, D), rows of length one. `on_batch(count)` is called after each batch, for progress.

        `frame` picks one of each multi-frame file, from 0.

        Raises:
            UsageError: no image, or one that cannot be read.
        """
        if not images:
            raise UsageError("No image given")
        return self._embed(IMAGE, (self.pixels(batch, frame) for batch in _batches(images, self.batch_size)), on_batch)

    def embed_texts(self, texts: Sequence[str]) -> FloatArray:
        """(N, D), rows of length one.

        Raises:
            UsageError: no text.
        """
        if not texts:
            raise UsageError("No text given")
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            ids = (self.tokenizer(batch) for batch in _batches(new, self.batch_size))
            self._texts |= zip(new, self._embed(TEXT, ids, None), strict=True)
        rows = np.stack([self._texts[text] for text in texts])
        for text in list(self._texts)[:-CACHED_TEXTS]:
            del self._texts[text]
        return rows

    def class_embeddings(self, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> FloatArray:
        """(L, D): the mean of a label's prompt embeddings over the templates, at length one.

        Raises:
            UsageError: no label, a repeated one, or a template without exactly one "{}".
        """
        check_labels(labels, templates)
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        each = self.embed_texts(prompts).reshape(len(labels), len(templates), -1)
        return normalize(each.mean(1))

    def classify(
        self,
        images: Sequence[ImageLike],
        labels: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        multilabel: bool = False,
    ) -> FloatArray:
        """(N, L) zero-shot scores: a softmax over the labels, or each label's own sigmoid with `multilabel`."""
        classes = self.class_embeddings(labels, templates)
        return self.scores(self.embed_images(images), classes, multilabel=multilabel)

    def scores(self, images: FloatArray, classes: FloatArray, *, multilabel: bool = False) -> FloatArray:
        """Scores of embeddings: (N, D), (L, D) -> (N, L)."""
        logits = images @ classes.T * np.float32(np.exp(self.scalars["logit_scale"]))
        if multilabel:
            logits += np.float32(self.scalars["logit_bias"])
            return np.asarray(1 / (1 + np.exp(-logits)), np.float32)
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(exponents / exponents.sum(1, keepdims=True), np.float32)

    def _embed(self, part: str, batches: Iterable[NDArray[Any]], on_batch: Callable[[int], None] | None) -> FloatArray:
        session, name = self.session(part), "pixel_values" if part == IMAGE else "input_ids"
        rows = []
        for batch in batches:
            (output,) = session.run({name: batch}).values()
            if not np.isfinite(output).all():
                raise CorruptError(f"{part} of {self.root} gives NaN or infinity", "Run: medge verify ARTIFACT")
            rows.append(normalize(output))
            if on_batch:
                on_batch(len(batch))
        return np.concatenate(rows)


def check_labels(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Labels and templates that zero-shot classification can use."""
    if not labels:
        raise UsageError("No label given", "Pass at least one, for example --label 'pleural effusion'")
    if len(set(labels)) < len(labels):
        raise UsageError("A label is given twice")
    bad = [template for template in templates if template.count("{}") != 1]
    if bad or not templates:
        raise UsageError("A prompt template needs '{}' once, where the label goes")


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
