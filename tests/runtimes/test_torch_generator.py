"""The reference of chat models against transformers itself, and as a Generator: sampling, ends, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, UnsupportedError, UsageError, WeightsError
from medge.export.synth import synthesize
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import ChatRunOptions, GenerateOptions, Message, Prompt, complete, log_softmax
from medge.runtimes.sampler import Chooser
from medge.runtimes.torch_generator import TorchGenerator, open_reference
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.tensorfile import read_header

THREADS = RunOptions(threads=1)
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
TEXT = [Message("user", ("Describe the findings.",))]
LONG = [Message("user", (" ".join(f"Finding {i}: a nodule of {i} mm." for i in range(40)),))]
IMAGE = [Message("system", ("Be brief.",)), Message("user", ("Look at ", PIXELS, " and say what it is."))]
TWO = [
    Message("user", (PIXELS, PIXELS[:100], "Compare.")),
    Message("assistant", ("The same.",)),
    Message("user", ("Sure?",)),
]


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MedGemma, seed 0. Not to be written to."""
    root = tmp_path_factory.mktemp("torch") / "chat"
    synthesize("medgemma-4b-it", "tiny", root)
    return root


@pytest.fixture
def own_chat(chat_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_checkpoint, tmp_path / "own"))


@pytest.fixture(scope="session")
def _one_reference(chat_checkpoint: Path) -> Iterator[TorchGenerator]:
    generator = open_reference(chat_checkpoint, device="cpu", options=THREADS)
    yield generator
    generator.close()


@pytest.fixture
def reference(_one_reference: TorchGenerator) -> TorchGenerator:
    """With nothing in its cache."""
    _one_reference.forget()
    return _one_reference


@pytest.fixture(scope="session")
def peer(chat_checkpoint: Path) -> tuple[Any, Any]:
    """transformers' own model and processor, loaded its own way."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    tokenizer = AutoTokenizer.from_pretrained(chat_checkpoint)
    images = Gemma3ImageProcessor.from_pretrained(chat_checkpoint)  # the slow one, which resizes with Pillow
    processor = Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template)
    model = Gemma3ForConditionalGeneration.from_pretrained(chat_checkpoint, dtype=torch.float32).eval()
    return model, processor


def peer_inputs(processor: Any, messages: list[Message]) -> Any:
    def part(value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": "image", "image": PIL.Image.fromarray(value)}

    listed = [{"role": m.role, "content": [part(value) for value in m.content]} for m in messages]
    return processor.apply_chat_template(
        listed, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("messages", [TEXT, LONG, IMAGE, TWO], ids=["text", "beyond the window", "image", "two images"])
def test_ids_logits_and_greedy_answer_are_transformers_own(
    reference: TorchGenerator, peer: tuple[Any, Any], messages: list[Message]
) -> None:
    import torch

    model, processor = peer
    inputs, prompt = peer_inputs(processor, messages), reference.prompt(messages)
    assert list(prompt.ids) == inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        theirs = model(**inputs).logits[0].numpy()
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(prompt.ids) :].tolist()
    ours = np.concatenate(list(reference.logits(prompt)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    reference.forget()
    answer = complete(reference, messages, GenerateOptions(max_tokens=6))
    assert [token.id for token in answer.tokens] == written
    assert answer.prompt_tokens == len(prompt.ids)
    assert answer.images_encoded == len(prompt.images)


def test_logits_come_in_blocks_of_bounded_size(reference: TorchGenerator) -> None:
    blocks = list(reference.logits(reference.prompt(IMAGE)))
    assert max(map(len, blocks)) == 256  # an image's, at once
    assert len(blocks) == 3


def test_logprobs_are_the_models_own(reference: TorchGenerator) -> None:
    options = GenerateOptions(max_tokens=3, logprobs=4, temperature=2.0, top_k=5, seed=3)
    answer = complete(reference, TEXT, options)
    ids = (*reference.prompt(TEXT).ids, *(token.id for token in answer.tokens))
    exact = log_softmax(np.concatenate(list(reference.logits(Prompt(ids)))))
    for i, token in enumerate(answer.tokens):
        at = exact[len(ids) - len(answer.tokens) + i - 1]
        assert token.logprob == pytest.approx(float(at[token.id]), abs=1e-4)  # before temperature and truncation
        assert [each for each, _ in token.top] == np.argsort(-at)[:4].tolist()


def test_a_seed_is_an_answer(reference: TorchGenerator) -> None:
    def say(seed: int) -> str:
        return complete(reference, TEXT, GenerateOptions(max_tokens=8, temperature=1.5, seed=seed)).text

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2, "top_p": 1.0}, {0, 1}),
        ({"top_k": 0, "top_p": 0.7}, {0, 1}),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.25}, {0, 1, 2}),
        ({"top_k": 0, "top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.0}, {0}),
    ],
)
def test_truncation_leaves_what_it_should(options: dict[str, Any], allowed: set[int]) -> None:
    choose = Chooser(GenerateOptions(temperature=1.0, **options))
    drawn = [choose(LOGITS) for _ in range(300)]
    assert set(drawn) == allowed


def test_temperature_sharpens_and_flattens() -> None:
    def share(temperature: float) -> float:
        choose = Chooser(GenerateOptions(temperature=temperature, top_k=0, top_p=1.0))
        return float(np.mean([choose(LOGITS) == 0 for _ in range(2000)]))

    assert share(0.5) == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.04)
    assert share(1.0) == pytest.approx(0.5, abs=0.04)
    assert Chooser(GenerateOptions())(LOGITS) == 0


def test_an_answer_ends_at_its_limit_or_before_a_stop_string(reference: TorchGenerator) -> None:
    full = complete(reference, TEXT, GenerateOptions(max_tokens=8))
    assert (full.finish, len(full.tokens)) == ("length", 8)
    stop = full.text[3:6]
    cut = complete(reference, TEXT, GenerateOptions(max_tokens=8, stop=(stop,)))
    assert cut.finish == "stop"
    assert cut.text == full.text[: full.text.index(stop)]


def test_an_answer_ends_with_the_turn(reference: TorchGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    first = complete(reference, TEXT, GenerateOptions(max_tokens=1)).tokens[0].id
    monkeypatch.setattr(reference, "_stop", {first})
    answer = complete(reference, TEXT)
    assert (answer.text, answer.finish) == ("", "stop")


def test_it_is_cancelled_before_within_and_after_a_step(reference: TorchGenerator) -> None:
    assert complete(reference, TEXT, cancelled=lambda: True).finish == "cancelled"
    asked = count()
    within = complete(reference, IMAGE, cancelled=lambda: next(asked) == 4)  # the towers have 8 layers
    assert (within.finish, within.text) == ("cancelled", "")
    asked = count()
    after = complete(reference, TEXT, GenerateOptions(max_tokens=9), cancelled=lambda: next(asked) > 14)
    assert after.finish == "cancelled"
    assert 0 < len(after.tokens) < 9


def test_a_later_reply_ends_the_one_before(reference: TorchGenerator) -> None:
    first = reference.generate(TEXT, GenerateOptions(max_tokens=9))
    next(first)
    complete(reference, TEXT, GenerateOptions(max_tokens=1))
    with pytest.raises(UsageError, match="later reply"):
        list(first)


def test_seconds_are_told_by_phase(reference: TorchGenerator) -> None:
    answer = complete(reference, IMAGE, GenerateOptions(max_tokens=3))
    assert min(answer.seconds["vision"], answer.seconds["prefill"], answer.seconds["decode"]) > 0
    assert complete(reference, TEXT, GenerateOptions(max_tokens=1)).seconds["vision"] == 0


def test_too_long_a_prompt_is_refused_before_work(chat_checkpoint: Path) -> None:
    generator = open_reference(chat_checkpoint, device="cpu", options=ChatRunOptions(threads=1, context=64))
    with pytest.raises(
        UsageError,
        match=r"290 tokens \(1 image of 256\); a context of 64 has room for 63 beside an answer.*up to 8,192",
    ):
        generator.generate(IMAGE)
    answer = complete(generator, TEXT, GenerateOptions(max_tokens=500))
    assert answer.prompt_tokens + len(answer.tokens) == 64
    assert answer.finish == "length"


@pytest.mark.parametrize("context", [0, 1, 8193])
def test_a_context_that_the_model_was_not_made_for(chat_checkpoint: Path, context: int) -> None:
    with pytest.raises(UsageError, match="The model takes 2 to"):
        open_reference(chat_checkpoint, device="cpu", options=ChatRunOptions(context=context))


def test_images_and_their_tokens_must_agree(reference: TorchGenerator) -> None:
    prompt = reference.prompt(IMAGE)
    with pytest.raises(UsageError, match="are not those of its images"):
        list(reference.logits(Prompt(prompt.ids)))
    with pytest.raises(UsageError, match="ends in a text token"):
        list(reference.logits(Prompt(())))


def test_a_schema_constrains_the_answer(reference: TorchGenerator) -> None:
    schema = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}
    assert json.loads(complete(reference, TEXT, GenerateOptions(schema=schema)).text)["side"] in ("left", "right")


def test_fp16_is_refused_with_its_reason(chat_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match="65,504"):
        open_reference(chat_checkpoint, device="cpu", dtype="fp16")


def test_bf16_is_near_and_named(chat_checkpoint: Path, reference: TorchGenerator) -> None:
    generator = open_reference(chat_checkpoint, device="cpu", dtype="bf16", options=THREADS)
    assert generator.name.endswith("cpu bf16")
    assert reference.name.endswith("cpu fp32")  # small ones are exact unless asked
    ours, theirs = (
        log_softmax(np.concatenate(list(each.logits(each.prompt(TEXT))))) for each in (generator, reference)
    )
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
    assert 0 < divergence.mean() < 0.01


def test_large_models_are_bf16_unless_asked(chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medge.runtimes.torch_generator.FP32_PARAMETERS", 1000)
    assert open_reference(chat_checkpoint, device="cpu").name.endswith("bf16")


def test_a_text_model_reads_no_images(tmp_path: Path) -> None:
    synthesize("medgemma-27b-text-it", "tiny", tmp_path / "text")
    generator = open_reference(tmp_path / "text", device="cpu", options=THREADS)
    assert generator.image is None
    assert complete(generator, TEXT, GenerateOptions(max_tokens=2)).finish == "length"
    with pytest.raises(UsageError, match="no image tower"):
        generator.generate(IMAGE)


def test_an_encoder_is_no_chat_model(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match="no chat model"):
        open_reference(checkpoint, device="cpu")


def test_a_closed_generator_says_so(chat_checkpoint: Path) -> None:
    generator = open_reference(chat_checkpoint, device="cpu", options=THREADS)
    generator.forget()
    generator.close()
    with pytest.raises(UsageError, match="is closed"):
        generator.generate(TEXT)


def _poison(root: Path, change: Callable[[NDArray[np.uint16]], None]) -> None:
    path = root / "model.safetensors"
    entry = read_header(path)["language_model.model.layers.3.mlp.up_proj.weight"]
    raw = np.memmap(path, np.uint16, "r+", entry.start, (8,))
    change(raw)
    raw.flush()


def test_weights_that_are_not_finite_are_refused(own_chat: Path) -> None:
    def infinite(bits: NDArray[np.uint16]) -> None:
        bits[3] = 0x7F80

    _poison(own_chat, infinite)
    for dtype in ("fp32", "bf16"):
        with pytest.raises(CorruptError, match=r"up_proj.weight' in .* holds NaN or infinity"):
            open_reference(own_chat, device="cpu", dtype=dtype)


def test_mapped_weights_are_those_of_the_file_and_leave_it_as_it_is(own_chat: Path) -> None:
    before = (own_chat / "model.safetensors").read_bytes()
    generator = open_reference(own_chat, device="cpu", dtype="bf16")
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    weight = generator._model.model.language_model.layers[3].mlp.up_proj.weight
    np.testing.assert_array_equal(weight.float().detach().numpy(), Checkpoint.open(own_chat).read(name))
    weight.data.zero_()
    assert (own_chat / "model.safetensors").read_bytes() == before


def test_files_that_are_missing_or_none(own_chat: Path) -> None:
    (own_chat / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptError, match="is no tokenizer"):
        Vocabulary(own_chat / VOCABULARY)
    (own_chat / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        Vocabulary(own_chat / VOCABULARY)
    (own_chat / "chat_template.jinja").unlink()
    for name in ("chat_template.json", "tokenizer_config.json"):
        (own_chat / name).unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="no chat template"):
        Checkpoint.open(own_chat).chat_template()
    (own_chat / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    assert Checkpoint.open(own_chat).chat_template() == "{{ x }}"
    (own_chat / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorruptError, match="is no JSON"):
        Checkpoint.open(own_chat).chat_template()


def test_pieces_are_bytes_and_special_tokens_have_none(chat_checkpoint: Path) -> None:
    vocabulary = Vocabulary(chat_checkpoint / VOCABULARY)
    text = "Größe 3 µm,  two spaces\n\nend 😀"
    assert b"".join(map(vocabulary.piece, vocabulary.tokenize(text))).decode() == text
    assert vocabulary.piece(vocabulary.special("<end_of_turn>")) == b""
    assert vocabulary.piece(10**6) == b""
    with pytest.raises(CorruptError, match="no token '<none>'"):
        vocabulary.special("<none>")
    with pytest.raises(UsageError, match="no UTF-8"):
        vocabulary.tokenize("\ud800")


def test_the_checkpoint_may_be_open_already(chat_checkpoint: Path) -> None:
    assert open_reference(Checkpoint.open(chat_checkpoint), device="cpu").image_tokens == 256
