"""Importance matrices of chat models: cached, recorded, read from llama.cpp's files, and of use."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs
import pytest

from medge.checkpoint import Checkpoint
from medge.demo import GENERATOR
from medge.errors import CorruptError, MedgeError, UsageError
from medge.export import calibration, importance, synth
from medge.export.calibration import CHUNK
from medge.export.gguf_chat import is_vision, names, plan
from medge.export.hub import resolve
from medge.export.layer_stream import forward
from medge.export.pipeline import export, part_job
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.importance import ImportanceMatrix
from medge.quantize.scheme import Scheme, load
from medge.runtimes.generate import Prompt
from medge.runtimes.gguf_file import GgufFile
from medge.samples import sample_root
from medge.spec import FloatArray

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = "language_model.model.embed_tokens.weight"
Export = Callable[..., Artifact]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user's; where matrices lie in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return platformdirs.user_cache_path("medge") / "importance"


@pytest.fixture
def run(text_chat: Path, tmp_path: Path, words: Path) -> Export:
    """`run(importance=…)` -> the text model's int4 artifact, calibrated on few words."""

    def exported(scheme: str = "int4", *, root: Path = text_chat, out: str = "out", **settings: str) -> Artifact:
        if settings.get("importance") == "collect":
            settings = {"calibration": str(words), **settings}
        return export(Request(resolve(str(root)), "gguf", load(scheme), tmp_path / out, {**OFF, **settings}))

    return exported


OFF = {"parity": "off"}


def request(root: Path, scheme: str | Scheme = "int4", **settings: str) -> Request:
    found = load(scheme) if isinstance(scheme, str) else scheme
    return Request(Checkpoint.open(root), "gguf", found, Path("out"), {**OFF, **settings})


def no_matter(tensor: str, x: Any) -> None:
    """Watches nothing."""


def test_names_are_those_of_the_files_that_llama_cpp_opens(chat: Path, tmp_path: Path) -> None:
    """Every matrix of the decoder's blocks, as llama-imatrix has it; nothing that the files lack."""
    root = export(dataclasses.replace(request(chat, "fp16"), out=tmp_path / "out")).root
    prompt = calibration.load(Checkpoint.open(chat), None).prompts[-1]
    found = importance.collect(request(chat), calibration.Calibration("test", (prompt,))).sums
    decoder = GgufFile.open(root / "decoder.gguf").tensors
    blocks = {name for name, entry in decoder.items() if name.startswith("blk.") and len(entry.shape) == 2}
    vision = {name for name in GgufFile.open(root / "vision.gguf").tensors if name.endswith(".weight")}
    assert {name for name in found if name.startswith("blk.")} == blocks
    assert {name for name in found if not name.startswith("blk.")} < vision


def test_a_second_export_pays_nothing_and_gives_the_same_bytes(
    run: Export, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(importance="collect")
    monkeypatch.setattr(importance, "forward", None)  # a call would fail
    assert run(importance="collect", out="again").digest == first.digest
    (file,) = cache.iterdir()
    assert ImportanceMatrix.load(file).dataset.startswith("own calibration set: ")
    assert run(out="off").digest != first.digest


def test_shards_that_come_and_go_give_the_same(
    run: Export, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "SHARD_BYTES", 600_000)
    for folder, lazy in (("whole", False), ("lazy", True)):
        synth.synthesize("medgemma-27b-text-it", "tiny", tmp_path / folder / "model", lazy=lazy)
    whole = run(importance="collect", root=tmp_path / "whole" / "model")
    shutil.rmtree(cache)
    root = tmp_path / "lazy" / "model"
    assert run(importance="collect", root=root, out="again").digest == whole.digest
    assert not list(root.rglob("*.safetensors"))


def test_another_text_is_another_collection(run: Export, cache: Path, words: Path) -> None:
    first = run(importance="collect")
    words.write_text("An X-ray of the left hand.", encoding="utf-8")
    assert run(importance="collect", out="again").digest != first.digest
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_collected_anew(run: Export, cache: Path) -> None:
    first = run(importance="collect")
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert run(importance="collect", out="again").digest == first.digest
    assert ImportanceMatrix.load(file)


def test_a_cut_collection_leaves_nothing_and_starts_again(
    run: Export, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(count: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Request, "counter", lambda self, stage, total: killed)
        with pytest.raises(KeyboardInterrupt):
            run(importance="collect")
    assert not cache.exists()
    whole = run(importance="collect")
    shutil.rmtree(cache)
    assert run(importance="collect", out="again").digest == whole.digest


def test_a_cache_that_cannot_be_written_costs_only_time(run: Export, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    assert "importance" in run(importance="collect").manifest.parts["decoder"].facts


def test_a_file_does_what_collecting_did(run: Export, cache: Path, tmp_path: Path) -> None:
    collected = run(importance="collect")
    (file,) = cache.iterdir()
    given = run(importance=str(file), out="given")
    assert tensor_bytes(given) == tensor_bytes(collected)


def tensor_bytes(artifact: Artifact) -> dict[str, bytes]:
    path = artifact.part_path("decoder")
    raw = path.read_bytes()
    return {n: raw[e.offset : e.offset + e.bytes] for n, e in GgufFile.open(path).tensors.items()}


def test_the_record_says_what_was_read_and_names_no_path(run: Export, cache: Path, tmp_path: Path) -> None:
    artifact = run(importance="collect")
    facts = artifact.manifest.parts["decoder"].facts["importance"]
    assert facts.startswith("own calibration set: 1,")
    assert "tokens with 0 images, sha256 " in facts
    assert artifact.manifest.settings == {**OFF, "importance": "collect", "calibration": "own"}
    keys = GgufFile.open(artifact.part_path("decoder")).keys
    assert keys["quantize.imatrix.dataset"] == facts
    assert (keys["quantize.imatrix.entries_count"], keys["quantize.imatrix.chunks_count"]) == (42, 2)
    matrix = ImportanceMatrix.load(next(cache.iterdir()))
    matrix.dataset = str(tmp_path / "wiki.txt")
    matrix.save(tmp_path / "own.gguf")
    given = run(importance=str(tmp_path / "own.gguf"), out="given")
    assert "of 'wiki.txt': 2 chunks of 512 tokens" in given.manifest.parts["decoder"].facts["importance"]
    for one in (artifact, given):
        assert str(tmp_path) not in one.manifest.model_dump_json()
        assert os.fsencode(tmp_path) not in one.part_path("decoder").read_bytes()


def test_the_image_tower_s_padding_weighs_nothing(chat: Path) -> None:
    """336 columns of fc2 are 512 in blocks."""
    rules = ({"match": r".*(fc1|fc2|_proj)", "bits": 4, "block": 32}, {"match": ".*", "bits": 16})
    scheme = Scheme.model_validate({"name": "own", "title": "own", "activations": "dynamic", "rules": rules})
    own = request(chat, scheme)
    matrix = ImportanceMatrix("test", CHUNK)
    matrix.add("v.blk.0.ffn_down.weight", np.ones((2, 336), np.float32))
    part = own.checkpoint.any_spec.part("vision")
    job = dataclasses.replace(part_job(own, part, importance_of(matrix, scheme), lambda count: None))
    tensors = {tensor.name: tensor for tensor in plan(job)}
    down = tensors["v.blk.0.ffn_down.weight"].importance
    assert down is not None
    assert down.tolist() == [1] * 336 + [0] * 176
    assert tensors["v.blk.0.attn_q.weight"].importance is None


def importance_of(matrix: ImportanceMatrix | None, scheme: Scheme) -> Any:
    from medge.export.evidence import Evidence

    return Evidence(scheme, importance=matrix)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prompt, ...]:
    """What the demo generator is asked about one image of each kind, on which nothing is calibrated."""
    path = questions(tmp_path_factory.mktemp("held") / "held.jsonl", 0)
    return calibration.load(Checkpoint.open(GENERATOR), path).prompts


def test_a_trained_model_comes_nearer_to_its_reference(held: tuple[Prompt, ...]) -> None:
    """Calibrated on what ships."""
    checkpoint = Checkpoint.open(GENERATOR)
    matrix = importance.collect(request(GENERATOR), calibration.load(checkpoint, None))
    expected = log_probabilities(checkpoint, held)

    def divergence(found: ImportanceMatrix | None) -> float:
        pairs = zip(expected, log_probabilities(Rounded(checkpoint, "int4", found), held), strict=True)
        return float(np.mean([np.mean((np.exp(p) * (p - q)).sum(-1)) for p, q in pairs]))

    assert divergence(matrix) < 0.9 * divergence(None)


@pytest.mark.parametrize("scheme", ["int4", "int4-k"])
def test_layers_give_less_error_on_inputs_of_the_calibrated_kind(
    scheme: str, held: tuple[Prompt, ...], tmp_path: Path
) -> None:
    checkpoint, products = Checkpoint.open(GENERATOR), dict[str, Any]()
    seen = calibration.load(checkpoint, questions(tmp_path / "seen.jsonl", 1))
    matrix = importance.collect(request(GENERATOR, scheme), seen)

    def remember(tensor: str, x: Any) -> None:
        rows = x.flatten(0, -2).double().numpy()
        products[tensor] = products.get(tensor, 0) + rows.T @ rows

    forward(checkpoint, held, "fp32", remember)

    def error(found: ImportanceMatrix | None) -> float:
        """Mean over the layers: squared error of the output, as a share of the output."""
        rounded, shares = Rounded(checkpoint, scheme, found), []
        for tensor in [tensor for tensor in products if not is_vision(tensor)]:
            exact, wrong = checkpoint.read(tensor), rounded.read(tensor) - checkpoint.read(tensor)
            shares.append(np.vdot(wrong @ products[tensor], wrong) / np.vdot(exact @ products[tensor], exact))
        return float(np.mean(shares))

    assert error(matrix) < 0.97 * error(None)


def questions(path: Path, first: int) -> Path:
    """What the demo generator is asked about one image of each kind."""
    lines = []
    for i, folder in enumerate(sorted(p for p in sample_root().iterdir() if p.is_dir())):
        image = sorted(folder.glob("*.jpg"))[first]
        question = ("What kind of image is this?", "Name typical structures.", "Describe this image.")[(i + first) % 3]
        lines.append({"kind": "f1", "prompt": question, "images": [str(image)], "answer": f"This is {folder.name}."})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


class Rounded:
    """A checkpoint whose matrices went through a GGUF file's types and back."""

    def __init__(self, checkpoint: Checkpoint, name: str, matrix: ImportanceMatrix | None) -> None:
        self.chat_spec, scheme = checkpoint.chat_spec, load(name).for_layers(6)
        own = Request(checkpoint, "gguf", scheme, Path("out"), OFF)
        self._values = {name: checkpoint.read(name) for name in self.chat_spec.tensors}
        job = part_job(own, self.chat_spec.part("decoder"), importance_of(matrix, scheme), lambda count: None)
        rename = names(self.chat_spec, vision=False)
        planned = {tensor.name: tensor for tensor in plan(job)}
        for tensor in [tensor for tensor, value in self._values.items() if value.ndim == 2 and not is_vision(tensor)]:
            self._values[tensor] = self._rounded(planned[rename(tensor)])

    @staticmethod
    def _rounded(tensor: Any) -> FloatArray:
        from medge.quantize.ggml_blocks import quantize_rows

        (rows,) = tensor.rows(tensor.shape[0])
        packed = quantize_rows(rows, tensor.type, tensor.importance)
        return np.asarray(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[tensor.type]), np.float32)

    def read(self, name: str) -> FloatArray:
        return self._values[name]

    def raw_rows(self, name: str, step: int) -> Iterator[FloatArray]:
        yield from np.array_split(self._values[name], range(step, len(self._values[name]), step))


def log_probabilities(checkpoint: Any, prompts: tuple[Prompt, ...]) -> list[FloatArray]:
    from medge.runtimes.generate import log_softmax

    head = checkpoint.read(TABLE).T
    return [log_softmax(state.numpy() @ head) for state in forward(checkpoint, prompts, "fp32", no_matter)]


def test_a_changed_file_resumes_nothing(text_chat: Path, words: Path) -> None:
    settings = {"importance": "collect", "calibration": str(words)}
    before = request(text_chat, **settings).key
    assert request(text_chat, **settings).key == before
    words.write_text("other", encoding="utf-8")
    assert request(text_chat, **settings).key != before


def matrix_file(path: Path, root: Path, change: Callable[[ImportanceMatrix], Any]) -> Path:
    checkpoint = Checkpoint.open(root)
    rename, matrix = names(checkpoint.any_spec, vision=False), ImportanceMatrix("test", CHUNK)
    for name, shape in checkpoint.any_spec.tensors.items():
        if ".layers." in name and len(shape) == 2:
            matrix.add(rename(name), np.ones((1, shape[1]), np.float32))
    change(matrix)
    matrix.save(path)
    return path


def widen(matrix: ImportanceMatrix) -> None:
    matrix.sums["blk.3.ffn_down.weight"] = np.ones(512)


REFUSED_FILES = [
    pytest.param(lambda m: m.sums.pop("blk.5.attn_v.weight"), "has no importance of 'blk.5.attn_v", id="layers lack"),
    pytest.param(widen, "has 512 columns for 'blk.3.ffn_down.weight', and .* has 256 columns", id="width"),
    pytest.param(
        lambda m: m.add("blk.6.attn_v.weight", np.ones((1, 128), np.float32)),
        "'blk.6.attn_v.weight', and .* has no such tensor",
        id="more layers",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_FILES)
def test_a_matrix_of_another_model_is_refused_before_any_work(
    change: Callable[[ImportanceMatrix], Any], message: str, text_chat: Path, run: Export, tmp_path: Path
) -> None:
    path = matrix_file(tmp_path / "matrix.gguf", text_chat, change)
    with pytest.raises(UsageError, match=message):
        run(importance=str(path))
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_this_model_is_taken(text_chat: Path, run: Export, tmp_path: Path) -> None:
    path = matrix_file(tmp_path / "matrix.gguf", text_chat, lambda matrix: None)
    assert "1 tokens" not in run(importance=str(path)).manifest.parts["decoder"].facts["importance"]


REFUSED: list[Any] = [
    ("int4", {"importance": "absent.gguf"}, UsageError, "absent.gguf cannot be read"),
    ("int4", {"importance": "{words}"}, CorruptError, "is no GGUF file"),
    ("int4", {"importance": "collect", "calibration": "absent.txt"}, UsageError, "absent.txt cannot be read"),
    ("int4", {"importance": "collect", "calibration": "{folder}"}, UsageError, "the model reads no images"),
    ("int4", {"calibration": "{words}"}, UsageError, "none is collected"),
    ("int4", {"importance": "off", "calibration": "{words}"}, UsageError, "none is collected"),
    ("fp16", {"importance": "collect"}, UsageError, "'fp16' rounds nothing by importance"),
    ("int8", {"importance": "{words}"}, UsageError, "'int8' rounds nothing by importance"),
]


@pytest.mark.parametrize(("scheme", "settings", "error", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_before_any_work(
    scheme: str,
    settings: dict[str, str],
    error: type[MedgeError],
    message: str,
    text_chat: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    known = {key: value.format(words=words, folder=sample_root()) for key, value in settings.items()}
    asked = dataclasses.replace(request(text_chat, scheme, **known), out=tmp_path / "out")
    with pytest.raises(error, match=message):
        export(asked)
    assert not (tmp_path / "out").exists()


def test_dual_encoders_and_other_formats_have_no_importance(checkpoint: Path, text_chat: Path) -> None:
    with pytest.raises(UsageError, match="'importance' is a setting of chat models alone"):
        request(checkpoint, importance="collect")
    with pytest.raises(UsageError, match="'importance' is a setting of gguf, not of onnx"):
        Request(Checkpoint.open(text_chat), "onnx", load("int4"), Path("out"), {"importance": "collect"})
    with pytest.raises(UsageError, match="'variant' is a setting of dual encoders alone"):
        request(text_chat, variant="hf")
