"""Bad input of chat models, through the command: one line, its remedy, its exit code, before any work."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from medge.checkpoint import Checkpoint
from medge.demo import GENERATOR, IMAGES
from medge.export.pipeline import export
from medge.export.request import Request
from medge.export.synth import synthesize
from medge.manifest import describe, read_manifest, write_json
from medge.quantize.scheme import load
from medge.runtimes.gguf_file import GgufFile

pytest.importorskip("llama_cpp")

Cli = Callable[..., tuple[int, str, str]]
XRAY = min((IMAGES / "chest x-ray").iterdir())
ASK = ("--prompt", "What kind of image is this?")


def gguf(checkpoint: Path, root: Path) -> Path:
    export(Request(Checkpoint.open(checkpoint), "gguf", load("int8"), root))
    return root


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo generator in GGUF. Not to be written to."""
    return gguf(GENERATOR, tmp_path_factory.mktemp("input") / "demo")


@pytest.fixture(scope="session")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model in GGUF. Not to be written to."""
    root = tmp_path_factory.mktemp("input")
    synthesize("medgemma-27b-text-it", "tiny", root / "checkpoint")
    return gguf(root / "checkpoint", root / "text")


@pytest.fixture
def own(demo: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(demo, tmp_path / "own"))


def restate(root: Path) -> None:
    """Let the manifest state the files as they are now: what it would find by itself is tested elsewhere."""
    manifest = read_manifest(root)
    parts = {
        name: part.model_copy(update={"files": tuple(describe(root, file.path) for file in part.files)})
        for name, part in manifest.parts.items()
    }
    write_json(root / "manifest.json", manifest.model_copy(update={"parts": parts}).model_dump(mode="json"))


def refused(outcome: tuple[int, str, str], code: int, *says: str) -> None:
    """One line on stderr that says all of it, nothing on stdout."""
    assert outcome[:2] == (code, ""), outcome
    line = outcome[2]
    assert line.startswith("error: ")
    assert line.count("\n") == 1, line
    assert not [text for text in says if text not in line], line


def test_an_image_for_a_model_without_a_tower(cli: Cli, text_only: Path) -> None:
    outcome = cli("generate", text_only, *ASK, "--image", XRAY)
    refused(outcome, 2, "no image tower", "multimodal model")


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("<image> or <image>?", 1, "2 <image> and 1 --image"),
        ("<image>?", 2, "1 <image> and 2 --image"),
        ("<image>?", 0, "1 <image> and 0 --image"),
        ("<start_of_image>?", 1, "2 image places and 1 images"),
        ("<image_soft_token>?", 0, "stands for an image"),
    ],
)
def test_more_or_fewer_images_than_markers(cli: Cli, demo: Path, prompt: str, images: int, says: str) -> None:
    refused(cli("generate", demo, "--prompt", prompt, *["--image", XRAY] * images), 2, says)


def test_three_hundred_pages_are_refused_with_their_numbers(
    cli: Cli, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "The lungs are clear and the heart is of normal size. " * 45  # some 450 words
    monkeypatch.setattr("sys.stdin", io.StringIO(page * 300))
    outcome = cli("generate", demo, "--prompt", "-", "--image", XRAY, "--set", "context=4096")
    refused(outcome, 2, "(1 image of 16); a context of 4,096 has room for 4,095", "context=N): it takes up to 8,192")
    monkeypatch.setattr("sys.stdin", io.StringIO(page * 300))
    refused(cli("generate", demo, "--prompt", "-"), 2, "the model takes no more")


def test_a_context_larger_than_the_models(cli: Cli, demo: Path) -> None:
    refused(cli("generate", demo, *ASK, "--set", "context=8193"), 2, "8,193 tokens", "2 to 8,192")


def test_an_unknown_quantization_type(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("export", GENERATOR, "--format", "gguf", "--scheme", "q4_k_x", "-o", tmp_path / "out")
    refused(outcome, 2, "'q4_k_x' is no scheme", "int4-k")
    assert not (tmp_path / "out").exists()


def test_a_file_of_an_unknown_quantization_type(cli: Cli, own: Path) -> None:
    path = own / "decoder.gguf"
    raw, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind its rank and its two sizes
    assert raw[at : at + 4] == (8).to_bytes(4, "little"), "Q8_0"
    raw[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(raw)
    refused(cli("generate", own, *ASK), 5, "decoder.gguf", "invalid ggml type 99", "Export the artifact again")


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_a_truncated_file(cli: Cli, own: Path, part: str) -> None:
    path = own / f"{part}.gguf"
    entries = sorted(GgufFile.open(path).tensors.values(), key=lambda entry: entry.offset)
    with path.open("r+b") as stream:
        stream.truncate(entries[-1].offset)
    refused(cli("generate", own, *ASK, "--image", XRAY), 5, f"{part}.gguf has", "the manifest says")
    restate(own)
    refused(cli("generate", own, *ASK, "--image", XRAY), 5, f"cannot load {own / part}.gguf", "tensor", "Export")


def test_the_image_tower_of_another_model(cli: Cli, own: Path, tmp_path: Path) -> None:
    synthesize("medgemma-4b-it", "tiny", tmp_path / "other")
    shutil.copy(gguf(tmp_path / "other", tmp_path / "gguf") / "vision.gguf", own)
    refused(cli("generate", own, *ASK, "--image", XRAY), 5, "vision.gguf has", "the manifest says")
    restate(own)
    refused(cli("generate", own, *ASK, "--image", XRAY), 5, "vision.gguf takes no images of 64 px")


def test_a_missing_shard(cli: Cli, tmp_path: Path) -> None:
    synthesize("medgemma-4b-it", "tiny", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for command in (("export", tmp_path / "model", "--format", "gguf"), ("baseline", "capture", tmp_path / "model")):
        refused(cli(*command, "-o", tmp_path / "out"), 4, "model.safetensors is missing", "medge fetch")


def test_weights_without_the_end_of_image_token_are_told(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medge.export.image_marks.image_mark_flaw", lambda checkpoint: "the token is not there")
    code, _, err = cli("baseline", "capture", GENERATOR, "--count", 1, "-o", tmp_path / "base")
    assert code == 0
    assert "warning: the token is not there.\n" in err


def test_an_image_cut_short(cli: Cli, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(XRAY.read_bytes()[:3000])
    refused(cli("generate", demo, *ASK, "--image", tmp_path / "cut.jpg"), 2, "cut.jpg is damaged or cut short")


def test_an_image_of_too_many_pixels_is_refused_by_its_header(cli: Cli, demo: Path, tmp_path: Path) -> None:
    PIL.Image.new("1", (20_000, 20_000)).save(tmp_path / "vast.png")
    refused(cli("generate", demo, *ASK, "--image", tmp_path / "vast.png"), 2, "more than 100 million pixels")


@pytest.mark.parametrize("size", [(1, 1), (8_000, 5_000)])
def test_an_image_of_any_lesser_size_is_answered(cli: Cli, demo: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    PIL.Image.new("L", size).save(tmp_path / "odd.png")
    code, out, _ = cli("generate", demo, *ASK, "--image", tmp_path / "odd.png", "--set", "max_tokens=3")
    assert (code, bool(out.strip())) == (0, True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": "0"}, "max_tokens is 0"),
        ({"max_tokens": "1.5"}, "max_tokens=1.5 is no whole number"),
        ({"temperature": "-1"}, "temperature is -1"),
        ({"temperature": "nan"}, "temperature is nan"),
        ({"schema": "{"}, "is no JSON"),
        ({"schema": "[1]"}, "is no object"),
        ({"schema": '{"patternProperties": {}}'}, "'patternProperties', which no grammar enforces"),
        ({"grammar": "root ::= ["}, "cannot read the grammar"),
        ({"grammar": 'other ::= "a"'}, "rule 'root'"),
        ({"grammar": ""}, "grammar is empty"),
        ({"grammar": 'root ::= "a"', "schema": "{}"}, "Both a JSON Schema and a grammar"),
    ],
)
def test_options_out_of_range(cli: Cli, demo: Path, tmp_path: Path, settings: dict[str, str], says: str) -> None:
    pairs = []
    for key, value in settings.items():
        (tmp_path / key).write_text(value, encoding="utf-8")
        pairs += ["--set", f"{key}={tmp_path / key if key in ('schema', 'grammar') else value}"]
    refused(cli("generate", demo, *ASK, *pairs), 2, says)


def test_an_empty_prompt(cli: Cli, demo: Path) -> None:
    refused(cli("generate", demo, "--prompt", "  "), 2, "The prompt is empty", "--prompt TEXT")
