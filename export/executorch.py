"""The ExecuTorch exporter: a .pte a part for XNNPACK, which phones' CPUs run.

The graph is written against torch.fx (torch_graph.py), lowered by executorch's own tools (executorch_lower.py),
and refused when something heavy stayed outside XNNPACK. One method, batch 1, float32 in and out.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from medge.export.base import PartJob, Support, Written
from medge.manifest import Format
from medge.quantize.calibrate import Range
from medge.quantize.executorch import Linears, refusal
from medge.quantize.scheme import Rule, Scheme
from medge.spec import AnySpec, BuildOptions, Ops, Part, TensorSpec


def _shapes(specs: tuple[TensorSpec, ...]) -> str:
    sizes = (", ".join("1" if isinstance(size, str) else str(size) for size in spec.shape) for spec in specs)
    return "; ".join(f"{spec.name} {spec.dtype} ({size})" for spec, size in zip(specs, sizes, strict=True))


def _build(job: PartJob) -> Any:
    """The part as a torch.fx.GraphModule. Half precision is a property of the whole graph."""
    from medge.export.torch_graph import Graph, TorchOps

    graph = Graph(half=all(rule.bits == 16 for rule in job.scheme.rules))
    ops = TorchOps(graph, Linears(graph, job.scheme, job.ranges, _output_ranges(job)))
    inputs = {spec.name: graph.input(spec) for spec in job.part.inputs}
    outputs = job.graph(ops, inputs, BuildOptions(mlp_multiple=job.scheme.block))
    return graph.module([value for _, value in outputs])


def _output_ranges(job: PartJob) -> dict[str, Range]:
    if job.scheme.calibration is None:
        return {}
    from medge.export.executorch_observe import output_ranges

    return output_ranges(job, job.scheme.calibration)


class ExecutorchExporter:
    """Writes image_encoder.pte, text_encoder.pte, …"""

    format: Format = "executorch"
    extra = "executorch"
    operators = (Ops,)

    def parts(self, spec: AnySpec) -> tuple[Part, ...]:
        """All: each is a graph."""
        return spec.parts

    def supports(self, spec: AnySpec, part: Part, scheme: Scheme) -> Support:
        """Every family whose parts are written against `Ops`, in the widths that XNNPACK has kernels for."""
        found = refusal(scheme)
        return Support(False, *found) if found else Support(True)

    def stored_bits(self, rule: Rule) -> float:
        """A 2-byte scale a block; a scale an output channel is nothing."""
        return rule.bits + (16 / rule.block if rule.block else 0)

    def write(self, job: PartJob, folder: Path) -> Written:
        """Build the graph from the weights as they are read, lower it, and say what XNNPACK took.

        Raises:
            UnsupportedError: a heavy operation stayed outside XNNPACK, and settings do not allow that.
        """
        from medge.export import executorch_lower as lowering  # first: it registers the quantized operations

        def on_stage(done: int) -> None:
            job.on_step(f"lower {job.part.name}", done, lowering.STAGES)

        on_stage(0)
        lowered = lowering.lower(_build(job), job.part.inputs, on_stage)
        if job.settings.get("fallback") != "allow":
            lowered.require_delegated()
        name = f"{job.part.name}.pte"
        lowering.write(lowered, folder / name)
        shapes = {"inputs": _shapes(job.part.inputs), "outputs": _shapes(job.outputs)}
        facts = {"method": lowering.METHOD} | shapes | lowering.facts(lowered)
        del lowered
        lowering.release()
        on_stage(lowering.STAGES)
        return Written([name], facts)

    def session(self, scheme: Scheme) -> dict[str, str]:
        """None: XNNPACK chooses its kernels when it loads the file."""
        return {}

    def tools(self) -> dict[str, str]:
        """Versions of what wrote the files."""
        return {name: version(name) for name in ("executorch", "torch")}
