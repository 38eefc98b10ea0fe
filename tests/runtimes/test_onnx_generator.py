"""The ONNX generator where it differs from the others: the cache's rule, and files that contradict themselves.

What all generators share is tested in test_llama_backend.py, in each runtime.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from medge.errors import CorruptError, MissingExtraError, UsageError
from medge.manifest import describe, read_manifest, write_json
from medge.runtimes import open_generator
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import ChatRunOptions, GenerateOptions, Message, complete
from medge.runtimes.onnx_decoder import OnnxDecoder
from medge.runtimes.watch import Watch

OPTIONS = ChatRunOptions(threads=1, context=4096)


def ask(*content: Any) -> list[Message]:
    return [Message("user", content)]


def picture() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)


@pytest.fixture
def own(gemma: Any, tmp_path: Path) -> Path:
    """A copy of the artifact that the test may change."""
    return Path(shutil.copytree(gemma.onnx, tmp_path / "artifact"))


@pytest.fixture
def decoder(gemma: Any) -> OnnxDecoder:
    from medge.manifest import Artifact

    return OnnxDecoder(Artifact.open(gemma.onnx), 4096, RunOptions(threads=1), Watch())


def restate(root: Path, part: str) -> None:
    """Let the manifest state the files as they are now."""
    manifest = read_manifest(root)
    found = manifest.parts[part]
    files = tuple(describe(root, file.path) for file in found.files)
    parts = {**manifest.parts, part: found.model_copy(update={"files": files})}
    write_json(root / "manifest.json", json.loads(manifest.model_copy(update={"parts": parts}).model_dump_json()))


IDS = np.random.default_rng(3).integers(8, 2000, 3000).tolist()


def fill(decoder: OnnxDecoder, length: int) -> None:
    decoder.clear()
    for start in range(0, length, 512):
        assert decoder.tokens(IDS[start : min(start + 512, length)])


def test_an_earlier_place_is_returned_to_exactly_or_not_at_all(decoder: OnnxDecoder) -> None:
    """A window of 512 and 512 places beside it: 513 are evicted at once, at 1,025, 1,538, 2,051 … tokens."""
    outcomes = []
    for length, back in ((900, 5), (1024, 600), (1025, 1024), (1030, 1025), (1500, 1100), (1600, 1500), (2500, 2400)):
        fill(decoder, length)
        kept = decoder.keep(back)
        outcomes.append(kept)
        if not kept:
            fill(decoder, back)
        decoder.step(IDS[back])
        ours = decoder.logits()
        fill(decoder, back)
        decoder.step(IDS[back])
        np.testing.assert_allclose(ours, decoder.logits(), atol=2e-5)
    assert outcomes == [True, True, False, True, True, False, True]


def test_how_a_prompt_is_cut_changes_nothing(decoder: OnnxDecoder) -> None:
    fill(decoder, 1300)
    decoder.step(IDS[1300])
    whole = decoder.logits()
    decoder.clear()
    for start, end in ((0, 1), (1, 700), (700, 1200), (1200, 1201), (1201, 1300)):
        assert decoder.tokens(IDS[start:end])
    decoder.step(IDS[1300])
    np.testing.assert_allclose(decoder.logits(), whole, atol=2e-5)


@pytest.mark.parametrize("slack", [0, 40])
def test_how_often_keys_are_moved_changes_nothing(gemma: Any, monkeypatch: pytest.MonkeyPatch, slack: int) -> None:
    words = " ".join(map(str, range(170)))
    messages = ask(words, picture(), words[:300], picture(), "What?")
    found = []
    for places in (slack, 512):
        monkeypatch.setattr("medge.runtimes.onnx_decoder.SLACK", places)
        generator = open_generator(gemma.onnx, OPTIONS)
        prompt = generator.prompt(messages)
        found.append(np.concatenate(list(generator.logits(prompt))))
        generator.close()
    assert len(prompt.ids) > 900
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)


def test_a_step_that_was_left_is_not_built_on(gemma: Any) -> None:
    generator = open_generator(gemma.onnx, OPTIONS)
    messages = ask(" ".join(map(str, range(700))))
    expected = complete(generator, messages, GenerateOptions(max_tokens=4)).text
    asked = iter(range(1000))
    complete(generator, [*messages, Message("assistant", ("x",)), *ask("y")], cancelled=lambda: next(asked) >= 1)
    assert complete(generator, messages, GenerateOptions(max_tokens=4)).text == expected
    generator.close()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_onnx(path: Path) -> None:
    path.write_bytes(b"not a model")


@pytest.mark.parametrize("damage", [_cut, _no_onnx])
@pytest.mark.parametrize("part", ["decoder", "embedding", "vision"])
def test_a_damaged_file_is_named(
    own: Path, capfd: pytest.CaptureFixture[str], part: str, damage: Callable[[Path], None]
) -> None:
    damage(own / f"{part}.onnx")
    restate(own, part)
    with pytest.raises(CorruptError, match=f"{part}.onnx"):
        complete(open_generator(own, OPTIONS), ask(picture(), "Hello"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("part", "weight"), [("decoder", "norm.weight"), ("vision", "mm_soft_emb_norm.weight")])
def test_weights_that_give_no_numbers_are_corrupt(own: Path, part: str, weight: str) -> None:
    model = onnx.load(own / f"{part}.onnx", load_external_data=False)
    found = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(weight))
    entries = {entry.key: entry.value for entry in found.external_data}
    with (own / entries["location"]).open("r+b") as stream:
        stream.seek(int(entries["offset"]))
        stream.write(np.float32(np.nan).tobytes())
    with pytest.raises(CorruptError, match=rf"{part}.onnx gives NaN"):
        complete(open_generator(own, OPTIONS), ask(picture(), "Hello"))


def test_an_artifact_without_its_vocabulary_is_corrupt(own: Path) -> None:
    manifest = read_manifest(own)
    files = tuple(file for file in manifest.files if file.path != "tokenizer.json")
    write_json(own / "manifest.json", json.loads(manifest.model_copy(update={"files": files}).model_dump_json()))
    with pytest.raises(CorruptError, match=r"accounts for no 'tokenizer\.json'"):
        open_generator(own, OPTIONS)


@pytest.mark.parametrize("module", ["tokenizers", "llguidance"])
def test_what_is_not_installed_is_named(gemma: Any, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a))
    with pytest.raises(MissingExtraError, match=rf"'{module}' is not installed.*medge\[chat\]"):
        complete(open_generator(gemma.onnx, OPTIONS), ask("Hello"), GenerateOptions(schema={"type": "boolean"}))


def test_a_context_beyond_the_artifact_is_refused(gemma: Any) -> None:
    with pytest.raises(UsageError, match="2 to 8,192"):
        open_generator(gemma.onnx, ChatRunOptions(context=8193))


def test_objects_hold_what_their_schema_names(gemma: Any) -> None:
    generator = open_generator(gemma.onnx, OPTIONS)
    side = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}
    schema = {
        "type": "object",
        "properties": {"a": side, "list": {"type": "array", "items": side, "minItems": 1, "maxItems": 2}},
        "required": ["a", "list"],
    }
    for seed in range(3):
        options = GenerateOptions(max_tokens=400, schema=schema, temperature=1.0, seed=seed)
        found = json.loads(complete(generator, ask("Report"), options).text)
        assert set(found) == {"a", "list"}
        assert all(set(one) == {"side"} for one in (found["a"], *found["list"]))
    generator.close()


def test_the_command_answers(gemma: Any, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    import PIL.Image

    PIL.Image.fromarray(picture()).save(tmp_path / "x.png")
    given = ("--prompt", "Yes or no?", "--image", tmp_path / "x.png", "--set", "max_tokens=3", "--json")
    code, out, _ = cli("generate", gemma.onnx, *given)
    document = json.loads(out)
    assert code == 0
    assert document["images_encoded"] == 1
    assert document["runtime"].startswith("onnxruntime")
