"""The texts beside the demo model and its images: what they are, where they come from, what leaks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import NamedTuple

from medge.demo.sources import PACKAGES, SOURCES, Region

_README = """\
# medge demo model

A tiny SigLIP (64 px, patch 8, width 96, 4 + 2 layers, 0.8 M parameters) with MedSigLIP's architecture,
really trained on medical images that permissively licensed Python packages ship. **A regression fixture,
never a medical claim**: it has seen crops of {sources} files and knows nothing beyond them.

Zero-shot top-1 on the {held_out_all} held-out images of `../images`, with the folder name as prompt, the
`bigvision` preprocessing and torch in fp32: **{top1:.1%}**.

| class | trained crops | held-out crops | held-out top-1 |
|---|---|---|---|
{rows}

## What leaks
`../sources.toml` lists the pixels of either side. In one file they never meet, and a margin lies between.
Still:
- Where a class has one file, both sides are parts of one image: patient, scanner, stain and often the
  mirrored anatomy are the same.
- The brain template is one volume cut in three planes: a held-out slice shares voxels with trained slices
  of another plane.
- Held-out crops of one file overlap each other, so their number overstates the evidence.

Held-out files of which nothing was trained on: `S0_10slices` (all of axial brain mri), `t1_coronal_slice`
(half of coronal brain mri), `histo` (half of histology).

Classes and splits were settled after two earlier runs had been measured on held-out crops: abdominal and
shoulder MRI, one slice each, were dropped because half a slice did not carry over to the other half; the
held-out coronal and sagittal slices of the template were moved between trained ones; `img3d` was split instead
of being held out whole. So the score is flattered by selection, too.

## How it was made
`python -m medge.demo.train --out DIR --seed {seed} --steps {steps} --threads {threads}`
took {seconds:.0f} s with {versions}.

The same seed, thread count, versions and kind of CPU give the same `model.safetensors`. Weights: Apache-2.0,
as this repository. Images: `../images/SOURCES.md`.
"""

_SOURCES = """\
# Sources of the demo images
The images here are held-out crops, never trained on; a file's name begins with its source's. Fractions
are of width and height: (left, top, right, bottom). Frames are range(start, stop, step).

| package | version | licence |
|---|---|---|
{packages}

| class | package | file | sha256 | trained on | held out |
|---|---|---|---|---|---|
{rows}

## Notices
The brain template (`mni_icbm152_t1_tal_nlin_sym_09a`): Copyright (C) 1993-2004 Louis Collins, McConnell
Brain Imaging Centre, Montreal Neurological Institute, McGill University. Permission to use, copy, modify,
and distribute this software and its documentation for any purpose and without fee is hereby granted,
provided that the above copyright notice appear in all copies. The authors and McGill University make no
representations about the suitability of this software for any purpose. It is provided "as is" without
express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
loss, or injury to subjects or patients resulting from the use or misuse of this software package.
"""


class Run(NamedTuple):
    """One training run."""

    seed: int
    steps: int
    threads: int
    seconds: float


def readme(run: Run, top1: Mapping[str, float], trained: int, held_out: int) -> str:
    """The model's README.md."""
    rows = [f"| {label} | {trained} | {held_out} | {value:.0%} |" for label, value in top1.items()]
    names = ("torch", "transformers", "sentencepiece", "numpy", "Pillow")
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    return _README.format(
        **run._asdict(),
        sources=len({source.path for source in SOURCES}),
        held_out_all=held_out * len(top1),
        top1=sum(top1.values()) / len(top1),
        rows="\n".join(rows),
        versions=", ".join(versions),
    )


def _where(region: Region | None) -> str:
    if region is None:
        return "-"
    frames = f", frames {region.frames}" if region.frames else ""
    return f"{region.box}{frames}"


def sources() -> str:
    """The images' SOURCES.md."""
    packages = [f"| {p.name} | {p.version} | {p.licence} |" for p in PACKAGES.values()]
    rows = [
        f"| {s.label} | {s.package} | `{s.path}` | `{s.sha256}` | {_where(s.train)} | {_where(s.held_out)} |"
        for s in SOURCES
    ]
    return _SOURCES.format(packages="\n".join(packages), rows="\n".join(rows))
