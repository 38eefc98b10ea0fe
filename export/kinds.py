"""What an export of a dual encoder and one of a chat model do differently; the rest is pipeline.py's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from medge.export import importance, parity
from medge.export.genai import CONFIG, genai_config
from medge.export.image_marks import image_mark_flaw
from medge.export.request import Request
from medge.manifest import Parity, write_json
from medge.quantize.scheme import Scheme
from medge.runtimes import open_embedder
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.samples import list_images, sample_root, sample_texts
from medge.spec import ChatSpec, Part

TOKENIZER = (VOCABULARY, "tokenizer_config.json")
"""The second is for other tools: medge needs the first alone."""


class Kind(Protocol):
    """One kind of model."""

    def check(self, request: Request) -> None:
        """Find what is missing or wrong before minutes of work, not after."""
        ...

    def scheme(self, request: Request) -> Scheme:
        """The scheme, made for this model's depth."""
        ...

    def files(self, request: Request, folder: Path) -> list[str]:
        """Write what no part owns; returns the names."""
        ...

    def fields(self, request: Request) -> dict[str, Any]:
        """The manifest's fields of this kind."""
        ...

    def facts(self, request: Request, part: Part) -> dict[str, str]:
        """What a user should know of a part, whatever its format."""
        ...

    def parity(self, request: Request, folder: Path) -> dict[str, Parity]:
        """Compare the artifact with the reference.

        Raises:
            RegressedError: it is broken rather than rounded.
        """
        ...


def of(request: Request) -> Kind:
    """The kind of the request's checkpoint."""
    return Chat() if isinstance(request.checkpoint.any_spec, ChatSpec) else DualEncoder()


class DualEncoder:
    """MedSigLIP: a SentencePiece file, scoring scalars, parity of embeddings."""

    def check(self, request: Request) -> None:
        """The tokenizer reads."""
        SiglipTokenizer(request.checkpoint.tokenizer_file(), request.checkpoint.spec.tokenizer)

    def scheme(self, request: Request) -> Scheme:
        """As asked."""
        return request.scheme

    def files(self, request: Request, folder: Path) -> list[str]:
        """The tokenizer."""
        source = request.checkpoint.tokenizer_file()
        shutil.copyfile(source, folder / source.name)
        return [source.name]

    def fields(self, request: Request) -> dict[str, Any]:
        """Preprocessing, tokenizer, scalars."""
        spec = request.checkpoint.spec
        return {
            "image": spec.image.model_copy(update={"variant": request.variant}),
            "tokenizer": spec.tokenizer,
            "scalars": request.checkpoint.scalars(),
        }

    def facts(self, request: Request, part: Part) -> dict[str, str]:
        """None."""
        return {}

    def parity(self, request: Request, folder: Path) -> dict[str, Parity]:
        """Embeddings of sample images and prompts."""
        count = request.parity_samples
        inputs = parity.Inputs(list_images(sample_root(), count), sample_texts(count))
        on_part = partial(_report, request)
        expected = parity.expected(request.checkpoint, inputs, request.variant, partial(on_part, "reference"))
        found = parity.measure(open_embedder(folder), expected, inputs, partial(on_part, "parity"))
        parity.judge(found, request.scheme)
        return found


def _report(request: Request, stage: str, part: str) -> None:
    request.on_progress(f"{stage} {part}", 0, 0)


class Chat:
    """MedGemma: a chat template."""

    def check(self, request: Request) -> None:
        """There are a chat template, a vocabulary, and what an importance matrix needs."""
        request.checkpoint.chat_template()
        if request.format != "gguf":  # whose exporter reads the vocabulary for its own purpose
            Vocabulary(request.checkpoint.root / VOCABULARY)
        importance.check(request, self.scheme(request))

    def scheme(self, request: Request) -> Scheme:
        """Rules for sensitive layers name them."""
        config = request.checkpoint.any_spec.config
        return request.scheme.for_layers(int(config.get("text_config", config)["num_hidden_layers"]))

    def files(self, request: Request, folder: Path) -> list[str]:
        """The chat template, under one name wherever the checkpoint keeps it, and the vocabulary."""
        name = request.checkpoint.chat_spec.chat.template
        (folder / name).write_text(request.checkpoint.chat_template(), encoding="utf-8")
        if request.format == "gguf":  # whose files hold the vocabulary
            return [name]
        names = [name, *(file for file in TOKENIZER if (request.checkpoint.root / file).is_file())]
        for file in names[1:]:
            shutil.copyfile(request.checkpoint.root / file, folder / file)
        if request.format != "onnx":
            return names
        vocabulary = Vocabulary(folder / VOCABULARY)
        write_json(folder / CONFIG, genai_config(request.checkpoint.chat_spec, vocabulary, request.context))
        return [*names, CONFIG]

    def fields(self, request: Request) -> dict[str, Any]:
        """Preprocessing and chat format."""
        spec = request.checkpoint.chat_spec
        return {"image": spec.image, "chat": spec.chat.model_copy(update={"context": request.context})}

    def facts(self, request: Request, part: Part) -> dict[str, str]:
        """Of the image tower: whether the checkpoint knows the token that ends an image."""
        flaw = image_mark_flaw(request.checkpoint) if part.name == "vision" else ""
        return {"warning": flaw} if flaw else {}

    def parity(self, request: Request, folder: Path) -> dict[str, Parity]:
        """Left to the gate: `medge check` compares logits with a recorded baseline."""
        return {}
