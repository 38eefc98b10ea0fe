"""The small Gemma tokenizer: the published one's structure and template, one id per piece, made by its script.

And both in GGUF: llama.cpp gives the ids that the tokenizers library gives.
"""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from tests.models.mixed_text import mixed

import medge.models
from medge.checkpoint import Checkpoint
from medge.demo import tokenizer as made
from medge.errors import CorruptError
from medge.export import gguf_chat, gguf_stream
from medge.export.base import PartJob
from medge.models.gemma3 import TINY_TEXT
from medge.quantize.scheme import load
from medge.registry import spec_of

FOLDER = Path(medge.models.__file__).parent / "gemma_tokenizer"
PUBLISHED = Path(os.environ.get("MEDGE_GEMMA_TOKENIZER", "absent"))
"""The tokenizer/ that `just real-gemma DIR` fetches: 33 MB under Gemma's terms, never committed."""
TEXTS = (
    "A frontal view.",
    " two  spaces",
    "line\n\n\nline",
    "H&E 漢字 🙂 é",
    "",
    "<end_of_turn>\n<start_of_turn>model",
)

needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="MEDGE_GEMMA_TOKENIZER names no folder")
OWN_BLOCKS = re.compile("▁[▁ ]| ▁")
"""Where the published tokenizer and llama.cpp are known to part: see export/gguf_vocabulary.py."""
SPECIAL = {"bos_token": "<bos>"}
IMAGE = {"type": "image"}
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": " What is this? "}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "\nThis one?\n"}, IMAGE]},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "Before"}, IMAGE, {"type": "text", "text": "after"}]},
        {"role": "assistant", "content": "A chest x-ray.\n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ],
)
BROKEN: tuple[list[dict[str, Any]], ...] = (
    [{"role": "assistant", "content": "First"}],
    [{"role": "user", "content": "Once"}, {"role": "user", "content": "twice"}],
    [{"role": "user", "content": 3}],
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def content(name: str, folder: Path = FOLDER) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def render(template: str, messages: list[dict[str, Any]], prompt: bool) -> str:
    """As transformers does: blocks trimmed, exceptions from the template."""

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = fail
    compiled = environment.from_string(template)
    return str(compiled.render(messages=messages, add_generation_prompt=prompt, **SPECIAL))


def ours() -> str:
    return (FOLDER / "chat_template.jinja").read_text("utf-8")


def test_the_script_makes_these_files(tmp_path: Path) -> None:
    made.write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / name).read_bytes() == (tmp_path / name).read_bytes(), "run: python -m medge.demo.tokenizer"


def test_ids(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(2048))
    assert tokenizer.convert_ids_to_tokens(range(8)) == list(made.CONTROL)
    assert tokenizer.convert_ids_to_tokens([8, 263, 2047]) == ["<0x00>", "<0xFF>", "<image_soft_token>"]
    assert (tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id) == (2047, 6, 7)
    assert tokenizer.all_special_ids == [2, 1, 3, 0, 6, 7, 2047]


def test_ids_rise_with_the_rank_of_merges() -> None:
    model = content("tokenizer.json")["model"]
    results = [model["vocab"]["".join(pair)] for pair in model["merges"]]
    assert results == sorted(results)
    pieces = {piece for piece, i in model["vocab"].items() if i > 263}
    splits = {(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in pieces and p[i:] in pieces}
    assert splits == {tuple(pair) for pair in model["merges"]}


def sentencepiece(text: str) -> list[int]:
    """What llama.cpp's SPM path does with score = -id: join the neighbours whose piece has the lowest id."""
    vocabulary = content("tokenizer.json")["model"]["vocab"]
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [vocabulary.get("".join(pair), 1 << 30) for pair in pairwise(symbols)]
        if min(joined, default=1 << 30) == 1 << 30:
            break
        i = joined.index(min(joined))
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    spelled = [[vocabulary[s]] if s in vocabulary else [8 + byte for byte in s.encode()] for s in symbols]
    return [i for ids in spelled for i in ids]


@given(st.text("aehinorst THE.\n-09é漢▁", max_size=60))
@settings(max_examples=200, deadline=None)
def test_bpe_is_sentencepiece(text: str) -> None:
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(
        text, add_special_tokens=False
    ).ids == sentencepiece(text)


def test_text_survives(tokenizer: Any) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_the_template_renders_a_chat(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CHATS[2], tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>This one?<start_of_image><end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("messages", BROKEN)
def test_the_template_refuses_what_is_no_chat(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TemplateError, match=r"alternate|list of texts"):
        render(ours(), messages, True)


@needs_published
def test_the_template_is_gemmas() -> None:
    published = content("tokenizer_config.json", PUBLISHED)["chat_template"]
    for chat in CHATS:
        for prompt in (True, False):
            assert render(ours(), chat, prompt) == render(published, chat, prompt)
    for chat in BROKEN:
        with pytest.raises(TemplateError):
            render(published, chat, True)


@needs_published
def test_the_structure_is_gemmas() -> None:
    own, published = content("tokenizer.json"), content("tokenizer.json", PUBLISHED)
    for side in (own, published):
        for varying in ("vocab", "merges"):
            del side["model"][varying]
        del side["added_tokens"]
        side["post_processor"]["special_tokens"]["<bos>"].pop("ids")
    assert own == published
    keys = set(content("tokenizer_config.json", PUBLISHED)) - {"chat_template", "sp_model_kwargs"}
    assert set(content("tokenizer_config.json")) == keys


def test_the_processor_takes_it(tokenizer: Any) -> None:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    images = Gemma3ImageProcessor(size={"height": 64, "width": 64}, image_seq_length=16)
    processor = Gemma3Processor(images, tokenizer, chat_template=ours(), image_seq_length=16)
    image = [{**IMAGE, "image": Image.new("RGB", (9, 9))}, {"type": "text", "text": "What is this?"}]
    chat = [{"role": "user", "content": image}]
    ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert processor.decode(ids[0]) == (
        "<bos><start_of_turn>user\n\n\n<start_of_image>"
        + "<image_soft_token>" * 16
        + "<end_of_image>\n\nWhat is this?<end_of_turn>\n<start_of_turn>model\n"
    )


def in_llama_cpp(folder: Path, size: int, out: Path) -> Any:
    """A tokenizer of `size` ids as llama.cpp reads it from a GGUF of medge's without weights."""
    import llama_cpp

    spec = spec_of({**TINY_TEXT, "model_type": "gemma3_text", "vocab_size": size}, "vocabulary")
    job = PartJob(Checkpoint(folder, spec, {}), spec.parts[0], load("fp16"))
    gguf_stream.write(out, gguf_chat.keys(job), [], lambda count: None)
    return llama_cpp.Llama(str(out), vocab_only=True, verbose=False)


def compare(folder: Path, size: int, out: Path) -> tuple[int, list[str]]:
    """How many ids were compared, and the texts whose ids differ."""
    from tokenizers import Tokenizer

    theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), in_llama_cpp(folder, size, out)
    count, differing = 0, []
    for text in mixed(folder / "tokenizer.json"):
        expected = theirs.encode(text, add_special_tokens=False).ids
        if ours.tokenize(text.encode(), add_bos=False, special=True) == expected:
            count += len(expected)
        else:
            differing.append(text)
    return count, differing


def test_llama_cpp_gives_the_same_ids(tmp_path: Path) -> None:
    count, differing = compare(FOLDER, 2048, tmp_path / "small.gguf")
    assert differing == []
    assert count > 50_000


@needs_published
def test_llama_cpp_gives_the_published_ids(tmp_path: Path) -> None:
    count, differing = compare(PUBLISHED, 262_208, tmp_path / "published.gguf")
    assert [text for text in differing if not OWN_BLOCKS.search(text)] == []
    assert count > 50_000


def test_a_tokenizer_larger_than_the_embedding_is_another_models(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="more tokens than the 2000"):
        in_llama_cpp(FOLDER, 2000, tmp_path / "short.gguf")


def test_an_image_token_past_a_text_models_embedding_is_left_out(tmp_path: Path) -> None:
    vocabulary = in_llama_cpp(FOLDER, 2047, tmp_path / "text.gguf")
    assert vocabulary.n_vocab() == 2047
    assert len(vocabulary.tokenize(b"<image_soft_token>", add_bos=False, special=True)) > 1
