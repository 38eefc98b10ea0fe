"""The llama.cpp generator: parity with transformers, sampling, constraints, the prefix cache, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medge.errors import CorruptError, UsageError
from medge.manifest import describe, read_manifest, write_json
from medge.runtimes import open_generator
from medge.runtimes.generate import (
    ChatRunOptions,
    GenerateOptions,
    Message,
    Prompt,
    complete,
    log_softmax,
)
from medge.runtimes.gguf_file import GgufFile

if TYPE_CHECKING:
    from medge.runtimes.generate import Generator

pytest.importorskip("llama_cpp")

Image = NDArray[np.uint8]
LONG = " ".join(f"Finding {i}: a nodule of {i} mm." for i in range(60))


def picture(seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (60, 40, 3), dtype=np.uint8)


def ask(*content: Any) -> list[Message]:
    return [Message("user", content)]


def logits(generator: Generator, messages: list[Message]) -> NDArray[np.float32]:
    return np.concatenate(list(generator.logits(generator.prompt(messages))))


def reference(gemma: Any, messages: list[Message]) -> NDArray[np.float32]:
    import torch

    plain = [{"role": m.role, "content": [_plain(item) for item in m.content]} for m in messages]
    inputs = gemma.processor.apply_chat_template(
        plain, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        found: NDArray[np.float32] = gemma.model(**inputs).logits[0].numpy()
    return found


def _plain(item: Any) -> dict[str, Any]:
    import PIL.Image

    if isinstance(item, str):
        return {"type": "text", "text": item}
    return {"type": "image", "image": PIL.Image.fromarray(item)}


CHATS: list[tuple[list[Message], float]] = [
    (ask("Describe this chest radiograph."), 0.01),
    (ask(LONG), 0.01),
    (ask("Is there an effusion?", picture()), 0.02),
    (ask(LONG, picture(), "Compare it with", picture(1), "and answer."), 0.02),
    ([*ask(picture(), "one"), Message("assistant", ("two",)), *ask("three", picture(2))], 0.02),
]


@pytest.mark.parametrize(("messages", "limit"), CHATS)
def test_logits_are_those_of_transformers(
    gemma: Any, generator: Generator, messages: list[Message], limit: float
) -> None:
    ours, theirs = logits(generator, messages), reference(gemma, messages)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= limit
    two_best = np.sort(theirs, -1)[:, -2:]
    clear = two_best[:, 1] - two_best[:, 0] > 2 * limit  # a nearer tie may fall either way
    assert clear.mean() > 0.5
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


def test_a_long_prompt_crosses_batches_and_the_sliding_window(generator: Generator) -> None:
    assert len(generator.prompt(ask(LONG)).ids) > 512


def test_greedy_text_is_the_models_own(gemma: Any, generator: Generator) -> None:
    answer = complete(generator, ask("Findings?", picture()), GenerateOptions(max_tokens=12, logprobs=3))
    prompt = generator.prompt(ask("Findings?", picture()))
    ids = [token.id for token in answer.tokens]
    again = np.concatenate(list(generator.logits(Prompt((*prompt.ids, *ids), prompt.images))))
    rows = again[len(prompt.ids) - 1 : -1]
    assert rows.argmax(-1).tolist() == ids
    for token, row in zip(answer.tokens, log_softmax(rows), strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=0.02)
        assert token.top[0][0] == token.id
        assert len(token.top) == 3


def test_a_thought_is_told_from_the_answer(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerateOptions(max_tokens=6, temperature=2, top_k=0, top_p=1, seed=1)
    plain = complete(generator, ask("Hello"), options)
    assert len({token.id for token in plain.tokens}) == 6
    monkeypatch.setattr(generator, "_thought", (plain.tokens[1].id, plain.tokens[3].id))
    answer = complete(generator, ask("Hello"), options)
    texts = [token.text for token in plain.tokens]
    assert answer.thought == "".join(texts[1:4]).strip()
    assert answer.text == "".join(texts[:1] + texts[4:])


def test_under_a_grammar_all_is_answer(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (begin,) = generator.tokenize("a")
    monkeypatch.setattr(generator, "_thought", (begin, -1))
    answer = complete(generator, ask("Hello"), GenerateOptions(max_tokens=3, grammar='root ::= "a" root'))
    assert (answer.text[:1], answer.thought) == ("a", "")


def test_the_same_seed_gives_the_same_text_and_another_one_another(generator: Generator) -> None:
    def text(seed: int) -> str:
        return complete(generator, ask("Hello"), GenerateOptions(max_tokens=30, temperature=1.0, seed=seed)).text

    assert text(1) == text(1) != text(2)


def test_cut_to_one_candidate_sampling_is_greedy(generator: Generator) -> None:
    greedy = complete(generator, ask("Hello"), GenerateOptions(max_tokens=10)).text
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0, "top_k": 0, "top_p": 1.0}):
        options = GenerateOptions(max_tokens=10, temperature=2.0, seed=3, **narrow)
        assert complete(generator, ask("Hello"), options).text == greedy


def test_sampled_tokens_follow_the_models_distribution(generator: Generator) -> None:
    """At temperature 1 with nothing cut off, the first token's frequencies are its probabilities."""
    probabilities = np.exp(log_softmax(logits(generator, ask("Hello"))[-1])).astype(np.float64)
    group = np.arange(len(probabilities)) % 4  # sums over many tokens, so that 300 draws tell something
    drawn = np.zeros(4)
    for seed in range(300):
        options = GenerateOptions(max_tokens=1, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        tokens = complete(generator, ask("Hello"), options).tokens
        drawn[group[tokens[0].id] if tokens else group[5]] += 1
    expected = np.bincount(group, probabilities, 4) * 300
    assert (((drawn - expected) ** 2) / expected).sum() < 16.3  # chi squared, 3 degrees of freedom, p = 0.001


def test_the_answer_ends_where_it_was_told_to(generator: Generator) -> None:
    plain = complete(generator, ask("Hello"), GenerateOptions(max_tokens=20, temperature=1.0, seed=5))
    assert plain.finish == "length"
    assert len(plain.tokens) == 20
    for stop in (plain.text[6:8], plain.text[3:9]):
        options = GenerateOptions(max_tokens=20, temperature=1.0, seed=5, stop=(stop,))
        answer = complete(generator, ask("Hello"), options)
        assert answer.finish == "stop"
        assert answer.text == plain.text[: plain.text.index(stop)]


def test_streamed_pieces_are_the_whole_text(generator: Generator) -> None:
    reply = generator.generate(ask("Hello"), GenerateOptions(max_tokens=40, temperature=1.5, top_k=0, seed=2))
    text = "".join(token.text for token in reply)
    assert reply.tally.finish in ("length", "stop")
    text.encode()  # whole characters only
    assert (
        text == complete(generator, ask("Hello"), GenerateOptions(max_tokens=40, temperature=1.5, top_k=0, seed=2)).text
    )


SCHEMA = {
    "type": "object",
    "properties": {
        "finding": {"enum": ["effusion", "none"]},
        "side": {"enum": ["left", "right"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["finding", "side", "sizes"],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_constrains_the_answer(generator: Generator, temperature: float) -> None:
    options = GenerateOptions(max_tokens=300, schema=SCHEMA, temperature=temperature)
    answer = complete(generator, ask("Report"), options)
    found = json.loads(answer.text)
    assert answer.finish == "stop"
    assert found["finding"] in ("effusion", "none")
    assert 2 <= len(found["sizes"]) <= 3


def test_a_grammar_constrains_the_answer(generator: Generator) -> None:
    answer = complete(generator, ask("Report"), GenerateOptions(grammar='root ::= ("yes" | "no") " 中"'))
    assert answer.text in ("yes 中", "no 中")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grammar": 'root ::= "a" other'}, "other"),
        ({"grammar": 'a ::= "b"'}, "(?i)no (rule )?'root'"),
        ({"grammar": " "}, "empty"),
        ({"schema": {"type": "object", "properties": {"a": {"type": "string", "format": "secret"}}}}, "format"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"$ref": "https://example.org/schema"}}, "cannot be used"),
        ({"schema": {"type": "nothing"}}, "a type that is none of"),
        ({"schema": {"type": "array", "maxItems": 10**8}}, "no more than 1,000"),
        ({"schema": {"type": "array", "items": 3}}, "no object"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    generator: Generator, capfd: pytest.CaptureFixture[str], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        generator.generate(ask("Hello"), GenerateOptions(**options))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grammar": 'root ::= root "a" | "a"'}, "begins with itself"),
        ({"schema": {"type": "number", "maximum": 3}}, "'maximum'"),
        ({"schema": {"type": "object", "properties": {"a": {"type": "string", "format": "email"}}}}, "format"),
    ],
)
def test_what_llama_cpp_cannot_enforce_is_refused(gemma: Any, options: dict[str, Any], says: str) -> None:
    generator = open_generator(gemma.artifact, ChatRunOptions(threads=1, context=64))
    with pytest.raises(UsageError, match=says):
        generator.generate(ask("Hello"), GenerateOptions(**options))
    generator.close()


def test_a_later_turn_reuses_what_it_shares_with_the_earlier_one(generator: Generator) -> None:
    first = ask("Look at this", picture(), "and answer.")
    answer = complete(generator, first, GenerateOptions(max_tokens=8))
    assert (answer.reused_tokens, answer.images_encoded) == (0, 1)
    second = [*first, Message("assistant", (answer.text,)), *ask("And now?")]
    later = complete(generator, second, GenerateOptions(max_tokens=8))
    assert later.reused_tokens >= answer.prompt_tokens
    assert later.reused_tokens < later.prompt_tokens
    assert later.images_encoded == 0
    fresh = _forgotten(generator, second)
    assert fresh.images_encoded == 1
    assert fresh.text == later.text


def _forgotten(generator: Generator, messages: list[Message]) -> Any:
    generator.forget()
    return complete(generator, messages, GenerateOptions(max_tokens=8))


def test_the_same_prompt_again_computes_one_token(generator: Generator) -> None:
    first = complete(generator, ask("Hello", picture(), "you"), GenerateOptions(max_tokens=5))
    again = complete(generator, ask("Hello", picture(), "you"), GenerateOptions(max_tokens=5))
    assert again.reused_tokens == again.prompt_tokens - 1
    assert again.text == first.text


def test_another_image_is_told_by_its_pixels(generator: Generator) -> None:
    complete(generator, ask("Hello", picture(), "you"), GenerateOptions(max_tokens=2))
    other = complete(generator, ask("Hello", picture(1), "you"), GenerateOptions(max_tokens=2))
    place = generator.prompt(ask("Hello", picture(), "you")).ids.index(2047)
    assert (other.reused_tokens, other.images_encoded) == (place, 1)
    moved = complete(generator, ask("Well, hello", picture(), "you"), GenerateOptions(max_tokens=2))
    assert moved.images_encoded == 0  # its embeddings are kept, though its place changed
    assert moved.reused_tokens < place


def test_going_back_behind_the_sliding_window_computes_anew(generator: Generator) -> None:
    """The window's cache holds 512 + 512 places: after 1,500 tokens the first of them are gone."""
    start = "The first question."
    complete(generator, ask(start + LONG + LONG), GenerateOptions(max_tokens=2))
    short = complete(generator, ask(start), GenerateOptions(max_tokens=8))
    assert short.reused_tokens == 0
    generator.forget()
    assert complete(generator, ask(start), GenerateOptions(max_tokens=8)).text == short.text


def test_logits_and_answers_share_the_cache_without_harm(generator: Generator) -> None:
    before = complete(generator, ask("Hello"), GenerateOptions(max_tokens=8)).text
    logits(generator, ask("Something else", picture()))
    assert complete(generator, ask("Hello"), GenerateOptions(max_tokens=8)).text == before


def after(calls: int) -> Callable[[], bool]:
    """A question that is answered with yes from the call after that many on."""
    counter: Iterator[int] = iter(range(10**9))
    return lambda: next(counter) >= calls


@pytest.mark.parametrize("calls", [0, 3])
def test_cancelling_ends_prefill_and_decoding(generator: Generator, calls: int) -> None:
    answer = complete(generator, ask(LONG), GenerateOptions(max_tokens=500), cancelled=after(calls))
    assert answer.finish == "cancelled"
    assert len(answer.tokens) < 5
    generator.forget()
    whole = complete(generator, ask(LONG), GenerateOptions(max_tokens=4))
    assert whole.finish == "length"


def test_cancelling_ends_the_image_tower(generator: Generator) -> None:
    answer = complete(generator, ask(picture(), "Hello"), cancelled=lambda: True)
    assert (answer.finish, answer.images_encoded, answer.tokens) == ("cancelled", 0, ())
    assert complete(generator, ask(picture(), "Hello"), GenerateOptions(max_tokens=1)).images_encoded == 1


def test_an_interrupt_comes_out_of_native_code(generator: Generator) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    for messages in (ask(LONG), ask(picture(), "Hello")):
        generator.forget()
        with pytest.raises(KeyboardInterrupt):
            complete(generator, messages, cancelled=interrupt)
        assert complete(generator, messages, GenerateOptions(max_tokens=1)).finish == "length"


def test_an_interrupt_does_not_pass_for_logits(generator: Any) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    blocks = generator.logits(generator.prompt(ask(LONG)))
    next(blocks)
    generator._watch.begin(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(blocks)


def test_the_context_is_checked_before_any_work(generator: Generator) -> None:
    with pytest.raises(
        UsageError, match=r"The prompt has [\d,]+ tokens \(1 image of 16\); a context of 8,192 has room for 8,191"
    ):
        generator.generate(ask(LONG * 10, picture()))


def test_an_answer_ends_with_the_context(gemma: Any) -> None:
    generator = open_generator(gemma.artifact, ChatRunOptions(threads=1, context=64))
    answer = complete(generator, ask("Hello"), GenerateOptions(max_tokens=5000, grammar='root ::= "ab" root'))
    assert answer.finish == "length"
    assert answer.prompt_tokens + len(answer.tokens) == 64
    generator.close()


def test_one_reply_at_a_time(generator: Generator) -> None:
    first = generator.generate(ask("Hello"), GenerateOptions(max_tokens=5))
    next(first)
    second = generator.generate(ask("Hello"), GenerateOptions(max_tokens=5))
    with pytest.raises(UsageError, match="later reply"):
        list(first)
    assert len(list(second)) == 5


@pytest.mark.parametrize("ids", [[1, 2047, 2], [2047] * 16, [1, 2], [], [-1, 2], [2048, 2]])
def test_a_prompt_that_contradicts_itself_is_refused(generator: Generator, ids: list[int]) -> None:
    image = generator.prompt(ask(picture(), "a")).images
    with pytest.raises(UsageError):
        list(generator.logits(Prompt(tuple(ids), image)))


def test_text_that_is_no_utf8_is_refused(generator: Generator) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        generator.prompt(ask("a\udcff"))


def test_the_image_tower_may_be_onnx(gemma: Any, tmp_path: Path) -> None:
    from medge.checkpoint import Checkpoint
    from medge.export.pipeline import export
    from medge.export.request import Request
    from medge.quantize.scheme import load

    settings = {"parity": "off", "vision": "onnx"}
    checkpoint = Checkpoint.open(gemma.artifact.parent / "checkpoint")
    artifact = export(Request(checkpoint, "gguf", load("fp16"), tmp_path / "artifact", settings))
    assert artifact.part_path("vision").name == "vision.onnx"
    assert artifact.manifest.parts["vision"].facts["scheme"] == "int8"
    generator = open_generator(artifact.root, ChatRunOptions(threads=1))
    messages = ask("Is there an effusion?", picture())
    ours, theirs = log_softmax(logits(generator, messages)), log_softmax(reference(gemma, messages))
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).mean() < 1e-3
    assert complete(generator, messages, GenerateOptions(max_tokens=2)).images_encoded == 0  # kept from before
    generator.close()


@pytest.fixture
def own(gemma: Any, tmp_path: Path) -> Path:
    """A copy of the artifact that the test may change."""
    return Path(shutil.copytree(gemma.artifact, tmp_path / "artifact"))


def change(root: Path, **fields: Any) -> None:
    manifest = read_manifest(root).model_copy(update=fields)
    write_json(root / "manifest.json", json.loads(manifest.model_dump_json()))


def restate(root: Path, part: str) -> None:
    """Let the manifest state the file as it is now."""
    parts = dict(read_manifest(root).parts)
    parts[part] = parts[part].model_copy(update={"files": (describe(root, f"{part}.gguf"),)})
    change(root, parts=parts)


def test_an_image_without_a_tower_is_refused(own: Path) -> None:
    manifest = read_manifest(own)
    change(own, parts={"decoder": manifest.parts["decoder"]}, image=None)
    generator = open_generator(own, ChatRunOptions(threads=1, context=64))
    assert generator.image is None
    assert complete(generator, ask("Hello"), GenerateOptions(max_tokens=1)).finish == "length"
    with pytest.raises(UsageError, match="no image tower"):
        generator.generate(ask(picture(), "Hello"))
    generator.close()


@pytest.mark.parametrize("size", [1, 8193])
def test_a_context_beyond_the_model_is_refused(gemma: Any, size: int) -> None:
    with pytest.raises(UsageError, match="2 to 8,192"):
        open_generator(gemma.artifact, ChatRunOptions(context=size))


def test_a_closed_generator_says_so(gemma: Any) -> None:
    generator = open_generator(gemma.artifact, ChatRunOptions(threads=1, context=64))
    reply = generator.generate(ask("Hello"), GenerateOptions(max_tokens=3))
    next(reply)
    generator.close()
    generator.close()
    for call in (lambda: next(reply), lambda: generator.generate(ask("Hello")), generator.forget):
        with pytest.raises(UsageError, match="closed"):
            call()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_gguf(path: Path) -> None:
    path.write_bytes(b"not a model")


@pytest.mark.parametrize(
    ("part", "damage", "reason"),
    [
        ("decoder", _cut, "within the file bounds"),
        ("vision", _cut, "failed to seek for tensor"),
        ("decoder", _no_gguf, "invalid magic"),
        ("vision", _no_gguf, "is no GGUF file"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(
    own: Path, capfd: pytest.CaptureFixture[str], part: str, damage: Callable[[Path], None], reason: str
) -> None:
    damage(own / f"{part}.gguf")
    restate(own, part)
    with pytest.raises(CorruptError, match=f"{part}.gguf.*{reason}"):
        complete(open_generator(own, ChatRunOptions(threads=1)), ask(picture(), "Hello"))
    assert capfd.readouterr() == ("", "")


def test_weights_that_give_no_numbers_are_corrupt(own: Path) -> None:
    path = own / "decoder.gguf"
    norm = GgufFile.open(path).tensors["output_norm.weight"]
    with path.open("r+b") as stream:
        stream.seek(norm.offset)
        stream.write(np.float32(np.nan).tobytes())
    generator = open_generator(own, ChatRunOptions(threads=1))
    with pytest.raises(CorruptError, match="NaN"):
        complete(generator, ask("Hello"))
    with pytest.raises(CorruptError, match="NaN"):
        logits(generator, ask("Hello"))


def test_a_projection_in_blocks_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libmtmd transposes it as if blocks were numbers: the cosine of its embeddings was 0.04."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(own / "vision.gguf", "clip")
    writer.add_vision_image_size(224)
    blocks = np.zeros((4, 34), np.uint8)
    writer.add_tensor("mm.input_projection.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    restate(own, "vision")
    with pytest.raises(CorruptError, match="projection in blocks"):
        open_generator(own)


def test_a_tower_for_another_image_size_is_refused(own: Path) -> None:
    image = read_manifest(own).image
    assert image is not None
    change(own, image=image.model_copy(update={"size": 896}))
    with pytest.raises(CorruptError, match="no images of 896 px"):
        open_generator(own)


def test_a_tower_that_gives_no_numbers_is_corrupt(own: Path) -> None:
    path = own / "vision.gguf"
    norm = GgufFile.open(path).tensors["mm.soft_emb_norm.weight"]
    with path.open("r+b") as stream:
        stream.seek(norm.offset)
        stream.write(np.float32(np.nan).tobytes())
    with pytest.raises(CorruptError, match=r"vision.gguf gives NaN"):
        complete(open_generator(own, ChatRunOptions(threads=1)), ask(picture(), "Hello"))


@pytest.mark.parametrize(
    "chat", [None, {"stop": ("<no_such_token>",)}, {"image_tokens": 64}, {"template": "missing.jinja"}]
)
def test_a_manifest_that_contradicts_its_files_is_corrupt(own: Path, chat: dict[str, Any] | None) -> None:
    known = read_manifest(own).chat
    assert known is not None
    change(own, chat=None if chat is None else known.model_copy(update=chat))
    with pytest.raises(CorruptError):
        complete(open_generator(own, ChatRunOptions(threads=1)), ask(picture(), "Hello"))


def test_a_failed_assertion_is_one_line_and_no_core() -> None:
    pytest.importorskip("llama_cpp")
    script = (
        "from medge.runtimes.llama_model import ggml, library\n"
        "print('answer so far')\n"
        "ggml(library()).ggml_abort(b'/build/ggml.c', 7, b'GGML_ASSERT(it) failed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (done.returncode, done.stdout) == (5, "answer so far\n")
    assert done.stderr == "error: llama.cpp gave up: GGML_ASSERT(it) failed. Run: medge verify ARTIFACT\n"


def test_nothing_of_a_prompt_is_printed(gemma: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generator = open_generator(gemma.artifact, ChatRunOptions(threads=1))
    complete(generator, ask("Mrs Example, born 1950", picture()), GenerateOptions(max_tokens=2))
    generator.close()
    assert capfd.readouterr() == ("", "")


def test_the_command_answers(gemma: Any, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    import PIL.Image

    PIL.Image.fromarray(picture()).save(tmp_path / "x.png")
    given = ("--prompt", "Yes or no?", "--image", tmp_path / "x.png", "--set", "max_tokens=3", "--json")
    code, out, _ = cli("generate", gemma.artifact, *given)
    document = json.loads(out)
    assert code == 0
    assert document["images_encoded"] == 1
    assert document["tokens"] <= 3
