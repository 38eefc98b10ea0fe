"""From captured answers to verdicts, with a generator whose every logit the test knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from medge.benchmarks import chat_baseline, chat_check
from medge.benchmarks.baseline import BASELINE, GOLDENS, Identity
from medge.benchmarks.chat_baseline import ChatBaseline, places
from medge.benchmarks.chat_data import load_prompts
from medge.benchmarks.records import CheckResult, Report
from medge.benchmarks.report import page
from medge.errors import CorruptError, RegressedError, UsageError
from medge.manifest import MANIFEST, Manifest, PartFiles, Source, describe, write_json
from medge.runtimes.generate import GenerateOptions, Message, Prompt, Reply, Tally, Token
from medge.spec import ChatFormat, FloatArray, ImageSpec

WEIGHTS = hashlib.sha256(b"weights").hexdigest()
IMAGE_ID, BOS_ID, VOCABULARY, IMAGE_TOKENS = 1, 2, 300, 3
_MARKS = {"<image_soft_token>": IMAGE_ID, "<bos>": BOS_ID}


@dataclass
class FakeGenerator:
    """The next token depends on the last one and on the images; a character is a token."""

    damage: float = 0.0
    poison: bool = False
    clumsy: bool = False
    """Its tokenizer errs."""
    small: int = VOCABULARY
    name: str = "fake 1.0 cpu"
    context: int = 4096
    image: ImageSpec | None = field(default_factory=lambda: ImageSpec(size=8, variant="finetune"))
    image_tokens: int = IMAGE_TOKENS

    def tokenize(self, text: str) -> list[int]:
        for mark, token in _MARKS.items():
            if text.startswith(mark):
                return [token, *self.tokenize(text[len(mark) :])]
        return [ord(c) + (self.clumsy and c == "?") for c in text]

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        ids: list[int] = [BOS_ID]
        for message in messages:
            for part in message.content:
                ids += self.tokenize(part) if isinstance(part, str) else [IMAGE_ID] * IMAGE_TOKENS
        return Prompt((*ids, ord("\n")))

    def logits(self, prompt: Prompt) -> Iterator[FloatArray]:
        assert prompt.ids.count(IMAGE_ID) == IMAGE_TOKENS * len(prompt.images)
        for start in range(0, len(prompt.ids), 7):  # blocks that end within anything
            rows = np.stack([self._row(token) for token in prompt.ids[start : start + 7]])
            yield rows[:, : self.small]

    def generate(
        self,
        messages: Sequence[Message],
        options: GenerateOptions | None = None,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        assert options is not None
        assert options.temperature == 0
        tokens, last = [], self.prompt(messages).ids[-1]
        for _ in range(options.max_tokens):
            last = int(self._row(last).argmax())
            tokens.append(Token(last, chr(last)))
        return Reply(iter(tokens), Tally())

    def _row(self, token: int) -> FloatArray:
        row = np.random.default_rng(token).normal(size=VOCABULARY) * 3
        row[IMAGE_ID] = -99
        row += np.random.default_rng(token + 1000).normal(size=VOCABULARY) * self.damage
        return np.asarray(row * (np.nan if self.poison else 1), np.float32)

    def forget(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def data(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    lines = [
        {"kind": "f1", "prompt": "What is shown here, in few words?", "images": ["a.png"], "answer": "an eye"},
        {"kind": "exact", "prompt": "Yes or no: is it an eye?", "images": ["a.png", "a.png"], "answer": "yes"},
        {"kind": "choice", "prompt": "A or B or C?", "choices": ["A", "B", "C"], "answer": "B"},
        {"kind": "text", "prompt": "The lungs are clear, and the heart is of normal size."},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def record(out: Path, data: Path, reference: FakeGenerator, **options: Any) -> ChatBaseline:
    identity = Identity("medgemma-4b-it", "", WEIGHTS)
    return chat_baseline.record(reference, identity, load_prompts(data), out, max_tokens=8, **options)


@pytest.fixture
def baseline(tmp_path: Path, data: Path) -> Path:
    record(tmp_path / "base", data, FakeGenerator())
    return tmp_path / "base"


@pytest.fixture
def make_chat(tmp_path: Path) -> Callable[..., Path]:
    def make(**fields: Any) -> Path:
        root = tmp_path / f"chat-{fields.get('scheme', 'int8')}"
        root.mkdir()
        (root / "decoder.gguf").write_bytes(b"weights")
        document = {
            "schema_version": 1,
            "source": Source(model="medgemma-4b-it", hub_id="", revision="main", weights_sha256=WEIGHTS),
            "licence": "HAI-DEF",
            "task": "generate",
            "format": "gguf",
            "scheme": "int8",
            "parts": {"decoder": PartFiles(files=(describe(root, "decoder.gguf"),), inputs=(), outputs=())},
            "image": ImageSpec(size=8, variant="finetune"),
            "chat": ChatFormat(context=4096, image_tokens=IMAGE_TOKENS),
        }
        manifest = Manifest.model_validate(document | fields)
        write_json(root / MANIFEST, manifest.model_dump(mode="json"))
        return root

    return make


def check(artifact: Path, baseline: Path, generator: FakeGenerator, **options: Any) -> CheckResult:
    return chat_check.check(artifact, baseline, opener=lambda _: generator, **options)


def outcomes(result: CheckResult) -> dict[str, str]:
    return {verdict.metric: verdict.outcome for verdict in result.verdicts}


def test_places_stand_outside_images_and_have_a_successor() -> None:
    ids = np.array([2, 10, 1, 1, 1, 11, 12])
    assert places(ids, 1).tolist() == [0, 5]
    assert places(ids, -1).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_baseline_reads_back_as_it_was_written(tmp_path: Path, data: Path) -> None:
    written = record(tmp_path / "base", data, FakeGenerator())
    read = ChatBaseline.open(tmp_path / "base")
    assert read.manifest == written.manifest
    np.testing.assert_array_equal(read.ids, written.ids)
    np.testing.assert_array_equal(read.kept.top_logprobs, written.kept.top_logprobs)


def test_a_baseline_holds_prompt_and_answer_and_the_distributions_after_them(tmp_path: Path, data: Path) -> None:
    baseline = record(tmp_path / "base", data, FakeGenerator())
    f1, exact, choice, text = baseline.manifest.asked
    assert f1.tokens == f1.prompt_tokens + 8
    assert len(f1.reply) == 8
    assert exact.images == 2
    assert choice.tokens == choice.prompt_tokens + 1
    assert (text.tokens, text.reply) == (text.prompt_tokens, "")
    ids = baseline.sequences()[0]
    assert "".join(map(chr, ids[-8:])) == f1.reply
    first = places(ids, IMAGE_ID)[0]
    row = FakeGenerator()._row(int(ids[first]))
    assert baseline.kept.top_ids[0, 0] == row.argmax()
    shifted = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert baseline.kept.logprobs[0] == pytest.approx(shifted[ids[first + 1]], abs=1e-5)


def test_the_reference_chooses_the_likeliest_first_token(tmp_path: Path, data: Path) -> None:
    baseline = record(tmp_path / "base", data, FakeGenerator())
    row = FakeGenerator()._row(ord("\n"))
    best = max("ABC", key=lambda letter: row[ord(letter)])
    assert baseline.manifest.asked[2].reply == best


def test_two_captures_are_the_same_bytes(tmp_path: Path, data: Path) -> None:
    for name in ("one", "two"):
        record(tmp_path / name, data, FakeGenerator())
    assert (tmp_path / "one" / GOLDENS).read_bytes() == (tmp_path / "two" / GOLDENS).read_bytes()


def test_choices_that_begin_alike_are_refused(tmp_path: Path) -> None:
    line = {"kind": "choice", "prompt": "Which?", "choices": ["lung", "liver"], "answer": "lung"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    with pytest.raises(UsageError, match="do not differ in their first token"):
        record(tmp_path / "base", tmp_path / "p.jsonl", FakeGenerator())


@pytest.mark.parametrize("name", [BASELINE, GOLDENS])
def test_an_altered_or_truncated_baseline_is_refused(baseline: Path, name: str) -> None:
    raw = bytearray((baseline / name).read_bytes())
    (baseline / name).write_bytes(raw[:-9])
    with pytest.raises(CorruptError):
        ChatBaseline.open(baseline)
    raw[len(raw) // 2] ^= 1
    (baseline / name).write_bytes(raw)
    if name == GOLDENS:
        with pytest.raises(CorruptError, match="sha256 differs"):
            ChatBaseline.open(baseline)


def test_a_baseline_whose_parts_disagree_is_refused(baseline: Path) -> None:
    document = json.loads((baseline / BASELINE).read_text())
    document["asked"][0]["tokens"] += 1
    (baseline / BASELINE).write_text(json.dumps(document))
    with pytest.raises(CorruptError, match="does not fit"):
        ChatBaseline.open(baseline)


def test_an_encoders_baseline_is_no_generators(baseline: Path, tmp_path: Path) -> None:
    document = json.loads((baseline / BASELINE).read_text())
    del document["task"]
    (baseline / BASELINE).write_text(json.dumps(document))
    with pytest.raises(UsageError, match="of an encoder"):
        ChatBaseline.open(baseline)
    with pytest.raises(UsageError, match="is no baseline"):
        ChatBaseline.open(tmp_path)


def test_an_exact_copy_passes(make_chat: Callable[..., Path], baseline: Path) -> None:
    result = check(make_chat(scheme="fp32"), baseline, FakeGenerator())
    assert result.overall == "ok"
    by_name = {verdict.metric: verdict for verdict in result.verdicts}
    assert by_name["kl_mean"].value == pytest.approx(0, abs=1e-6)
    assert by_name["answer_prefix"].value == 1
    assert by_name["prompt_agreement"].value == 1
    assert (result.reference.prompts, result.reference.images) == (4, 3)
    assert all(reply.artifact == reply.reference for reply in result.replies)


def test_a_damaged_copy_regresses_and_its_answers_are_shown(make_chat: Callable[..., Path], baseline: Path) -> None:
    result = check(make_chat(), baseline, FakeGenerator(damage=2.0))
    found = outcomes(result)
    assert result.overall == "regressed"
    assert {found[name] for name in ("kl_mean", "kl_p99", "token_top1_agreement")} == {"regressed"}
    assert result.replies[0].diverges is not None


def test_divergence_is_that_of_all_places(make_chat: Callable[..., Path], baseline: Path) -> None:
    """The check's own figure against one from the fake's whole rows."""
    result = check(make_chat(), baseline, FakeGenerator(damage=0.4))
    values = []
    for ids in ChatBaseline.open(baseline).sequences():
        for i in places(ids, IMAGE_ID):
            p, q = (FakeGenerator(damage=d)._row(int(ids[i])).astype(np.float64) for d in (0, 0.4))
            p, q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
            values.append((np.exp(p) * (p - q)).sum())
    (verdict,) = (v for v in result.verdicts if v.metric == "kl_mean")
    assert verdict.value == pytest.approx(np.mean(values), rel=0.02)


def test_a_tokenizer_that_errs_is_found_and_nothing_else_suffers(
    make_chat: Callable[..., Path], baseline: Path
) -> None:
    result = check(make_chat(), baseline, FakeGenerator(clumsy=True))
    found = outcomes(result)
    assert found["prompt_agreement"] == "regressed"
    assert found["kl_mean"] == "ok"


def test_what_is_not_finite_is_no_number(make_chat: Callable[..., Path], baseline: Path) -> None:
    with pytest.raises(RegressedError, match="NaN or infinity"):
        check(make_chat(), baseline, FakeGenerator(poison=True))


def test_a_vocabulary_that_lacks_tokens_is_refused(make_chat: Callable[..., Path], baseline: Path) -> None:
    with pytest.raises(CorruptError, match="vocabulary has 100 tokens"):
        check(make_chat(), baseline, FakeGenerator(small=100))


def test_only_the_same_weights_prompts_and_preprocessing_compare(
    make_chat: Callable[..., Path], baseline: Path, data: Path
) -> None:
    other = Source(model="x", hub_id="", revision="main", weights_sha256="0" * 64)
    with pytest.raises(UsageError, match="other weights"):
        check(make_chat(source=other, scheme="fp16"), baseline, FakeGenerator())
    with pytest.raises(UsageError, match="preprocesses as"):
        check(make_chat(image=None, scheme="int4"), baseline, FakeGenerator())
    with pytest.raises(UsageError, match="No limits for scheme 'odd'"):
        check(make_chat(scheme="odd"), baseline, FakeGenerator())
    data.write_text(data.read_text().replace("an eye", "a hand"))
    with pytest.raises(UsageError, match="other prompts"):
        check(make_chat(), baseline, FakeGenerator())


def test_a_part_of_the_prompts_is_checked_on_that_part(
    make_chat: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    dataset = load_prompts(data).first(2)
    chat_baseline.record(FakeGenerator(), Identity("m", "", WEIGHTS), dataset, tmp_path / "part", count=2, max_tokens=8)
    result = check(make_chat(scheme="fp32"), tmp_path / "part", FakeGenerator())
    assert result.reference.prompts == 2


def test_the_page_shows_answers_that_changed(make_chat: Callable[..., Path], baseline: Path) -> None:
    result = check(make_chat(), baseline, FakeGenerator(damage=2.0))
    result = CheckResult.model_validate_json(result.model_dump_json())  # what a file keeps is what is shown
    html = page(Report(checks=(result,)))
    assert "4 prompts with 3 images" in html
    assert "KL divergence, 99th percentile" in html
    assert "Parts at token" in html
    assert " nats" in html
    assert "labels ()" not in html


def test_the_page_of_an_exact_copy_says_so(make_chat: Callable[..., Path], baseline: Path) -> None:
    result = check(make_chat(scheme="fp32"), baseline, FakeGenerator())
    assert "All 3 answers are the reference" in page(Report(checks=(result,)))


def test_several_generators_are_compared_by_their_own_metrics(make_chat: Callable[..., Path], baseline: Path) -> None:
    checks = tuple(check(make_chat(scheme=scheme), baseline, FakeGenerator()) for scheme in ("fp32", "int8"))
    html = page(Report(checks=checks))
    assert "KL, mean" in html
    assert "Least cosine" not in html


def test_a_note_says_what_of_the_divergence_is_estimated(make_chat: Callable[..., Path], baseline: Path) -> None:
    result = check(make_chat(), baseline, FakeGenerator())
    assert "exact over the 128 likeliest" in result.notes[0]
