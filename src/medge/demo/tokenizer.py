"""Trains the small Gemma tokenizer: `python -m medge.demo.tokenizer --out DIR`.

Same structure as Gemma 3's own (its published tokenizer.json): BPE over text whose spaces are "▁", byte fallback,
every way to merge a piece listed, `<bos>` first. So the same code reads both, in transformers as in llama.cpp,
whose SentencePiece path merges the pair with the highest score, here -id. Gemma's own vocabulary is under Gemma's
terms and 33 MB; this one holds our own words, in 2,048 ids:

    0-7        <pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image>
    8-263      bytes
    264-       merged pieces, the earlier the better, then single characters
    2047       <image_soft_token>
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from medge.demo import findings

CONTROL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
)
"""Ids 0 to 7."""
IMAGE_TOKEN = "<image_soft_token>"  # noqa: S105, no password
"""The last id: the place of one image embedding."""
VOCABULARY = 2048
_SPACE = "▁"

_UNIT = rf"{_SPACE}?\p{{L}}+|{_SPACE}?[^\p{{L}}\p{{N}}\s{_SPACE}]+|\p{{N}}|{_SPACE}+"
"""What a piece never crosses: a word or a run of punctuation with the space before it, a digit, a run of spaces."""

_WORDS = """
a about above abnormal absent acute after against age all along also although always an and any appear appearance
are area around artery as assess at available back based be because been before being below best better between
blood body bone both brain but by calcification can cannot cardiac case catheter cavity cell cells central change
changes chart chest chronic clear clinical close colour come common compare comparison compatible complete contrast
correct could cross day days dense density describe described diagnosis did difference diffuse disease distal do
does done dose down due during each early edge effusion either enlarged enough even evaluate evidence exact example
examination expected explain false few field fill find finding findings first fluid focal follow for form found
fracture free from full function further gas give given good great grey had half has have he heart help her here
high his history hospital how however i if image images imaging impression in include indication information inside
interval into is it its just keep kidney know large last lateral least left length less lesion let level lie light
like likely limit limited line list liver lobe local long look low lower lung made make many margin mark mass may me
mean measure medical mild model more most motion much must name near need never new next no node normal not note
nothing now number object of off old on once one only onto open or order other our out over page pain part past
patient patients per place plain plane please point position possible present previous prior probe proximal put
question questions quality quite range rather read reading reason region remain report result review right ring
round said same saw say scan second section see seen sequence series several shape share she short should show shown
shows side sign signal similar since single size slice slightly small so some source space spine standard state still
stomach structure structures study such suggest surface surgery system take task technique test text than that the
their them then there these they thickness thin thing think this those three through time tissue to today together
too top total treatment true try tube turn two type under unchanged unit unremarkable until up upper upright us use
used user using usual usually value vein very vessel view visible volume wall want was water way we week well were
what when where which while white who whole why wide will window with within without woman word words work would
write year years yes you your zero
"""
"""Common words of English and of reports, so that text outside the findings is not spelled in letters."""

_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + "\n" + _SPACE + "°µ×±–’éäöü"


def _corpus() -> Iterator[str]:
    """Each text at the start of a line and within one, so with and without a space before it."""
    for text in [*findings.texts(), *_WORDS.split()]:
        yield from (text, f" {text}")


def learn(count: int) -> list[str]:
    """The first `count` pieces of byte-pair encoding (arXiv:1508.07909) of our own words, best first."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", _SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_UNIT), "isolated")
    size = count + len(_CHARACTERS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(_CHARACTERS), show_progress=False)
    learner.train_from_iterator(_corpus(), trainer)
    ids = learner.get_vocab()
    return [piece for piece in sorted(ids, key=ids.__getitem__) if len(piece) > 1]


def vocabulary() -> dict[str, int]:
    """Piece -> id, without the image token."""
    first = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = learn(VOCABULARY - 1 - len(first) - len(_CHARACTERS))
    return {piece: i for i, piece in enumerate([*first, *pieces, *_CHARACTERS])}


def merges(ids: dict[str, int]) -> list[list[str]]:
    """Every split of every piece into two others, in the order of the pieces, the longest left part first.

    BPE then merges whichever pair makes the lowest id, as SentencePiece does.
    """
    pieces = list(ids)[len(CONTROL) + 256 :]
    known = set(pieces)
    return [
        [piece[:i], piece[i:]]
        for piece in pieces
        for i in range(len(piece) - 1, 0, -1)
        if piece[:i] in known and piece[i:] in known
    ]


def _added(content: str, id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags}


def _bos(kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": "<bos>", "type_id": kind}}


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json."""
    ids = vocabulary()
    a, b = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    special = {"<bos>": {"id": "<bos>", "ids": [ids["<bos>"]], "tokens": ["<bos>"]}}
    space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*(_added(name, i) for i, name in enumerate(CONTROL)), _added(IMAGE_TOKEN, VOCABULARY - 1)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_bos(0), a],
            "pair": [_bos(0), a, _bos(1), b],
            "special_tokens": special,
        },
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges(ids),
        },
    }


def config() -> dict[str, Any]:
    """The content of tokenizer_config.json: Gemma's keys and values, with our ids."""
    added = {str(entry.pop("id")): entry for entry in tokenizer()["added_tokens"]}
    markers = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": IMAGE_TOKEN}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        **markers,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "extra_special_tokens": markers,
        "model_max_length": 8192,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "Gemma3Processor",
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def write(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json in `folder`; chat_template.jinja is written by hand."""
    for name, content in (("tokenizer.json", tokenizer()), ("tokenizer_config.json", config())):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")


def main(out: Annotated[Path, typer.Option(help="Folder for tokenizer.json and tokenizer_config.json")]) -> None:
    """Train the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    write(out)


if __name__ == "__main__":
    typer.run(main)
