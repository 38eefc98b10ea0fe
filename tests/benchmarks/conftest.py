"""A dataset of small real files, an artifact folder, and an embedder whose answers the test knows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest

from medge.benchmarks import host as host_facts
from medge.benchmarks.baseline import Baseline, Identity, record
from medge.benchmarks.datasets import load_dataset
from medge.benchmarks.host import Host, Noise
from medge.manifest import MANIFEST, Manifest, Parity, PartFiles, Source, describe, write_json
from medge.runtimes.base import normalize
from medge.runtimes.embed import Embedder
from medge.spec import FloatArray, ImageSpec, TensorSpec

LABELS = ("chest x-ray", "eye", "skin")
WIDTH = 24
WEIGHTS = hashlib.sha256(b"weights").hexdigest()


@dataclass
class FakeEmbedder:
    """An image is its label's direction plus noise that its bytes seed; `damage` adds noise of its own."""

    name: str = "torch 2.13.0 cpu fp32"
    image: ImageSpec = ImageSpec(size=8)  # noqa: RUF009 - frozen
    damage: float = 0.0
    poison: float = 0.0

    def pixels(self, images: Sequence[Path]) -> FloatArray:
        """Not pixels: what `run` answers, so that the fake needs no model."""
        return np.stack([self._row(path) for path in images])

    def session(self, part: str) -> FakeEmbedder:
        assert part == "image_encoder"
        return self

    def run(self, inputs: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        return {"image_embeds": inputs["pixel_values"] + np.float32(self.poison)}

    def class_embeddings(self, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> FloatArray:
        return normalize(np.stack([self._direction(label) for label in labels]))

    def _row(self, path: Path) -> FloatArray:
        seed = int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:4], "little")
        own = np.random.default_rng(seed).normal(size=WIDTH) * 0.35
        other = np.random.default_rng(seed + 1).normal(size=WIDTH) * self.damage
        return np.asarray(self._direction(path.parent.name.replace("_", " ")) + own + other, np.float32)

    @staticmethod
    def _direction(label: str) -> FloatArray:
        direction = np.random.default_rng(sum(label.encode())).normal(size=WIDTH)
        return np.asarray(direction / np.linalg.norm(direction), np.float32)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture(autouse=True)
def quiet_host(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests share their machine: none may depend on how busy it is."""
    if "test_host" not in request.node.nodeid:
        monkeypatch.setattr(host_facts, "noise", lambda: Noise(others=0.0, spread=0.0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes of 12 images, with the licence list that such folders have."""
    root = tmp_path / "data"
    for k, label in enumerate(LABELS):
        for i in range(12):
            write_image(root / label.replace(" ", "_") / f"{i}.png", 100 * k + i)
    (root / "SOURCES.md").write_text("where they came from")
    (root / "splits.json").write_text("{}")
    return root


@pytest.fixture
def fake() -> Callable[..., Embedder]:
    return lambda **fields: cast(Embedder, FakeEmbedder(**fields))


@pytest.fixture
def baseline(tmp_path: Path, data: Path) -> Baseline:
    """Captured from the undamaged fake, at tmp_path / "base"."""
    reference = cast(Embedder, FakeEmbedder())
    return record(reference, Identity("medsiglip-448", "", WEIGHTS), load_dataset(data), tmp_path / "base")


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Path]:
    """Writes an artifact folder; fields override its manifest's."""

    def make(**fields: Any) -> Path:
        root = tmp_path / f"artifact-{fields.get('scheme', 'int8')}"
        root.mkdir()
        (root / "image_encoder.onnx").write_bytes(b"graph")
        pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 8, 8))
        embeds = TensorSpec(name="image_embeds", dtype="float32", shape=("batch", WIDTH))
        files = (describe(root, "image_encoder.onnx"),)
        document = {
            "schema_version": 1,
            "source": Source(model="medsiglip-448", hub_id="", revision="main", weights_sha256=WEIGHTS),
            "licence": "HAI-DEF",
            "task": "embed",
            "format": "onnx",
            "scheme": "int8",
            "parts": {"image_encoder": PartFiles(files=files, inputs=(pixels,), outputs=(embeds,))},
            "image": ImageSpec(size=8),
            "parity": {
                "image_encoder": Parity(reference="torch cpu", samples=8, cosine_mean=0.9999, cosine_min=0.9998)
            },
        }
        manifest = Manifest.model_validate(document | fields)
        write_json(root / MANIFEST, manifest.model_dump(mode="json"))
        return root

    return make


@pytest.fixture
def host() -> Host:
    return Host(
        cpu="Example 9000",
        physical_cores=2,
        logical_cores=4,
        usable_cores=4,
        isa=("avx2", "avx512-vnni"),
        ram_gib=24.0,
        os="Linux 6.1 x86_64",
        python="3.11.7",
        versions={"onnxruntime": "1.32.0"},
    )
