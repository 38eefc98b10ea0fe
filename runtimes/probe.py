"""A linear probe: logistic regression on image embeddings, kept as plain data beside the artifact.

Source: the MedSigLIP model card's linear probes. File: safetensors with `weight` (L, D), `bias` (L,), and the
labels and the model's weight hash as metadata; no code is ever loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medge.errors import CorruptError, UsageError, require
from medge.spec import FloatArray

FILE = "probe.safetensors"


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression over L labels."""

    labels: tuple[str, ...]
    weight: FloatArray
    """(L, D)"""
    bias: FloatArray
    """(L,)"""
    weights_sha256: str
    """The model whose embeddings it was fitted on."""

    def apply(self, embeddings: FloatArray) -> FloatArray:
        """(N, D) embeddings of length one -> (N, L) probabilities.

        Raises:
            UsageError: the embeddings are of another width.
        """
        if embeddings.shape[1] != self.weight.shape[1]:
            raise UsageError(
                f"The probe takes embeddings of {self.weight.shape[1]}, these have {embeddings.shape[1]}",
                "Fit it again on this model",
            )
        logits = embeddings @ self.weight.T + self.bias
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(exponents / exponents.sum(1, keepdims=True), np.float32)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UsageError: it cannot be written there.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        partial = path.with_name(path.name + ".partial")
        metadata = {"labels": json.dumps(self.labels), "weights_sha256": self.weights_sha256}
        try:
            save_file({"weight": self.weight, "bias": self.bias}, partial, metadata)
            partial.replace(path)
        except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
            with suppress(OSError):
                partial.unlink()
            raise UsageError(f"{path} cannot be written: {error}") from None

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read a file that `save` wrote.

        Raises:
            UsageError: no such file.
            CorruptError: it is no probe, or its shapes contradict its labels.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UsageError(f"{path} does not exist", "Make it with: medge probe fit")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata()
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                labels = tuple(str(label) for label in json.loads(metadata["labels"]))
                probe = cls(labels, weight, bias, metadata["weights_sha256"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{path} is no probe: {error}", "Fit it again") from None
        if weight.ndim != 2 or bias.shape != (len(labels),) or len(weight) != len(labels):
            raise CorruptError(f"{path} contradicts itself: its shapes are not those of its labels", "Fit it again")
        if not np.isfinite(weight).all() or not np.isfinite(bias).all():
            raise CorruptError(f"{path} holds NaN or infinity", "Fit it again")
        return probe


def fit(embeddings: FloatArray, labels: Sequence[str], weights_sha256: str, *, c: float = 1.0, seed: int = 0) -> Probe:
    """Fit on (N, D) embeddings and N labels; `c` is scikit-learn's inverse regularization.

    Raises:
        UsageError: fewer than two labels.
        MissingExtraError: scikit-learn is not installed.
    """
    linear = require("sklearn.linear_model", "eval")
    names = sorted(set(labels))
    if len(names) < 2:
        raise UsageError("A probe needs images of at least two labels")
    model = linear.LogisticRegression(C=c, max_iter=2000, random_state=seed)
    model.fit(embeddings, [names.index(label) for label in labels])
    weight, bias = np.asarray(model.coef_, np.float32), np.asarray(model.intercept_, np.float32)
    if len(names) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
        weight, bias = (np.asarray(np.concatenate([-x, x]) / 2, np.float32) for x in (weight, bias))
    return Probe(tuple(names), np.ascontiguousarray(weight), np.ascontiguousarray(bias), weights_sha256)
