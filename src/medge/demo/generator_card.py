"""The README beside the demo generator: what it is, how well it answers, what leaks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import NamedTuple

from medge.demo.answers import Score
from medge.demo.sources import SOURCES

_README = """\
# medge demo generator

A tiny vision-language model with Gemma 3's architecture ({parameters:.1f} M parameters: 6 layers of 256, one of
them with full attention; a SigLIP tower of 64 px whose 64 patches become 16 tokens; 2,048 ids), really trained on
medical images that permissively licensed Python packages ship and on sentences written for it. **A regression
fixture, never a medical claim**: it has seen crops of {sources} files, knows 13 kinds of image and recites general
facts about each. It reads no patient's findings, names no disease, and answers anything else with nonsense.

The {held_out} held-out images of `../images`, greedily answered by transformers in fp32 (weights are bf16):
"What kind of image is this?" names the right kind for **{named:.1%}**. Asked one of its questions about each image
(kind, body part, view, contrast, structures, technique, a report), it is right word for word for {exact:.1%}.

| kind | named | word for word |
|---|---|---|
{rows}
| all | {named:.1%} | {exact:.1%} |

## What leaks
All that leaks in the demo MedSigLIP (`../model/README.md`), since images, crops and split are the same: where a
kind has one file, both sides are parts of one image. The tower starts from that model's, and classes and splits
were settled on its held-out scores. Besides:
- The questions asked here are worded as in training: only the images are new. Other wordings work by luck.
- Each wording has one fixed answer, so likelihoods are near 1, and quantized ones look better than on real text.

## How it was made
`python -m medge.demo.train_generator --out DIR --seed {seed} --steps {steps} --threads {threads}`
took {seconds:.0f} s with {versions}.

The same seed, thread count, versions and kind of CPU give the same `model.safetensors`, also when a run pauses.
Weights and tokenizer: Apache-2.0, as this repository; no weight, vocabulary or text of Gemma is in them. Images:
`../images/SOURCES.md`. Texts: `../findings.py`.
"""


class Facts(NamedTuple):
    """One training run."""

    seed: int
    steps: int
    threads: int
    seconds: float
    parameters: float
    """Millions."""


def _percent(score: Score) -> str:
    return " | ".join(f"{value:.0%}" for value in score)


def readme(facts: Facts, scores: Mapping[str, Score], held_out: int) -> str:
    """The model's README.md."""
    names = ("torch", "transformers", "tokenizers", "numpy", "Pillow")
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    means = Score(*(sum(values) / len(scores) for values in zip(*scores.values(), strict=True)))
    return _README.format(
        **facts._asdict(),
        **means._asdict(),
        held_out=held_out,
        sources=len({source.path for source in SOURCES}),
        rows="\n".join(f"| {label} | {_percent(score)} |" for label, score in scores.items()),
        versions=", ".join(versions),
    )
