"""Rows that super-blocks of 256 do not divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medge.checkpoint import Checkpoint
from medge.export.pipeline import export
from medge.export.request import Request
from medge.export.synth import synthesize
from medge.quantize.scheme import load


def test_they_stay_in_blocks(tmp_path: Path) -> None:
    import gguf

    synthesize("medgemma-27b-text-it", "tiny", tmp_path / "tiny")  # rows of 128 and 256
    export(Request(Checkpoint.open(tmp_path / "tiny"), "gguf", load("int4-k"), tmp_path / "out"))
    tensors: Any = gguf.GGUFReader(tmp_path / "out/decoder.gguf").tensors
    types = {(int(tensor.shape[0]), tensor.tensor_type.name) for tensor in tensors if len(tensor.shape) == 2}
    assert types == {(128, "Q5_1"), (128, "Q8_0"), (256, "Q4_K"), (256, "Q6_K")}
