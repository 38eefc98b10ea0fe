"""`medge generate`: from the shell to a generator and back."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from medge.errors import UsageError
from medge.runtimes.generate import Finish, GenerateOptions, Message, Reply, Tally, Token

Cli = Callable[..., tuple[int, str, str]]


class Echo:
    """A generator that answers with what it was asked."""

    name = "echo"
    image = None
    image_tokens = 16

    def __init__(self) -> None:
        self.context = 8192
        self.messages: Sequence[Message] = ()
        self.options = GenerateOptions()
        self.opened: Any = None
        self.answer: tuple[str, ...] = ("Cardio", "megaly 中")
        self.thought: tuple[str, ...] = ()
        self.finish: Finish = "stop"

    def generate(self, messages: Sequence[Message], options: GenerateOptions, **_: Any) -> Reply:
        self.messages, self.options = messages, options
        tally = Tally(prompt_tokens=7, finish=self.finish)
        top = ((1, -0.5),) if options.logprobs else ()
        thought = [Token(0, text, thought=True) for text in self.thought]
        return Reply(iter([*thought, *(Token(i, text, -0.5, top) for i, text in enumerate(self.answer, 1))]), tally)

    def tokenize(self, text: str) -> list[int]:
        return list(range(len(text)))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    model = Echo()

    def opened(path: Path, options: Any) -> Echo:
        model.opened = (path, options)
        model.context = options.context or model.context
        return model

    monkeypatch.setattr("medge.runtimes.open_generator", opened)
    return model


@pytest.fixture
def image(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def content(echo: Echo) -> list[tuple[str, tuple[Any, ...]]]:
    return [(message.role, message.content) for message in echo.messages]


def test_the_answer_is_all_that_stands_on_stdout(cli: Cli, echo: Echo) -> None:
    code, out, err = cli("generate", "artifact", "--prompt", "What is it?")
    assert (code, out) == (0, "Cardiomegaly 中\n")
    assert "Not a medical device" in err
    assert content(echo) == [("user", ("What is it?",))]


def test_streaming_prints_the_same(cli: Cli, echo: Echo) -> None:
    assert cli("generate", "artifact", "--prompt", "What is it?", "--stream")[:2] == (0, "Cardiomegaly 中\n")


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_an_answer_does_not_steer_the_terminal(cli: Cli, echo: Echo, stream: tuple[str, ...]) -> None:
    echo.answer = ("a\x1b[2J", "b\nc")
    assert cli("generate", "artifact", "--prompt", "a", *stream)[1] == "a\N{REPLACEMENT CHARACTER}[2Jb\nc\n"


def test_a_thought_is_no_part_of_the_answer(cli: Cli, echo: Echo) -> None:
    echo.thought = ("", "thought\n", "Heart is \x1bwide.", "")
    code, out, err = cli("generate", "artifact", "--prompt", "a")
    assert (code, out) == (0, "Cardiomegaly 中\n")
    assert "Heart" not in err
    code, out, err = cli("generate", "artifact", "--prompt", "a", "--stream")
    assert (code, out) == (0, "Cardiomegaly 中\n")
    assert err.startswith("thought\nHeart is \N{REPLACEMENT CHARACTER}wide.\n\n")
    document = json.loads(cli("generate", "artifact", "--prompt", "a", "--json")[1])
    assert (document["thought"], document["text"]) == ("Heart is \x1bwide.", "Cardiomegaly 中")


@pytest.mark.parametrize(
    ("thought", "answer", "max_tokens", "says"),
    [
        ((), ("Cardio", "megaly"), 2, "before the answer's end: --set max_tokens=2 is reached"),
        ((), ("Cardio", "megaly"), 9, "before the answer's end: the context is full"),
        (("thought\n", "Well"), (), 2, "while the model was still thinking: --set max_tokens=2 is reached"),
    ],
)
def test_an_answer_cut_short_says_so(
    cli: Cli, echo: Echo, thought: tuple[str, ...], answer: tuple[str, ...], max_tokens: int, says: str
) -> None:
    echo.thought, echo.answer, echo.finish = thought, answer, "length"
    _, _, err = cli("generate", "artifact", "--prompt", "a", "--set", f"max_tokens={max_tokens}")
    assert f"Cut {says}." in err


def test_json_is_one_document(cli: Cli, echo: Echo) -> None:
    code, out, _ = cli("generate", "artifact", "--prompt", "What is it?", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["text"] == "Cardiomegaly 中"
    assert (document["finish"], document["prompt_tokens"], document["tokens"]) == ("stop", 7, 2)
    assert document["runtime"] == "echo"


def test_log_probabilities_come_with_json(cli: Cli, echo: Echo) -> None:
    _, out, _ = cli("generate", "artifact", "--prompt", "What is it?", "--json", "--set", "logprobs=1")
    assert json.loads(out)["tokens"][0] == {
        "id": 1,
        "text": "Cardio",
        "logprob": -0.5,
        "top": [[1, -0.5]],
        "thought": False,
    }


def test_images_stand_after_the_question_or_where_it_names_them(cli: Cli, echo: Echo, image: Path) -> None:
    cli("generate", "artifact", "--prompt", "What is it?", "--image", image, "--system", "Be brief.")
    assert content(echo) == [("system", ("Be brief.",)), ("user", ("What is it?", image))]
    cli("generate", "artifact", "--prompt", "<image> before <image> after", "--image", image, "--image", image)
    assert content(echo) == [("user", (image, " before ", image, " after"))]


def test_settings_reach_the_generator(cli: Cli, echo: Echo, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "boolean"}', encoding="utf-8")
    settings = ["max_tokens=9", "temperature=0.5", "top_k=3", "seed=4", "stop=END", "context=512"]
    pairs = [word for pair in [*settings, f"schema={tmp_path / 'schema.json'}"] for word in ("--set", pair)]
    assert cli("generate", "artifact", "--prompt", "a", "--threads", "2", *pairs)[0] == 0
    schema = {"type": "boolean"}
    assert echo.options == GenerateOptions(9, 0.5, 3, seed=4, stop=("END",), schema=schema)
    assert (echo.opened[1].context, echo.opened[1].threads) == (512, 2)


def test_the_question_may_come_from_standard_input(cli: Cli, echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("A long report\n"))
    assert cli("generate", "artifact", "--prompt", "-")[0] == 0
    assert content(echo) == [("user", ("A long report\n",))]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "a", "--stream", "--json"], "exclude each other"),
        (["--prompt", "a", "--set", "beams=4"], "no such setting"),
        (["--prompt", "a", "--set", "max_tokens=many"], "is no whole number"),
        (["--prompt", "a", "--set", "top_p=2"], "top_p is 2"),
        (["--prompt", "a", "--set", "schema=missing.json"], "cannot be read"),
        (["--prompt", "a", "--set", "context=x"], "is no whole number"),
        (["--prompt", "a", "--set", "top_p=x"], "is no number"),
        (["--prompt", "<image> and <image>", "--image", "x.png"], "2 <image> and 1 --image"),
        (["--prompt", "<image>"], "1 <image> and 0 --image"),
        (["--prompt", "a", "--image", ".", "--image", "x.png"], "stands alone"),
        (["--prompt", "<image>", "--image", "."], "stands alone"),
        (["--prompt", "a", "--image", "."], "No DICOM file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    cli: Cli, echo: Echo, image: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(image.parent)
    code, out, err = cli("generate", "artifact", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_schema_that_is_no_json_is_named(cli: Cli, echo: Echo, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{", encoding="utf-8")
    code, _, err = cli("generate", "artifact", "--prompt", "a", "--set", f"schema={tmp_path / 'schema.json'}")
    assert code == 2
    assert "is no JSON" in err


def test_what_the_generator_refuses_reaches_the_user(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise UsageError("The prompt has 90,000 tokens")

    monkeypatch.setattr("medge.runtimes.open_generator", refuse)
    code, _, err = cli("generate", "artifact", "--prompt", "a")
    assert (code, "90,000" in err) == (2, True)


def test_a_ct_series_says_how_many_slices_are_shown(
    cli: Cli, echo: Echo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import numpy as np

    from medge.runtimes import volumes

    budgets: list[int] = []

    def read(_: Path, limit: int) -> volumes.CtSlices:
        budgets.append(limit)
        return volumes.CtSlices((volumes.windowed(np.zeros((2, 2))),) * limit, 200)

    monkeypatch.setattr(volumes, "ct_slices", read)
    code, _, err = cli("generate", "artifact", "--prompt", "Liver?", "--image", tmp_path, "--set", "context=1024")
    assert code == 0
    assert f"{budgets[0]} of the volume's 200 slices are shown" in err
    assert content(echo)[0][1][-1] == "Liver?"
