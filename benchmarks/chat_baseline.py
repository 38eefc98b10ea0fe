"""The reference's answers to a set of prompts: captured once, kept as a folder, opened by every check.

BASE/baseline.json           ChatBaselineManifest
BASE/goldens.safetensors     the token ids that were read, and the distributions after them (distributions.py)

Every prompt is read token by token with the reference's own answer behind it (teacher forcing), so that two models
are compared after the same text. Places within an image are left out: no model is trained to predict there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medge.benchmarks import host
from medge.benchmarks.baseline import BASELINE, GOLDENS, Identity, Progress, quiet
from medge.benchmarks.chat_data import BUILT_IN, ChatDataset, built_in, load_prompts
from medge.benchmarks.distributions import TAIL, TOP, Ids, Kept, keep
from medge.benchmarks.host import Host
from medge.benchmarks.records import Record
from medge.errors import CorruptError, RegressedError, UsageError
from medge.manifest import File, Sha256, describe, sha256
from medge.prompts import Item, Kind
from medge.runtimes.chat import IMAGE_TOKEN
from medge.runtimes.generate import GenerateOptions, Generation, Generator, Message, Prompt, complete
from medge.runtimes.images import load_image
from medge.spec import FloatArray, Frozen, ImageSpec
from medge.staging import staged
from medge.tensorfile import read_header, write

MAX_TOKENS = 32
"""Tokens of a greedy answer: enough to see where it leaves the reference's."""
BOS = "<bos>"
_DISTRIBUTIONS = tuple(field.name for field in fields(Kept))


class Asked(Frozen):
    """One prompt and what the reference made of it."""

    name: str
    kind: Kind
    images: int = Field(ge=0)
    prompt_tokens: int = Field(gt=0)
    """Of the rendered prompt, images included."""
    tokens: int = Field(gt=1)
    """Of all that was read: the prompt and what follows it."""
    answer: str = ""
    """What is right."""
    choices: tuple[str, ...] = ()
    reply: str = ""
    """What the reference answered."""


class ChatBaselineManifest(Record):
    """baseline.json of a generator: what the reference was, what it read and answered, and where it ran."""

    task: Literal["generate"] = "generate"
    model: str
    hub_id: str = ""
    weights_sha256: Sha256
    image: ImageSpec | None
    reference: str
    """The reference runtime, named: "torch 2.13.0 cpu bf16"."""
    data: str
    """Where the prompts lay; `check` reads them there unless told."""
    data_digest: Sha256
    count: int | None = None
    """How many prompts were taken of them; None: all."""
    image_id: int
    """The token that stands for each part of an image; -1 where the model reads none."""
    max_tokens: int = Field(gt=0)
    asked: tuple[Asked, ...] = Field(min_length=1)
    host: Host
    goldens: File


@dataclass(frozen=True)
class ChatBaseline:
    """A baseline folder, opened: its goldens hash and shape as its manifest says, and all are finite."""

    manifest: ChatBaselineManifest
    ids: Ids
    """All tokens of all prompts, one after another."""
    kept: Kept
    """The distributions at `places` of each prompt, one after another."""

    def sequences(self) -> list[Ids]:
        """Each prompt's tokens."""
        ends = np.cumsum([asked.tokens for asked in self.manifest.asked])
        return np.split(self.ids, ends[:-1])

    @classmethod
    def open(cls, root: str | Path) -> ChatBaseline:
        """Read a baseline and prove it whole.

        Raises:
            UsageError: no baseline there, or one of an encoder.
            CorruptError: altered, truncated, newer than this medge, or not of one piece.
        """
        root = Path(root)
        if not (root / BASELINE).is_file():
            raise UsageError(f"{root} is no baseline: it has no {BASELINE}", "Make one: medge baseline capture")
        if task_of(root) == "embed":
            raise UsageError(f"{root} is the baseline of an encoder, not of a chat model", "Name another --against")
        manifest = ChatBaselineManifest.load(root / BASELINE)
        path = root / manifest.goldens.path
        if not path.is_file() or path.stat().st_size != manifest.goldens.bytes:
            raise CorruptError(f"{path} is missing or truncated", "Capture the baseline again")
        if sha256(path) != manifest.goldens.sha256:
            raise CorruptError(f"{path} was altered: its sha256 differs", "Capture the baseline again")
        return _read(path, manifest)


def task_of(root: Path) -> str:
    """Whose baseline a folder holds: "generate" or "embed"; empty where none can be read."""
    try:
        document = json.loads((root / BASELINE).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(document.get("task", "embed")) if isinstance(document, dict) else ""


def _read(path: Path, manifest: ChatBaselineManifest) -> ChatBaseline:
    entries = read_header(path)
    if not {"ids", *_DISTRIBUTIONS} <= set(entries):
        raise CorruptError(f"{path} lacks the baseline's arrays", "Capture the baseline again")
    arrays: dict[str, Any] = {name: entries[name].read().astype(np.float64) for name in ("ids", *_DISTRIBUTIONS)}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise CorruptError(f"{path} holds NaN or infinity", "Capture the baseline again")
    ids = arrays.pop("ids").astype(np.int64)
    kept = Kept(**{name: array.astype(np.int64) if name.endswith("_ids") else array for name, array in arrays.items()})
    baseline = ChatBaseline(manifest, ids, kept)
    if len(ids) != sum(asked.tokens for asked in manifest.asked) or not _fits(baseline):
        raise CorruptError(f"{path} does not fit its {BASELINE}", "Capture the baseline again")
    return baseline


def _fits(baseline: ChatBaseline) -> bool:
    count = sum(len(places(ids, baseline.manifest.image_id)) for ids in baseline.sequences())
    kept = baseline.kept
    tops, tails = kept.top_ids.shape, kept.tail_ids.shape
    return (
        all(len(getattr(kept, name)) == count for name in _DISTRIBUTIONS)
        and (kept.top_logprobs.shape, kept.tail_logprobs.shape) == (tops, tails)
        and (len(tops), len(tails), kept.tail_mass.ndim, kept.logprobs.ndim) == (2, 2, 1, 1)
    )


def places(ids: Ids, image_id: int) -> Ids:
    """Where a text's next token is predicted: tokens that have a successor, neither of them part of an image."""
    text = ids != image_id
    return np.flatnonzero(text[:-1] & text[1:])


def prompt_of(generator: Generator, item: Item) -> Prompt:
    """What a generator reads: the rendered chat, or a plain text after the token that begins every text."""
    if item.kind == "text":
        return Prompt(tuple(generator.tokenize(BOS + item.text)))
    return generator.prompt(item.messages)


def first_tokens(generator: Generator, choices: Sequence[str]) -> list[int]:
    """The token that each choice begins with.

    Raises:
        UsageError: two choices begin alike, so that their first tokens do not tell them apart.
    """
    firsts = [generator.tokenize(choice)[0] for choice in choices]
    if len(set(firsts)) < len(firsts):
        raise UsageError(f"The choices {', '.join(choices)} do not differ in their first token", "Letter them: A, B, C")
    return firsts


def greedy(generator: Generator, messages: Sequence[Message], limit: int) -> Generation:
    """The likeliest answer, token by token."""
    return complete(generator, messages, GenerateOptions(max_tokens=limit))


def blocks(generator: Generator, ids: Ids, item: Item) -> Iterator[FloatArray]:
    """Logits after each of the ids, in blocks.

    Raises:
        RegressedError: a logit is not finite.
    """
    pictures = tuple(load_image(image) for image in item.images)
    for block in generator.logits(Prompt(tuple(ids.tolist()), pictures)):
        if not np.isfinite(block).all():
            raise RegressedError(f"{generator.name}: logits of '{item.name}' hold NaN or infinity", "It overflows")
        yield block


def at_places(
    found: Iterator[FloatArray], where: Ids, keep_last: int, use: Callable[[FloatArray, slice], None]
) -> FloatArray:
    """Pass the rows of blocks that are `where` to `use`, with their share of it; return row `keep_last`."""
    start, kept = 0, np.empty(0, np.float32)
    for block in found:
        stop = start + len(block)
        first, last = np.searchsorted(where, (start, stop))
        if last > first:
            use(block[where[first:last] - start], slice(int(first), int(last)))
        if start <= keep_last < stop:
            kept = block[keep_last - start].copy()
        start = stop
    return kept


def capture(
    checkpoint: Path,
    data: str | Path,
    out: Path,
    *,
    count: int | None = None,
    max_tokens: int = MAX_TOKENS,
    replace: bool = False,
    progress: Progress = quiet,
) -> ChatBaseline:
    """Let the torch reference answer a set of prompts and keep what it computed as a baseline folder.

    Raises:
        UsageError: no checkpoint, an unusable set of prompts, or `out` exists.
        WeightsError, CorruptError: the checkpoint is incomplete or unsound.
        MissingExtraError: torch is not installed.
    """
    from medge.checkpoint import Checkpoint
    from medge.runtimes.torch_generator import open_reference

    if out.exists() and not replace:  # before minutes of work, not after
        raise UsageError(f"{out} exists", "Name another folder, or pass --force to replace it")
    source = Checkpoint.open(checkpoint)
    spec = source.chat_spec
    dataset = prompts(data, images=spec.image is not None, count=count)
    identity = Identity(spec.id, spec.hub_id, source.sha256)
    reference = open_reference(source)
    try:
        return record(
            reference, identity, dataset, out, count=count, max_tokens=max_tokens, replace=replace, progress=progress
        )
    finally:
        reference.close()


def prompts(data: str | Path, *, images: bool, count: int | None) -> ChatDataset:
    """A set of prompts by its path or name, cut to `count`."""
    dataset = built_in(images=images) if str(data) == BUILT_IN else load_prompts(data)
    return dataset if count is None else dataset.first(count)


def record(
    reference: Generator,
    identity: Identity,
    dataset: ChatDataset,
    out: Path,
    *,
    count: int | None = None,
    max_tokens: int = MAX_TOKENS,
    replace: bool = False,
    progress: Progress = quiet,
) -> ChatBaseline:
    """Keep an opened reference's answers: what `capture` does, for any generator that can serve as one."""
    image_id = reference.tokenize(IMAGE_TOKEN)[0] if reference.image else -1
    asked, sequences, kept = [], [], []
    for done, item in enumerate(dataset.items, start=1):
        each, ids, distributions = _ask(reference, item, image_id, max_tokens)
        asked.append(each)
        sequences.append(ids)
        kept.append(distributions)
        progress(done, len(dataset.items))

    def manifest(goldens: File) -> ChatBaselineManifest:
        return ChatBaselineManifest(
            model=identity.model,
            hub_id=identity.hub_id,
            weights_sha256=identity.weights_sha256,
            image=reference.image,
            reference=reference.name,
            data=dataset.source,
            data_digest=dataset.digest,
            count=count,
            image_id=image_id,
            max_tokens=max_tokens,
            asked=tuple(asked),
            host=host.fingerprint(),
            goldens=goldens,
        )

    return _write(out, np.concatenate(sequences), Kept.join(kept), manifest, replace=replace)


def _ask(reference: Generator, item: Item, image_id: int, max_tokens: int) -> tuple[Asked, Ids, Kept]:
    """The reference's answer, then its distributions at every place of prompt and answer."""
    prompt = prompt_of(reference, item)
    firsts = first_tokens(reference, item.choices)
    reply, behind = "", []
    if item.kind in ("exact", "f1"):
        answered = greedy(reference, item.messages, max_tokens)
        reply = answered.text
        behind = list(takewhile(lambda token: token != image_id, (token.id for token in answered.tokens)))
    elif firsts:
        behind = [firsts[item.choices.index(item.answer)]]
    ids = np.array([*prompt.ids, *behind], np.int64)
    where, rng, parts = places(ids, image_id), np.random.default_rng(len(ids)), []

    def use(rows: FloatArray, share: slice) -> None:
        parts.append(keep(rows, ids[where[share] + 1], rng, top=TOP, tail=TAIL))

    last = at_places(blocks(reference, ids, item), where, len(prompt.ids) - 1, use)
    asked = Asked(
        name=item.name,
        kind=item.kind,
        images=len(item.images),
        prompt_tokens=len(prompt.ids),
        tokens=len(ids),
        answer=item.answer,
        choices=item.choices,
        reply=item.choices[int(last[firsts].argmax())] if firsts else reply,
    )
    return asked, ids, Kept.join(parts)


def _write(
    out: Path, ids: Ids, kept: Kept, make: Callable[[File], ChatBaselineManifest], *, replace: bool
) -> ChatBaseline:
    """The folder, whole or not at all. Ids are exact in float32 up to 2**24."""
    tensors: Mapping[str, FloatArray] = {
        name: np.asarray(value, np.float32)
        for name, value in (("ids", ids), *((name, getattr(kept, name)) for name in _DISTRIBUTIONS))
    }
    with staged(out, replace=replace) as folder:
        write(folder / GOLDENS, {name: value.shape for name, value in tensors.items()}, tensors.__getitem__)
        manifest = make(describe(folder, GOLDENS))
        manifest.save(folder / BASELINE)
        return _read(folder / GOLDENS, manifest)
