"""Tracing: a broken block is found and named, a sound one is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.errors import UsageError
from medge.export.onnx_ops import OnnxOps
from medge.export.trace import first_divergence, trace
from medge.manifest import Artifact
from medge.quantize.scheme import Rule, Scheme

Run = Callable[..., Artifact]
Cli = Callable[..., tuple[int, str, str]]


def test_blocks_are_the_checkpoint_s_modules_in_order(run_export: Run, checkpoint: Path) -> None:
    blocks = trace(Checkpoint.open(checkpoint), run_export("fp32"))
    assert [block.module for block in blocks if block.part == "image_encoder"] == [
        "vision_model.embeddings",
        "vision_model.encoder.layers.0",
        "vision_model.encoder.layers.1",
        "vision_model.post_layernorm",
        "image_embeds",
    ]
    assert all(block.error < 1e-4 for block in blocks)
    assert first_divergence(blocks) is None


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_broken_block_is_named(
    layer: int, run_export: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gelu = OnnxOps.gelu_tanh
    broken = f"text_model.encoder.layers.{layer}."

    def relu(self: OnnxOps, x: str, at: str) -> str:
        return self.graph.node("Relu", [x], f"{at}.relu") if at.startswith(broken) else gelu(self, x, at)

    monkeypatch.setattr(OnnxOps, "gelu_tanh", relu)
    first = first_divergence(trace(Checkpoint.open(checkpoint), run_export("fp32")))
    assert first is not None
    assert first.module == broken.rstrip(".")


def test_quantization_alone_does_not_diverge(run_export: Run, checkpoint: Path) -> None:
    blocks = trace(Checkpoint.open(checkpoint), run_export("int8"))
    assert first_divergence(blocks) is None
    assert all(1e-5 < block.error < 0.2 for block in blocks if ".layers." in block.module)


def test_a_scheme_of_one_s_own_cannot_be_read_back(run_export: Run, checkpoint: Path) -> None:
    mine = Scheme(name="mine", title="", activations="none", rules=(Rule(match=".*", bits=32),))
    with pytest.raises(UsageError, match="a scheme of your own"):
        trace(Checkpoint.open(checkpoint), run_export(mine))


def test_the_verb(run_export: Run, checkpoint: Path, cli: Cli) -> None:
    root = run_export("fp32").root
    code, stdout, _ = cli("parity", checkpoint, root, "--trace", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert found["first"] is None
    assert np.mean([block["cosine"] for block in found["blocks"]]) > 0.9999
    code, stdout, stderr = cli("parity", checkpoint, root, "--trace")
    assert code == 0
    assert "vision_model.encoder.layers.1" in stdout
    assert "No block diverges" in stderr
    code, _, stderr = cli("parity", checkpoint, "--trace")
    assert code == 2
    assert "Name exactly one" in stderr
