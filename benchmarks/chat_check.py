"""The gate for generators: an artifact reads what the reference read, answers what it answered, and is judged.

What may be compared is checked first: the same weights, the same prompts and images, the same preprocessing. The
distributions are compared after the very tokens that the reference read, so that an artifact whose tokenizer errs
is found by a metric of its own, and its other figures still mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medge.benchmarks.baseline import Progress, quiet, require_same_model
from medge.benchmarks.chat_baseline import (
    Asked,
    ChatBaseline,
    ChatBaselineManifest,
    at_places,
    blocks,
    first_tokens,
    greedy,
    places,
    prompt_of,
    prompts,
)
from medge.benchmarks.chat_data import ChatDataset
from medge.benchmarks.chat_metrics import CHAT_BY_NAME, CHAT_LIMITS, CHAT_METRICS, Answered, ChatEvidence
from medge.benchmarks.distributions import Ids, Kept, Seen, see
from medge.benchmarks.host import fingerprint
from medge.benchmarks.metrics import Limit, judge, load_limits
from medge.benchmarks.records import CheckResult, Reference, Reply, Subject, Verdict
from medge.errors import CorruptError, UsageError, require
from medge.manifest import Artifact
from medge.prompts import Item
from medge.spec import FloatArray

if TYPE_CHECKING:
    from medge.runtimes.base import RunOptions
    from medge.runtimes.generate import Generator

ChatOpener = Callable[[Path], "Generator"]


def check(
    artifact: Path,
    against: Path,
    *,
    data: str | Path | None = None,
    limits: Path = CHAT_LIMITS,
    options: RunOptions | None = None,
    opener: ChatOpener | None = None,
    progress: Progress = quiet,
) -> CheckResult:
    """Hold a chat artifact against a baseline.

    `data` says where the baseline's prompts lie now; `opener` opens the artifact in another runtime.

    Raises:
        UsageError: another model, set of prompts or preprocessing than the baseline's, or a scheme without limits.
        MissingExtraError: scipy is not installed.
        CorruptError: the artifact or the baseline contradicts itself, or they differ in vocabulary.
        RegressedError: the artifact gives a logit that is not finite.
    """
    require("scipy", "eval")  # before minutes of work, not after
    opened, baseline = Artifact.open(artifact), ChatBaseline.open(against)
    require_same_model(
        opened.manifest,
        baseline.manifest,
        "Export with the image tower, and with the checkpoint's own preprocessing",
    )
    bounds = load_limits(opened.manifest.scheme, limits, CHAT_BY_NAME)
    dataset = _dataset(baseline.manifest, data)
    generator = opener(artifact) if opener else _open(artifact, options)
    try:
        evidence = examine(generator, baseline, dataset, progress)
        runtime = generator.name
    finally:
        generator.close()
    verdicts, notes = judged(evidence, bounds)
    return CheckResult(
        artifact=Subject.of(opened),
        runtime=runtime,
        host=fingerprint(),
        reference=_reference(baseline),
        verdicts=tuple(verdicts),
        notes=(_tail_note(baseline.kept), *notes),
        replies=tuple(_replies(baseline.manifest, evidence)),
    )


def _open(artifact: Path, options: RunOptions | None) -> Generator:
    from medge import runtimes

    return runtimes.open_generator(artifact, options)


def _dataset(baseline: ChatBaselineManifest, data: str | Path | None) -> ChatDataset:
    dataset = prompts(data or baseline.data, images=baseline.image is not None, count=baseline.count)
    if dataset.digest != baseline.data_digest:
        raise UsageError(
            f"{data or baseline.data} holds other prompts or images than the baseline saw",
            "Restore them, or capture a new baseline",
        )
    return dataset


def examine(
    generator: Generator, baseline: ChatBaseline, dataset: ChatDataset, progress: Progress = quiet
) -> ChatEvidence:
    """Let a generator read and answer everything that the reference read and answered."""
    manifest, start = baseline.manifest, 0
    seen, given, answers = [], [], []
    for done, (asked, ids, item) in enumerate(
        zip(manifest.asked, baseline.sequences(), dataset.items, strict=True), start=1
    ):
        where = places(ids, manifest.image_id)
        kept, start = baseline.kept.rows(start, start + len(where)), start + len(where)
        parts: list[Seen] = []
        last = _read(generator, item, ids, kept, parts, asked.prompt_tokens - 1, manifest.image_id)
        seen += parts
        given.append((where + 1 < asked.prompt_tokens) | (asked.kind == "choice"))
        answers.append(_answered(generator, manifest, asked, item, ids, last))
        progress(done, len(dataset.items))
    return ChatEvidence(baseline.kept, Seen.join(seen), np.concatenate(given), answers)


def _read(
    generator: Generator, item: Item, ids: Ids, kept: Kept, parts: list[Seen], keep_last: int, image_id: int
) -> FloatArray:
    """Collect what the generator finds likely at each place; its logits after `keep_last`."""
    where = places(ids, image_id)

    def use(rows: FloatArray, share: slice) -> None:
        here = kept.rows(share.start, share.stop)
        if max(here.top_ids.max(), ids.max()) >= rows.shape[1]:
            raise CorruptError(
                f"The artifact's vocabulary has {rows.shape[1]:,} tokens, fewer than the reference's", "Export it again"
            )
        parts.append(see(rows, ids[where[share] + 1], here))

    return at_places(blocks(generator, ids, item), where, keep_last, use)


def _answered(
    generator: Generator, manifest: ChatBaselineManifest, asked: Asked, item: Item, ids: Ids, last: FloatArray
) -> Answered:
    """The artifact's own answer beside the reference's."""
    ours, tokens = "", tuple[int, ...]()
    if item.kind == "choice":
        ours = item.choices[int(last[first_tokens(generator, item.choices)].argmax())]
    elif item.kind != "text":
        reply = greedy(generator, item.messages, manifest.max_tokens)
        ours, tokens = reply.text, tuple(token.id for token in reply.tokens)
    return Answered(
        kind=item.kind,
        right=item.answer,
        theirs=asked.reply,
        ours=ours,
        choices=len(item.choices),
        their_tokens=tuple(ids[asked.prompt_tokens :].tolist()),
        our_tokens=tokens,
        same_prompt=list(prompt_of(generator, item).ids) == ids[: asked.prompt_tokens].tolist(),
    )


def judged(evidence: ChatEvidence, limits: Mapping[str, Limit]) -> tuple[list[Verdict], list[str]]:
    """Every metric that has a limit, held against it; and why the others are not."""
    verdicts, notes = [], []
    for metric in CHAT_METRICS:
        assert metric.measure is not None, metric.name  # noqa: S101 - true of all of them
        if metric.name not in limits:
            continue
        estimate = metric.measure(evidence)
        if isinstance(estimate, str):
            notes.append(f"{metric.title}: not judged, {estimate}.")
        else:
            detail = _all_places(evidence) if metric.name == "token_top1_agreement" else ""
            verdicts.append(judge(metric, estimate, limits[metric.name], detail))
    return verdicts, notes


def _all_places(evidence: ChatEvidence) -> str:
    return f"{evidence.same_first.mean():.1%} of all {len(evidence.same_first):,} places, near ties included"


def _tail_note(kept: Kept) -> str:
    """How much of the divergence is estimated."""
    mean, most = float(kept.tail_mass.mean()), float(kept.tail_mass.max())
    top, tail = kept.top_ids.shape[1], kept.tail_ids.shape[1]
    if most == 0:
        return "KL divergence: exact, the whole vocabulary was kept."
    return (
        f"KL divergence: exact over the {top} likeliest tokens of each place; of the others, {mean:.2%} of the mass "
        f"({most:.1%} at most), estimated from {tail} drawn by the reference, never below the least possible value."
    )


def _reference(baseline: ChatBaseline) -> Reference:
    manifest = baseline.manifest
    return Reference(
        runtime=manifest.reference,
        host=manifest.host,
        dataset_digest=manifest.data_digest,
        images=sum(asked.images for asked in manifest.asked),
        variant=manifest.image.variant if manifest.image else "",
        captured=manifest.created,
        prompts=len(manifest.asked),
        places=len(baseline.kept),
    )


def _replies(manifest: ChatBaselineManifest, evidence: ChatEvidence) -> list[Reply]:
    """Every answer, changed ones first, those that part early before those that part late."""
    pairs = [pair for pair in zip(manifest.asked, evidence.answers, strict=True) if pair[0].kind != "text"]
    pairs.sort(key=lambda pair: _rank(pair[1]))
    return [
        Reply(
            name=asked.name,
            kind=asked.kind,
            right=answer.right,
            reference=answer.theirs,
            artifact=answer.ours,
            diverges=answer.diverges,
        )
        for asked, answer in pairs
    ]


def _rank(answer: Answered) -> tuple[bool, float]:
    return answer.ours == answer.theirs, float("inf") if answer.diverges is None else answer.diverges
