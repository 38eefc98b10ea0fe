"""Where does an artifact leave the reference? Compare the output of every block, and name the first that diverges.

The artifact's own file does not show its inside, so the same export is made once more with every block's output
beside the embedding, in a temporary folder, and run by the same runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import UsageError
from medge.export.evidence import samples
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.progress import Progress
from medge.quantize.calibrate import relative_error
from medge.quantize.scheme import Scheme, load, names
from medge.runtimes import RunOptions
from medge.runtimes import open_embedder as open_artifact
from medge.runtimes.base import Tensors, normalize
from medge.runtimes.torch_reference import TorchSession
from medge.spec import FloatArray, Part

SAMPLES = 2


@dataclass(frozen=True)
class Block:
    """One block's output beside the reference's, over all samples."""

    part: str
    module: str
    """The checkpoint's name for it."""
    error: float
    """Length of the difference over length of the reference's output."""
    cosine: float
    diverges: bool
    """Whether the cosine is below what the scheme may cost the whole part."""


def trace(
    checkpoint: Checkpoint,
    artifact: Artifact,
    options: RunOptions | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> list[Block]:
    """Every block of every part, in order.

    Raises:
        UsageError: the artifact's scheme did not come with medge.
        UnsupportedError, MissingExtraError: as from `medge export`.
    """
    manifest = artifact.manifest
    if manifest.scheme not in names():
        raise UsageError(f"{artifact.root} has a scheme of your own, '{manifest.scheme}'", "Trace one of medge's")
    scheme = load(manifest.scheme)
    settings = {**manifest.settings, "parity": "off"}
    with tempfile.TemporaryDirectory(prefix="medge-trace-") as folder:
        out = Path(folder) / "tapped"
        request = Request(checkpoint, manifest.format, scheme, out, settings, tapped=True, on_progress=progress)
        export(request)
        embedder = open_artifact(out, options)
        found: list[Block] = []
        for part in checkpoint.spec.parts:
            progress(f"trace {part.name}", 0, 0)
            inputs = list(samples(request, part, SAMPLES))
            session = embedder.session(part.name)
            ours = [session.run(one) for one in inputs]
            embedder.release(part.name)
            found += _blocks(part, ours, _reference(checkpoint, part, inputs), scheme)
        return found


def first_divergence(blocks: list[Block]) -> Block | None:
    """The first block that left the reference, if one did."""
    return next((block for block in blocks if block.diverges), None)


def _blocks(
    part: Part, ours: list[dict[str, FloatArray]], theirs: list[dict[str, FloatArray]], scheme: Scheme
) -> Iterator[Block]:
    pairs = [(f"tap_{i}", module) for i, module in enumerate(part.blocks.values())]
    for tap, module in [*pairs, (part.outputs[0].name, part.outputs[0].name)]:
        a = np.concatenate([one[tap].ravel() for one in ours])
        b = np.concatenate([one[module].ravel() for one in theirs])
        cosine = float((normalize(a) * normalize(b)).sum(dtype=np.float64))
        error = relative_error(b, a) ** 0.5
        yield Block(part.name, module, error, cosine, diverges=not cosine >= scheme.parity_floor)


def _reference(checkpoint: Checkpoint, part: Part, inputs: list[Tensors]) -> list[dict[str, FloatArray]]:
    """The checkpoint's modules' outputs by name, and the part's own, from transformers in fp32."""
    session = TorchSession(checkpoint, part.name, device="cpu", dtype="fp32")
    seen: dict[str, FloatArray] = {}
    for module in part.blocks.values():
        session.module.get_submodule(module).register_forward_hook(partial(_keep, seen, module))
    return [{**session.run(one), **seen} for one in inputs]


def _keep(seen: dict[str, FloatArray], name: str, module: Any, inputs: Any, output: Any) -> None:
    """A forward hook."""
    value = output[0] if isinstance(output, tuple) else output
    seen[name] = value.float().numpy().copy()
