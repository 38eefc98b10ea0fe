"""Chat models in ONNX on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from medge.manifest import Artifact
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import context_size
from medge.runtimes.guidance import array_sampler
from medge.runtimes.loop import VISION, Engine, LoopGenerator, Opened
from medge.runtimes.onnx_backend import OnnxBackend
from medge.runtimes.onnx_decoder import OnnxDecoder
from medge.runtimes.onnx_vision import OnnxVision
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.runtimes.watch import Watch


class OnnxGenerator(LoopGenerator):
    """A `Generator`. Not a medical device."""

    def __init__(self, artifact: Artifact, options: RunOptions) -> None:
        """Open a chat artifact.

        Raises:
            MissingExtraError: tokenizers is not installed.
            UsageError: a context outside what the artifact was made for, or more than memory holds.
            CorruptError: the artifact contradicts itself, or ONNX Runtime cannot load it.
        """
        opened, watch, name = Opened.of(artifact), Watch(), OnnxBackend().name
        context = context_size(options, opened.chat)
        decoder = OnnxDecoder(artifact, context, options, watch)
        vocabulary = Vocabulary(artifact.file(VOCABULARY), decoder.vocabulary_size)
        tower: Callable[[], OnnxVision] | None = None
        if opened.image:
            path, settings = artifact.part_path(VISION), artifact.manifest.session
            tower = partial(OnnxVision, path, settings, opened.image, opened.chat.image_tokens, options, watch)
        engine = Engine(name, vocabulary, decoder, tower, array_sampler(vocabulary, opened.chat, decoder), watch)
        super().__init__(opened.chat, opened.image, opened.template, context, engine)
