"""The verb that answers: generate."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medge.cli.console import Json, Settings, Threads, parse_settings, print_json, progress, say
from medge.cli.inference import ArtifactPath
from medge.errors import UsageError

if TYPE_CHECKING:
    from medge.runtimes.generate import GenerateOptions, Generation, Generator, Message, Reply, Token

PLACE = "<image>"
"""Where an image goes in --prompt."""


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(generate)


def generate(
    artifact: ArtifactPath,
    prompt: Annotated[
        str, typer.Option(help=f"The question; {PLACE} in it is an image's place. '-' reads standard input.")
    ],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="An image or DICOM file; a folder is one CT series.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="An instruction before the question.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    settings: Settings = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer a question, with images where the model reads them.

    What a model thinks before it answers is left out; --stream shows it on stderr, --json has it apart.

    --set takes max_tokens, temperature, top_k, top_p, min_p, seed, stop, logprobs, context, and schema or grammar,
    each the name of a file. The answer is greedy unless temperature is set.
    """
    from medge.runtimes.generate import whole

    if stream and json:
        raise UsageError("--stream and --json exclude each other", "Give one")
    given = parse_settings(settings)
    context = _number("context", given.pop("context")) if "context" in given else None
    options = _options(given)
    model = _open(artifact, threads, context)
    messages = _messages(model, _text(prompt), image or [], system, options.max_tokens)
    reply = model.generate(messages, options)
    answer = whole(_stream(reply) if stream else _collect(reply, options.max_tokens), reply.tally)
    if not stream:
        _print(answer, model.name, json)
    if answer.finish == "length":
        say(_cut_short(answer, options.max_tokens))
    say("Not a medical device: an answer is no diagnosis.")


def _open(artifact: Path, threads: int | None, context: int | None) -> Generator:
    from medge.runtimes import open_generator
    from medge.runtimes.generate import ChatRunOptions

    return open_generator(artifact, ChatRunOptions(threads=threads, context=context))


def _text(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("The prompt is empty", "Ask something: --prompt TEXT, or '-' for standard input")
    return text


def _options(given: Mapping[str, str]) -> GenerateOptions:
    from medge.runtimes.generate import GenerateOptions

    kinds = {field.name: type(field.default) for field in dataclasses.fields(GenerateOptions)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in kinds:
            raise UsageError(f"--set {key}: no such setting", f"Settings: {', '.join([*kinds, 'context'])}")
        if key == "schema":
            values[key] = _schema(Path(value))
        elif key == "grammar":
            values[key] = _read(Path(value))
        else:
            values[key] = (value,) if key == "stop" else _number(key, value, kinds[key])
    return GenerateOptions(**values)


def _number(key: str, value: str, kind: type[Any] = int) -> Any:
    try:
        return kind(value)
    except ValueError:
        number = "whole number" if kind is int else "number"
        raise UsageError(f"--set {key}={value} is no {number}", f"Give one, as --set {key}={kind(1)}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8", "Save it as UTF-8") from None


def _schema(path: Path) -> Any:
    try:
        return json_module.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}", "Give a file that holds one JSON Schema") from None


def _messages(
    model: Generator, prompt: str, images: Sequence[Path], system: str | None, max_tokens: int
) -> list[Message]:
    from medge.runtimes.generate import Message

    before = [Message("system", (system,))] if system else []
    if any(path.is_dir() for path in images):
        return [*before, _ct(model, prompt, images, max_tokens)]
    return [*before, Message("user", tuple(_interleaved(prompt, images)))]


def _ct(model: Generator, prompt: str, images: Sequence[Path], max_tokens: int) -> Message:
    from medge.runtimes.volumes import ct_message, ct_slices, slice_budget

    if len(images) > 1 or PLACE in prompt:
        raise UsageError("A CT series stands alone: its slices come before the question", "Give one folder")
    slices = ct_slices(images[0], slice_budget(model, prompt, max_tokens))
    if slices.note:
        say(f"{slices.note}: what a context of {model.context:,} tokens allows, or MedGemma takes at most.")
    return ct_message(slices, prompt)


def _interleaved(prompt: str, images: Sequence[Path]) -> list[str | Path]:
    """Images in their places, or after the question where it names none, as MedGemma's model card has them."""
    texts = prompt.split(PLACE)
    if len(texts) == 1:
        return [prompt, *images]
    if len(texts) != len(images) + 1:
        raise UsageError(
            f"The prompt has {len(texts) - 1} {PLACE} and {len(images)} --image are given",
            f"Give one {PLACE} for each --image, or none and all come after the question",
        )
    content: list[str | Path] = [texts[0]]
    for path, text in zip(images, texts[1:], strict=True):
        content += [path, text]
    return [item for item in content if item != ""]


def _collect(reply: Reply, total: int) -> list[Token]:
    tokens: list[Token] = []
    with progress() as report:
        report("answer", 0, total)
        for token in reply:
            tokens.append(token)
            report("answer", len(tokens), total)
    return tokens


def _stream(reply: Reply) -> list[Token]:
    """The answer on stdout while it is made; what the model thinks before goes to stderr."""
    tokens: list[Token] = []
    for token in reply:
        if tokens and tokens[-1].thought and not token.thought:
            sys.stderr.write("\n\n")
        out = sys.stderr if token.thought else sys.stdout
        out.write(_printable(token.text))
        out.flush()
        tokens.append(token)
    sys.stdout.write("\n")
    return tokens


def _cut_short(answer: Generation, max_tokens: int) -> str:
    where = "while the model was still thinking" if answer.thought and not answer.text else "before the answer's end"
    full = len(answer.tokens) < max_tokens
    return f"Cut {where}: {'the context is full' if full else f'--set max_tokens={max_tokens} is reached'}."


def _printable(text: str) -> str:
    """Without what would steer the terminal: a model writes whatever a prompt brings it to write."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _print(answer: Generation, name: str, json: bool) -> None:
    if not json:
        sys.stdout.write(_printable(answer.text) + "\n")
        return
    document = {**dataclasses.asdict(answer), "runtime": name}
    if not any(token.top for token in answer.tokens):
        document["tokens"] = len(answer.tokens)  # their texts alone say nothing that `text` does not
    print_json(document)
