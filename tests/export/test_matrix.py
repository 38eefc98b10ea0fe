"""The whole product model x format x scheme: each cell exports and keeps its parity, or says why not.

After a deliberate change: python tests/export/test_matrix.py writes goldens/targets.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medge
from medge.export.formats import Target, targets
from medge.export.parity import centred_cosine
from medge.export.synth import synthesize
from medge.manifest import Artifact
from medge.registry import MODELS
from medge.runtimes.generate import GenerateOptions, Message, complete
from medge.samples import list_images, sample_root
from medge.spec import ChatSpec, FloatArray, ModelSpec

GOLDEN = Path(__file__).parent.parent / "goldens" / "targets.json"
TARGETS = list(targets())
EMBEDDERS = [t for t in TARGETS if t.support.ok and isinstance(MODELS[t.model].spec(), ModelSpec)]
CHATS = [t for t in TARGETS if t.support.ok and isinstance(MODELS[t.model].spec(), ChatSpec)]
REFUSED = [t for t in TARGETS if not t.support.ok and (t.model == "medsiglip-448" or t.scheme == "int8")]
Cli = Callable[..., tuple[int, str, str]]

BOUNDS = {
    "fp32": (0.999999, 0.999999),
    "fp16": (0.99999, 0.9999),
    "int8": (0.99, 0.97),
    "int8-static": (0.99, 0.95),
    "palette6": (0.99, 0.97),
    "int5": (0.97, 0.90),
    "int4-mixed": (0.95, 0.65),
    "int4": (0.86, 0.55),
    "int4-affine": (0.86, 0.55),
    "int4-nl": (0.86, 0.55),
    "palette4": (0.86, 0.55),
}
"""Least cosine and centred cosine to transformers in fp32. The tiny model's short rows make 4 bits coarse."""


def cells() -> list[dict[str, Any]]:
    return [
        {"model": t.model, "format": t.format, "scheme": t.scheme, "ok": t.support.ok, "reason": t.support.reason}
        for t in TARGETS
    ]


def name(target: Target) -> str:
    return f"{target.model}-{target.format}-{target.scheme}"


def test_the_matrix_is_the_golden_one() -> None:
    assert cells() == json.loads(GOLDEN.read_text())


def test_every_empty_cell_has_a_reason() -> None:
    assert all(t.support.ok or t.support.reason for t in TARGETS)


def check(found: FloatArray, expected: FloatArray, scheme: str) -> None:
    if scheme == "fp32":  # exact enough to tell one GELU from the other, and one epsilon
        np.testing.assert_allclose(found, expected, atol=2e-5)
    least, least_centred = BOUNDS[scheme]
    assert np.sum(found * expected, axis=1).min() >= least
    assert centred_cosine(found, expected).min() >= least_centred


@pytest.mark.parametrize("target", EMBEDDERS, ids=name)
def test_what_can_be_built_is_built_and_keeps_its_parity(
    target: Target, reference: Any, run_export: Callable[..., Artifact]
) -> None:
    artifact = run_export(target.scheme, format=target.format)
    assert all(part.facts["gelu"] == "tanh" for part in artifact.manifest.parts.values())
    assert len(list(artifact.verify())) >= 6
    model = medge.open_embedder(artifact.root)
    check(model.embed_images(reference.images), reference.image_embeddings, target.scheme)
    check(model.embed_texts(reference.texts), reference.text_embeddings, target.scheme)


CHAT_BOUNDS = {
    **dict.fromkeys(("fp32", "fp16"), 0.99999),
    "bf16": 0.999,
    "int8": 0.999,
    "int5": 0.98,
    **dict.fromkeys(("int4", "int4-affine", "int4-nl", "int4-k"), 0.85),
}
"""Least cosine of a position's logits to transformers in fp32."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each chat model."""
    roots = {model: tmp_path_factory.mktemp("chat") / model for model in {target.model for target in CHATS}}
    for model, root in roots.items():
        synthesize(model, "tiny", root)
    return roots


@pytest.mark.parametrize("target", CHATS, ids=name)
def test_a_chat_model_is_built_and_keeps_its_logits(
    target: Target, chats: dict[str, Path], run_export: Callable[..., Artifact]
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    root = chats[target.model]
    artifact = run_export(target.scheme, format=target.format, root=root)
    generator = medge.open_generator(artifact.root)
    pictures = list_images(sample_root(), 1) if artifact.manifest.image else []
    asked = [Message("user", (*pictures, "Describe this image."))]
    answer = complete(generator, asked, GenerateOptions(max_tokens=4))
    assert len(answer.tokens) == 4 or answer.finish == "stop"
    prompt = generator.prompt([Message("user", ("Describe this image.",))])
    found = np.concatenate(list(generator.logits(prompt)))
    generator.close()
    kind = AutoModelForImageTextToText if artifact.manifest.image else AutoModelForCausalLM
    model = kind.from_pretrained(root, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([prompt.ids])).logits[0].numpy()
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() >= CHAT_BOUNDS[target.scheme]
    if target.scheme in ("fp32", "fp16"):
        assert np.abs(found - expected).max() <= 0.01
        same = (found.argmax(1) == expected.argmax(1)).mean()
        assert same >= (1 if target.scheme == "fp32" else 0.9)  # random weights have ties within float16's digits


@pytest.mark.parametrize("target", REFUSED, ids=name)
def test_what_cannot_be_built_is_refused_with_the_cell_s_reason(
    target: Target, checkpoint: Path, cli: Cli, tmp_path: Path
) -> None:
    source = checkpoint
    if target.model != "medsiglip-448":
        source = tmp_path / "checkpoint"
        synthesize(target.model, "tiny", source)
    code, _, err = cli("export", source, "--format", target.format, "--scheme", target.scheme, "-o", tmp_path / "out")
    assert code == 3
    assert err.startswith(f"error: {target.support.reason}. ")
    assert not (tmp_path / "out").exists()


def test_smaller_schemes_are_smaller(run_export: Callable[..., Artifact], tmp_path: Path) -> None:
    def size(scheme: str) -> int:
        part = run_export(scheme, out=tmp_path / scheme).manifest.parts["text_encoder"]
        return sum(file.bytes for file in part.files)

    sizes = [size(scheme) for scheme in ("fp32", "fp16", "int8")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.35 * sizes[0]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(cells(), indent=1) + "\n")
