"""The race against llama.cpp's programs: its arithmetic, its jobs, and the tokenizer that its converter gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medge.benchmarks import chat_race
from medge.benchmarks.chat_race import CONVERT_BF16, CONVERT_Q8, SCHEMES, Rates, Round, of_llama, of_medge, run_round
from medge.benchmarks.llama_tools import LlamaTools, with_sentencepiece
from medge.benchmarks.races import Usage
from medge.demo import GENERATOR

TOOLS = LlamaTools(Path("llama.cpp"), Path("llama.cpp-build"))


def measured(int8_wall: float = 4.0) -> Round:
    usage = {
        of_medge("int8"): Usage(int8_wall, 10.0, 10**8),
        CONVERT_Q8: Usage(10.0, 20.0, 10**9),
        of_medge("int4"): Usage(5.0, 10.0, 10**8),
        CONVERT_BF16: Usage(10.0, 15.0, 2 * 10**9),
        of_llama("Q4_0"): Usage(5.0, 25.0, 3 * 10**9),
        of_medge("int4-k"): Usage(5.0, 30.0, 2 * 10**9),
        of_llama("Q4_K_M"): Usage(5.0, 100.0, 3 * 10**9),
    }
    rates = Rates(prefill=50.0, decode=9.9, llama_prefill=51.0, llama_decode=10.0, bandwidth_share=0.75)
    return Round(usage, {"Q4_0": rates})


def test_goals_are_medians_over_rounds_of_ratios_within_a_round() -> None:
    found = {goal.what: goal for goal in chat_race.goals([measured(), measured(4.2), measured(40.0)])}
    values = {what: goal.value for what, goal in found.items()}
    assert values["Q8_0: time over convert_hf_to_gguf's"] == pytest.approx(0.42)
    assert values["Q8_0: peak memory over convert_hf_to_gguf's"] == pytest.approx(0.1)
    assert values["Q4_0: CPU over convert_hf_to_gguf's and llama-quantize's"] == pytest.approx(10 / 40)
    assert values["Q4_K_M: CPU over llama-quantize's alone"] == pytest.approx(0.3)
    assert values["Q4_0: decoding over llama-bench's"] == pytest.approx(0.99)
    assert {what for what, goal in found.items() if not goal.met} == {"Q4_K_M: peak memory, GB"}


def test_tables_name_every_job_and_goal(capsys: pytest.CaptureFixture[str]) -> None:
    chat_race.show([measured()], threads=2)
    shown = capsys.readouterr().out
    assert all(job in shown for job in measured().usage)
    assert "NO" in shown
    assert json.loads(shown.splitlines()[-1])["Q4_0: decoding over llama-bench's"] == pytest.approx(0.99)


def test_a_round_runs_every_job_and_leaves_the_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spend(command: list[str]) -> Usage:
        made = next((command[command.index(flag) + 1] for flag in ("-o", "--outfile") if flag in command), command[2])
        artifact = "--scheme" in command
        Path(made).mkdir() if artifact else Path(made).touch()
        seen.append(command[command.index("--scheme") + 1] if artifact else Path(made).name)
        return Usage(1.0, 2.0, 3)

    monkeypatch.setattr(chat_race, "spend", spend)
    monkeypatch.setattr(chat_race, "_rates", lambda artifact, tools, threads: Rates(1, 2, 3, 4, artifact.is_dir()))
    (tmp_path / "checkpoint").symlink_to(GENERATOR)
    found = run_round(tmp_path, TOOLS, 2, lambda line: None)
    assert seen == ["int8", "text", "image", "int4", "text", "image", "quantized", "int4-k", "quantized"]
    assert found.usage[CONVERT_Q8] == Usage(2.0, 4.0, 3)
    assert {kind: rates.bandwidth_share for kind, rates in found.rates.items()} == dict.fromkeys(SCHEMES.values(), 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint",
        "checkpoint-spm",
        *(f"gguf-{one}" for one in SCHEMES),
    }


def test_the_converters_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    sentencepiece, tokenizers = pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
    folder = with_sentencepiece(GENERATOR, tmp_path / "spm")
    ours = tokenizers.Tokenizer.from_file(str(GENERATOR / "tokenizer.json"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "The chest X-ray shows no pleural effusion; heart size: 12.5 cm."
    assert theirs.encode(text) == ours.encode(text, add_special_tokens=False).ids
    assert (folder / "config.json").read_bytes() == (GENERATOR / "config.json").read_bytes()


def test_commands_are_llama_cpps_own() -> None:
    checkpoint, out = Path("checkpoint"), Path("out.gguf")
    assert TOOLS.convert(checkpoint, "q8_0", out, mmproj=True)[1:] == [
        *("llama.cpp/convert_hf_to_gguf.py", "checkpoint", "--outtype", "q8_0", "--outfile", "out.gguf", "--mmproj")
    ]
    assert TOOLS.quantize(out, Path("q.gguf"), "Q4_0", 2)[1:] == ["out.gguf", "q.gguf", "Q4_0", "2"]
