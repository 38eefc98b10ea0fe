"""What the ExecuTorch exporter builds, and what it refuses; parity in every scheme is test_matrix.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.errors import UnsupportedError
from medge.export.base import PartJob
from medge.export.executorch import ExecutorchExporter
from medge.manifest import describe
from medge.quantize.scheme import Rule, load
from medge.spec import TensorSpec, Weight

pytest.importorskip("executorch")

from medge.export import torch_graph
from medge.export.executorch_lower import gelu, lower
from medge.export.torch_graph import ROWS, TILE, Graph, Tensor, TorchOps, tiles
from medge.quantize.executorch import Linears

VALUES = TensorSpec(name="x", dtype="float32", shape=("batch", 8, 16))


def job(checkpoint: Path, part: str, scheme: str, **options: Any) -> PartJob:
    opened = Checkpoint.open(checkpoint)
    return PartJob(opened, opened.spec.part(part), load(scheme), **options)


@pytest.fixture(scope="module")
def text(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], list[int]]:
    """The tiny text tower in int8: its folder, its facts, the steps reported."""
    folder, steps = tmp_path_factory.mktemp("text"), list[int]()
    made = job(checkpoint, "text_encoder", "int8", on_step=lambda stage, done, total: steps.append(done))
    written = ExecutorchExporter().write(made, folder)
    assert written.files == ["text_encoder.pte"]
    return folder, written.facts, steps


def test_the_file_s_facts_say_how_to_run_it(text: tuple[Path, dict[str, str], list[int]]) -> None:
    _, facts, steps = text
    assert facts["method"] == "forward"
    assert facts["inputs"] == "input_ids int64 (1, 64)"
    assert facts["outputs"] == "text_embeds float32 (1, 64)"
    assert float(facts["delegated"].split()[0].rstrip("%")) > 98  # layer norms weigh more in a tiny model
    assert facts["outside"] == "native_layer_norm"
    assert facts["gelu"] == "tanh"
    assert steps == [0, 1, 2, 3, 4]


def test_the_weights_are_stored_in_8_bits(text: tuple[Path, dict[str, str], list[int]], checkpoint: Path) -> None:
    weights = sum(np.prod(s) for n, s in Checkpoint.open(checkpoint).spec.tensors.items() if n.startswith("text"))
    assert (text[0] / "text_encoder.pte").stat().st_size < 1.3 * weights


def test_two_exports_give_the_same_bytes(
    text: tuple[Path, dict[str, str], list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    ExecutorchExporter().write(job(checkpoint, "text_encoder", "int8"), tmp_path)
    name = "text_encoder.pte"
    assert describe(tmp_path, name).sha256 == describe(text[0], name).sha256


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_a_tapped_float_tower_gives_transformers_values(
    scheme: str, checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    from medge.manifest import PartFiles
    from medge.runtimes.base import RunOptions, normalize
    from medge.runtimes.executorch_backend import ExecutorchSession

    made = job(checkpoint, "image_encoder", scheme, tapped=True)
    written = ExecutorchExporter().write(made, tmp_path)
    files = PartFiles(files=(describe(tmp_path, written.files[0]),), inputs=made.part.inputs, outputs=made.outputs)
    session = ExecutorchSession(tmp_path / written.files[0], files, RunOptions())
    found = session.run({"pixel_values": reference.pixels[:1]})
    assert list(found) == [spec.name for spec in made.outputs]
    assert len(found) == 1 + len(made.part.blocks)
    assert all(value.dtype == np.float32 for value in found.values())
    # 1e-5 tells the tanh GELU from the erf one
    np.testing.assert_allclose(
        normalize(found["image_embeds"])[0], reference.image_embeddings[0], atol=1e-5 if scheme == "fp32" else 5e-3
    )


def small(operations: Callable[[Graph, Tensor], Tensor]) -> Any:
    graph = Graph()
    return lower(graph.module([operations(graph, graph.input(VALUES))]), (VALUES,))


def test_a_heavy_operation_outside_xnnpack_is_refused_by_name() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=(8, 16))
    graph = Graph()
    x = graph.input(spec)
    y = graph.call("aten.linear.default", x.node, x.node)  # XNNPACK takes linear layers of constant weights only
    lowered = lower(graph.module([Tensor(y, (8, 8))]), (spec,))
    with pytest.raises(UnsupportedError, match=r"XNNPACK left (linear|mm|addmm) \(") as caught:
        lowered.require_delegated()
    assert "fallback=allow" in str(caught.value)


def test_xnnpack_s_own_gelu_is_told_from_ours() -> None:
    own = small(lambda graph, x: Tensor(graph.call("aten.gelu.default", x.node), x.shape))
    ours = small(lambda graph, x: TorchOps(graph, Linears(graph, load("fp32"))).gelu_tanh(x, "gelu"))
    assert gelu(own) == "erf"
    assert gelu(ours) == "tanh"
    assert ours.delegated == 1


def test_gelu_is_the_tanh_approximation() -> None:
    import torch

    graph = Graph()
    x = graph.input(VALUES)
    module = graph.module([TorchOps(graph, Linears(graph, load("fp32"))).gelu_tanh(x, "gelu")])
    values = torch.linspace(-12, 12, 128).reshape(1, 8, 16)
    expected = torch.nn.functional.gelu(values, approximate="tanh")
    torch.testing.assert_close(module(values)[0], expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_wide_layer_in_pieces_gives_what_it_gives_whole(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((1, 8, 64)).astype(np.float32))
    arrays = {"w1": rng.standard_normal((320, 64)) / 8, "b1": rng.standard_normal(320) / 8,
              "w2": rng.standard_normal((64, 320)) / 18, "b2": rng.standard_normal(64) / 8}  # fmt: skip
    weights = {name: Weight(name, partial(np.asarray, array, np.float32)) for name, array in arrays.items()}

    def mlp(piece: int) -> tuple[torch.Tensor, int]:
        monkeypatch.setattr(torch_graph, "PIECE", piece)
        graph = Graph()
        ops = TorchOps(graph, Linears(graph, load(scheme)))
        x = graph.input(TensorSpec(name="x", dtype="float32", shape=(1, 8, 64)))
        (hidden,) = ops.linears(x, {"fc1": (weights["w1"], weights["b1"])})
        (y,) = ops.linears(ops.gelu_tanh(hidden, "gelu"), {"fc2": (weights["w2"], weights["b2"])})
        module = graph.module([y])
        return module(values)[0], sum(node.target is torch.ops.aten.linear.default for node in module.graph.nodes)

    (whole, two), (split, many) = mlp(1 << 20), mlp(8 * 80)
    w1, b1, w2, b2 = (torch.from_numpy(weights[name].read()) for name in ("w1", "b1", "w2", "b2"))
    exact = torch.nn.functional.gelu(values @ w1.T + b1, approximate="tanh") @ w2.T + b2
    assert (two, many) == (2, 8)
    errors = [float((y - exact).norm() / exact.norm()) for y in (whole, split)]
    assert errors[1] < 1.1 * errors[0] < (0.02 if scheme == "int8" else 0.2)


@pytest.mark.parametrize(
    ("heads", "queries", "keys"), [(16, 1024, 1024), (12, 64, 64), (16, 1, 1 << 21), (5, 900, 900)]
)
def test_tiles_fit_and_divide_the_heads(heads: int, queries: int, keys: int) -> None:
    group, rows = tiles(heads, queries, keys)
    assert heads % group == 0
    assert rows == min(queries, ROWS)
    assert group == 1 or group * rows * keys <= TILE


def test_attention_in_tiles_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 10, 16))
    values = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0))
    split = values.view(1, 10, 4, 4).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(split, split, split).transpose(1, 2).reshape(1, 10, 16)
    monkeypatch.setattr("medge.export.torch_graph.ROWS", 4)
    monkeypatch.setattr("medge.export.torch_graph.TILE", 2 * 4 * 10)
    graph = Graph()
    x = graph.input(spec)
    module = graph.module([TorchOps(graph, Linears(graph, load("fp32"))).attention(x, x, x, 4, 16, "attn")])
    assert sum("bmm" in str(node.target) for node in module.graph.nodes) == 2 * 2 * 3
    torch.testing.assert_close(module(values)[0], expected)


def test_work_is_counted() -> None:
    graph = Graph()
    x = graph.input(VALUES)
    weight = graph.weight("w", np.ones((4, 16), np.float32))
    y = Tensor(graph.call("aten.linear.default", x.node, weight), (1, 8, 4))
    lowered = lower(graph.module([y]), (VALUES,))
    assert lowered.work.total() == 2 * 8 * 16 * 4
    assert not lowered.left.total()


def test_a_weight_beyond_float16_is_refused() -> None:
    graph = Graph(half=True)
    with pytest.raises(UnsupportedError, match="'big' holds values beyond float16"):
        graph.weight("big", np.array([1e6], np.float32))


def test_a_scale_costs_two_bytes_a_block() -> None:
    exporter = ExecutorchExporter()
    assert exporter.stored_bits(Rule(match=".*", bits=4, block=32)) == 4.5
    assert exporter.stored_bits(Rule(match=".*", bits=8)) == 8


@pytest.mark.parametrize("scheme", ["palette4", "palette6", "int5", "int4-affine", "int4-nl"])
def test_what_xnnpack_lacks_is_refused_with_a_reason(scheme: str, checkpoint: Path) -> None:
    spec = Checkpoint.open(checkpoint).spec
    found = ExecutorchExporter().supports(spec, spec.parts[0], load(scheme))
    assert not found.ok
    assert found.reason.startswith("XNNPACK")
    assert found.nearest in ("int8", "int4")


def test_asking_what_is_supported_imports_nothing_heavy() -> None:
    code = "import sys, medge.export.executorch; assert not {'torch', 'executorch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
