"""What medge is measured against: the same checkpoint through other tools, each made and run as its users would.

Needs the `peers` extra. Every function takes the checkpoint's image tower; text towers are too small to matter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medge.errors import MedgeError, require
from medge.runtimes.torch_reference import TorchSession
from medge.spec import FloatArray

Run = Callable[[FloatArray], FloatArray]
"""(1, 3, S, S) -> (1, D), not normalized."""


def _tower(checkpoint: Path) -> Any:
    from medge.checkpoint import Checkpoint

    return TorchSession(Checkpoint.open(checkpoint), "image_encoder", device="cpu", dtype="fp32", onednn=False).module


def make_plain_onnx(checkpoint: Path, out: Path) -> None:
    """The export that a PyTorch user makes: torch.onnx.export on the tower, no medge code in the graph."""
    import torch

    model = _tower(checkpoint)
    pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    program = torch.onnx.export(_pooled(model), (pixels,), dynamo=True, input_names=["pixel_values"], verbose=False)
    assert program is not None  # noqa: S101 - with dynamo=True there is always one
    program.save(str(out), external_data=True)


def make_openvino(checkpoint: Path, out: Path) -> None:
    """OpenVINO with int8 weights (NNCF, data-free), to be run with bfloat16 activations."""
    import torch

    openvino, nncf = require("openvino", "peers"), require("nncf", "peers")
    model = _tower(checkpoint)
    shape = [1, 3, model.config.image_size, model.config.image_size]
    with torch.no_grad():
        converted = openvino.convert_model(
            _pooled(model), example_input=torch.zeros(shape), input=[("pixel_values", shape)]
        )
    compressed = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_ASYM)
    out.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(compressed, out, compress_to_fp16=False)


def make_optimum(checkpoint: Path, out: Path) -> None:
    """optimum-cli's export of both towers, as documented."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "onnx", "--model", str(checkpoint)]
    command += ["--task", "zero-shot-image-classification", str(out)]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
    if done.returncode:
        raise MedgeError(f"optimum-cli failed: {done.stderr.decode(errors='replace').strip().splitlines()[-1]}")


def _pooled(model: Any) -> Any:
    import torch

    class Pooled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tower = model.vision_model

        def forward(self, pixel_values: Any) -> Any:
            return self.tower(pixel_values).pooler_output

    return Pooled().eval()


def run_torch(checkpoint: Path, threads: int) -> Run:
    """torch fp32, eager with its fused attention."""
    import torch

    from medge.checkpoint import Checkpoint

    torch.set_num_threads(threads)
    session = TorchSession(Checkpoint.open(checkpoint), "image_encoder", device="cpu", dtype="fp32", onednn=False)
    return lambda pixels: session.run({"pixel_values": pixels})["image_embeds"]


def run_plain_onnx(path: Path, threads: int) -> Run:
    """ONNX Runtime with its defaults."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(None, {"pixel_values": pixels})[0])


def run_openvino(path: Path, threads: int) -> Run:
    """OpenVINO in its latency mode with bfloat16 activations."""
    openvino = require("openvino", "peers")
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda pixels: np.array(request.infer({0: pixels})[0])


def run_medge(artifact: Path, threads: int) -> Run:
    """An artifact's image encoder."""
    from medge.runtimes import RunOptions
    from medge.runtimes import open_embedder as open_artifact

    session = open_artifact(artifact, RunOptions(threads=threads)).session("image_encoder")
    return lambda pixels: session.run({"pixel_values": pixels})["image_embeds"]
