"""From a torch.fx module to a .pte: torch.export, XNNPACK's partitioner, and a look at what came out.

Imports torch and executorch, 10 s: import this module where a part is written, not before.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medge.errors import UnsupportedError
from medge.export.torch_graph import single
from medge.spec import TensorSpec


@contextmanager
def _quiet() -> Iterator[None]:
    """torch and executorch warn of their own internals on the way, at a user who can do nothing about it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _shared_constants() -> Iterator[None]:
    """to_edge deep-copies the whole program, 1.7 GB of constants that nobody writes to: let copies share them."""
    copy = torch.Tensor.__deepcopy__

    def share(tensor: Any, memo: dict[int, Any]) -> Any:
        return tensor if type(tensor) is torch.Tensor else copy(tensor, memo)

    torch.Tensor.__deepcopy__ = share
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = copy


with _quiet():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # and the quantized operations
    from executorch.exir.backend.utils import is_same_node

METHOD = "forward"
"""The only method of a file: what executor_runner runs, which takes the first."""
HEAVY = ("linear", "addmm", "mm", "bmm", "convolution")
STAGES = 4


@dataclass(frozen=True)
class Lowered:
    """What became of a graph."""

    program: Any
    """executorch's program manager, to be written."""
    work: Counter[str]
    """Floating-point operations by operation, of what XNNPACK runs."""
    left: Counter[str]
    """The same of what ExecuTorch's own kernels run."""

    @property
    def delegated(self) -> float:
        """Share of the work that XNNPACK does."""
        return self.work.total() / max(1, self.work.total() + self.left.total())

    def require_delegated(self) -> None:
        """Nothing heavy was left behind.

        Raises:
            UnsupportedError: it was, with the operations.
        """
        heavy = sorted(name for name in self.left if name in HEAVY)
        if heavy:
            share = 1 - self.delegated
            raise UnsupportedError(
                f"XNNPACK left {', '.join(heavy)} ({share:.1%} of the work) to kernels 10 times slower",
                "Use scheme fp32 or int8, or --set fallback=allow",
            )


def lower(
    module: torch.fx.GraphModule, inputs: Sequence[TensorSpec], on_stage: Callable[[int], None] = lambda done: None
) -> Lowered:
    """Lower a module for a batch of one, calling on_stage with how many of STAGES are done."""
    with _quiet(), _shared_constants(), torch.no_grad():
        examples = tuple(torch.zeros(single(spec), dtype=getattr(torch, spec.dtype)) for spec in inputs)
        exported = torch.export.export(module.eval(), examples, strict=False)
        on_stage(1)
        # The verifier knows neither delegated linear layers nor embedding_byte; the runtime's own check follows.
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], compile_config=config)
        on_stage(2)
        work, left = count(edge.exported_program())
        program = edge.to_executorch()
        on_stage(3)
    return Lowered(program, work, left)


def write(lowered: Lowered, path: Path) -> None:
    """Write the .pte."""
    with path.open("wb") as file:
        lowered.program.write_to_file(file)


def release() -> None:
    """Give a written program's memory back: executorch's node cache holds every graph that it has compared."""
    is_same_node.cache_clear()
    gc.collect()  # programs are cyclic


def count(program: Any) -> tuple[Counter[str], Counter[str]]:
    """Floating-point operations by operation: inside XNNPACK's delegates, and outside."""
    work: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for node in _calls(program.graph):
        if _name(node) == "executorch_call_delegate":
            for inner in _calls(getattr(program.graph_module, node.args[0].target).original_module.graph):
                work[_name(inner)] += _flops(inner)
        else:
            left[_name(node)] += _flops(node)
    return work, left


def _calls(graph: Any) -> Iterator[Any]:
    return (node for node in graph.nodes if node.op == "call_function")


def _name(node: Any) -> str:
    """ "aten.linear.default" -> "linear"."""
    parts = getattr(node.target, "__name__", str(node.target)).split(".")
    return parts[1] if len(parts) > 2 else parts[0]


_ELEMENTWISE = {"native_layer_norm": 8, "_softmax": 5, "sigmoid": 4}
"""Operations an element, roughly; others that compute have one, those that only move data none."""
_MOVES = (
    "view",
    "permute",
    "slice",
    "cat",
    "getitem",
    "embedding",
    "unsqueeze",
    "squeeze",
    "expand",
    "alloc",
    "select",
)


def _flops(node: Any) -> int:
    name, value = _name(node), node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    if value is None or name.startswith(_MOVES):
        return 0
    numbers = math.prod(value.shape)
    if name in HEAVY:
        matrix = node.args[2 if name == "addmm" else 1].meta["val"].shape
        return int(2 * numbers * (math.prod(matrix[1:]) if name in ("linear", "convolution") else matrix[-2]))
    return int(numbers * _ELEMENTWISE.get(name, 1))


def gelu(lowered: Lowered) -> str:
    """Which GELU the file holds: XNNPACK's own operation is the erf form; ours is made of a sigmoid."""
    operations = lowered.work | lowered.left
    return "erf" if "gelu" in operations else "tanh" if "sigmoid" in operations else "none"


def facts(lowered: Lowered) -> dict[str, str]:
    """What a user should know of the file."""
    outside = sorted(name for name, work in lowered.left.items() if work)
    return {
        "delegated": f"{lowered.delegated:.2%} of FLOPs",
        "outside": ", ".join(outside),
        "gelu": gelu(lowered),
    }
