"""Chat models in GGUF on llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from medge.manifest import Artifact
from medge.runtimes.base import RunOptions, physical_cores
from medge.runtimes.generate import context_size
from medge.runtimes.llama_context import Context
from medge.runtimes.llama_model import Model
from medge.runtimes.llama_sampler import Sampler
from medge.runtimes.llama_vision import Vision, check_tower
from medge.runtimes.loop import DECODER, VISION, Engine, LoopGenerator, Opened
from medge.runtimes.onnx_backend import SPEED
from medge.runtimes.onnx_vision import OnnxVision
from medge.runtimes.prefix import Encoder
from medge.runtimes.watch import Watch


class LlamaGenerator(LoopGenerator):
    """A `Generator`. Weights stay mapped from the file. Not a medical device."""

    def __init__(self, artifact: Artifact, options: RunOptions) -> None:
        """Open a chat artifact.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            UsageError: a context outside what the model was made for, or more than memory holds.
            CorruptError: the artifact contradicts itself, or llama.cpp cannot load it.
        """
        opened, threads, watch = Opened.of(artifact), options.threads or physical_cores(), Watch()
        context = context_size(options, opened.chat)
        self._model = model = Model(artifact.part_path(DECODER))
        native = Context(model, context, threads, watch, opened.chat.image_tokens if opened.image else 0)
        tower = _tower(artifact, opened, model, options, watch) if opened.image else None
        engine = Engine(_name(model), model, native, tower, partial(Sampler, model, native), watch)
        super().__init__(opened.chat, opened.image, opened.template, context, engine)

    def close(self) -> None:
        """See `Generator.close`."""
        super().close()
        self._model.close()


def _tower(
    artifact: Artifact, opened: Opened, model: Model, options: RunOptions, watch: Watch
) -> Callable[[], Encoder]:
    """llama.cpp's tower, or the one that an artifact has in ONNX because llama.cpp's is slow."""
    assert opened.image is not None  # noqa: S101 - the caller asked
    path, tokens = artifact.part_path(VISION), opened.chat.image_tokens
    if path.suffix == ".onnx":
        return partial(OnnxVision, path, SPEED, opened.image, tokens, options, watch)
    check_tower(path, opened.image.size)
    return partial(Vision, path, model, options.threads or physical_cores(), tokens, watch)


def _name(model: Model) -> str:
    device = "gpu" if model.api.llama_supports_gpu_offload() else "cpu"
    return f"llama.cpp (llama-cpp-python {model.api.__version__}) {device}"
