"""transformers' own answers on real images and prompts: what every export is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.demo import GENERATOR
from medge.export import synth
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.scheme import Scheme, load
from medge.runtimes.base import normalize
from medge.runtimes.images import load_image
from medge.runtimes.preprocess import preprocess
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.samples import list_images, sample_root, sample_texts
from medge.spec import FloatArray

SAMPLES = 12


@dataclass(frozen=True)
class Reference:
    """Inputs, and a SiglipModel's embeddings of them, rows of length one."""

    images: list[Path]
    texts: list[str]
    pixels: FloatArray
    ids: np.ndarray[Any, Any]
    image_embeddings: FloatArray
    text_embeddings: FloatArray


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    torch = pytest.importorskip("torch")
    from transformers import SiglipModel

    spec = Checkpoint.open(checkpoint).spec
    images, texts = list_images(sample_root(), SAMPLES), sample_texts(SAMPLES)
    pixels = np.stack([preprocess(load_image(path), spec.image) for path in images])
    ids = SiglipTokenizer(checkpoint / "spiece.model", spec.tokenizer)(texts)
    model = SiglipModel.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        image = model.get_image_features(torch.from_numpy(pixels)).numpy()
        text = model.get_text_features(torch.from_numpy(ids)).numpy()
    return Reference(images, texts, pixels, ids, normalize(image), normalize(text))


@pytest.fixture
def run_export(checkpoint: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """`run_export("int8", parity="4")` -> the artifact; format, root, out and replace as options."""

    def run(
        scheme: str | Scheme = "fp32",
        *,
        format: str = "onnx",
        root: Path = checkpoint,
        out: Path = tmp_path / "out",
        replace: bool = False,
        **settings: str,
    ) -> Artifact:
        found = load(scheme) if isinstance(scheme, str) else scheme
        settings = {"parity": "off", **settings}
        return export(Request(Checkpoint.open(root), format, found, out, settings, replace))

    return run


@pytest.fixture
def chat() -> Path:
    """The demo generator: 64 pixels an image, where the tiny MedGemma has 896."""
    return GENERATOR


@pytest.fixture(scope="session")
def text_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text-only MedGemma."""
    root = tmp_path_factory.mktemp("importance") / "text"
    synth.synthesize("medgemma-27b-text-it", "tiny", root)
    return root


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("The lungs are clear. The heart is of normal size. " * 80, encoding="utf-8")
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests run side by side, and torch's threads wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
