"""The ONNX exporter: an architecture written against `Ops` becomes one graph a part.

The graph is written directly, not traced: no torch, one tensor in memory, and each operator is the one that
ONNX Runtime has a fast kernel for. Opens in plain `onnxruntime`: attention takes com.microsoft's
MultiHeadAttention, GroupQueryAttention or MatMulIntegerToFloat, contrib operators of every ONNX Runtime build, phones
included.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from medge.export import range_scan
from medge.export.base import PartJob, Support, Written
from medge.export.onnx_decoder import OnnxDecoderOps
from medge.export.onnx_graph import DECODER_OPSET, OPSET, Graph
from medge.export.onnx_ops import OnnxOps
from medge.export.onnx_projector import OnnxProjectorOps
from medge.manifest import Format
from medge.quantize.onnx import UNFOLD, Linears
from medge.quantize.onnx_blocks import BlockLinears
from medge.quantize.scheme import Rule, Scheme
from medge.runtimes.onnx_backend import SPEED
from medge.spec import AnySpec, BuildOptions, ChatSpec, DecoderOps, Ops, Part, ProjectorOps

RESIDUAL_SCALE = 1 / 64
"""Of a decoder's residual stream in float16: a factor of 40 to spare over the largest value measured."""
LONG = 256
"""Tokens from which attention in integers beats the fused operator; below, its many small nodes cost more."""


def _integer_attention(scheme: Scheme, part: Part) -> int | None:
    """The part's tokens, where attention in integers is asked for and pays."""
    return part.tokens if scheme.attention == 8 and scheme.activations != "none" and part.tokens >= LONG else None


def _gelu(path: Path) -> dict[str, str]:
    """Which GELU the written file holds, where it holds one."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    forms = (onnx.helper.get_node_attr_value(node, "approximate") for node in nodes if node.op_type == "Gelu")
    found = ", ".join(sorted({form.decode() for form in forms}))
    return {"gelu": found} if found else {}


def _cannot(rule: Rule, scheme: Scheme) -> Support:
    """Why ONNX Runtime has no fast kernel for a rule, and the nearest scheme that it has one for."""
    integer = rule.bits < 16
    cases = (
        (rule.method == "kmeans", "ONNX Runtime has no kernel that looks weights up in a palette", "int8"),
        (rule.method == "nonlinear", "ONNX has no 4-bit type whose levels are uneven", "int4"),
        (rule.method == "superblock", "ONNX has no blocks of blocks", "int4"),
        (rule.bfloat, "ONNX Runtime computes in float32 on a CPU: float16 holds more of a weight's digits", "fp16"),
        (rule.bits in (5, 6), f"ONNX has no {rule.bits}-bit type", "int8"),
        (integer and not rule.symmetric, "ONNX Runtime's fast int8 kernels take signed weights without offset", "int4"),
        (
            integer and scheme.activations == "none",
            f"{rule.bits}-bit weights under float activations run slower than fp32 in ONNX Runtime",
            "int8",
        ),
        (
            rule.bits == 8 and rule.block is not None,
            "ONNX Runtime's 8-bit kernels take one scale an output channel: leave out block",
            "int8",
        ),
    )
    return next((Support(False, reason, nearest) for holds, reason, nearest in cases if holds), Support(True))


def _cannot_chat(scheme: Scheme) -> Support:
    """What medge does not measure on a chat model."""
    if scheme.calibration is not None:
        return Support(False, "medge calibrates no ranges on chat models yet", "int8")
    if scheme.budget is not None:
        return Support(False, "medge measures no sensitivity on chat models yet", "int4")
    return Support(True)


class OnnxExporter:
    """Writes image_encoder.onnx, text_encoder.onnx, …, each with its .data file."""

    format: Format = "onnx"
    extra = "export"
    operators = (Ops, ProjectorOps, DecoderOps)

    def parts(self, spec: AnySpec) -> tuple[Part, ...]:
        """All: each is a graph."""
        return spec.parts

    def supports(self, spec: AnySpec, part: Part, scheme: Scheme) -> Support:
        """Not weights in integers under float activations."""
        found = [_cannot(rule, scheme) for rule in reversed(scheme.rules)]  # the last rule is for most layers
        if isinstance(spec, ChatSpec):
            found.append(_cannot_chat(scheme))
        return next((support for support in found if not support.ok), Support(True))

    def stored_bits(self, rule: Rule) -> float:
        """A 2-byte scale a block; a scale an output channel is nothing."""
        return rule.bits + (16 / rule.block if rule.block else 0)

    def write(self, job: PartJob, folder: Path) -> Written:
        """Stream the part into a graph; checked by onnx's own checker before it counts.

        Raises:
            RegressedError: a decoder that is to be fit for float16 passes its range.
        """
        path, options = folder / f"{job.part.name}.onnx", _options(job)
        facts = _scanned(job, options)
        with Graph(path, OPSET if job.part.operators is Ops else DECODER_OPSET) as graph:
            inputs = {spec.name: spec.name for spec in job.part.inputs}
            for name, value in job.graph(_operations(graph, job), inputs, options):
                graph.node("Identity", [value], name)
            facts |= {"reads": ", ".join(sorted(graph.borrowed))} if graph.borrowed else {}
            files = graph.save(job.part.name, job.part.inputs, job.outputs)
        onnx.checker.check_model(path, full_check=True)
        return Written(files, facts | _gelu(path))

    def session(self, scheme: Scheme) -> dict[str, str]:
        """4-bit files need their weights unfolded at load; no file gains from a fusion with a slow kernel."""
        return SPEED | (UNFOLD if any(rule.bits == 4 for rule in scheme.rules) else {})

    def tools(self) -> dict[str, str]:
        """Versions of what wrote the files."""
        return {"onnx": onnx.__version__, "opset": str(OPSET)}


def _operations(graph: Graph, job: PartJob) -> OnnxOps:
    if job.part.operators is DecoderOps:
        return OnnxDecoderOps(graph, BlockLinears(graph, job.scheme), context=job.context)
    linear, tokens = Linears(graph, job.scheme, job.ranges), _integer_attention(job.scheme, job.part)
    if job.part.operators is ProjectorOps:
        return OnnxProjectorOps(graph, linear, tokens, decoder=graph.path.with_name("decoder.onnx"))
    return OnnxOps(graph, linear, tokens)


def _options(job: PartJob) -> BuildOptions:
    """A file of 16-bit weights is fit to be computed in float16, whoever computes it."""
    half = any(rule.bits == 16 for rule in job.scheme.rules[-1:])
    return BuildOptions(mlp_multiple=job.scheme.block, residual_scale=RESIDUAL_SCALE if half else 1.0)


def _scanned(job: PartJob, options: BuildOptions) -> dict[str, str]:
    """The largest value of a decoder that is to be fit for float16, found before it is written."""
    if options.residual_scale == 1 or job.part.operators is not DecoderOps:
        return {}
    peak = range_scan.check(job.checkpoint, options, job.on_step)
    return {"largest value": f"{peak:.4g}", "residual scale": f"1/{1 / options.residual_scale:g}"}
