"""`medge export`: complete or absent, resumable, reproducible, and held to the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import platformdirs
import pytest
import safetensors.numpy

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, RegressedError, UnsupportedError, UsageError, WeightsError
from medge.export import parity
from medge.export.base import PartJob, Written
from medge.export.formats import targets
from medge.export.onnx import OnnxExporter
from medge.export.request import Request
from medge.manifest import Artifact, PartFiles
from medge.quantize.scheme import Budget, Rule, Scheme, load
from medge.runtimes import open_embedder as open_artifact

Run = Callable[..., Artifact]
SCHEMES = [t.scheme for t in targets() if (t.model, t.format) == ("medsiglip-448", "onnx") and t.support.ok]


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that the exporter wrote."""
    parts: list[str] = []
    write = OnnxExporter.write

    def spy(self: OnnxExporter, job: PartJob, folder: Path) -> Written:
        parts.append(job.part.name)
        return write(self, job, folder)

    monkeypatch.setattr(OnnxExporter, "write", spy)
    return parts


@pytest.fixture
def kill_in_text_encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Every second part dies half-written, until the returned function is called."""
    write = OnnxExporter.write

    def dying(self: OnnxExporter, job: PartJob, folder: Path) -> Written:
        if job.part.name == "text_encoder":
            (folder / "text_encoder.onnx").write_bytes(b"half")
            raise KilledError
        return write(self, job, folder)

    monkeypatch.setattr(OnnxExporter, "write", dying)
    return lambda: monkeypatch.setattr(OnnxExporter, "write", write)


LINEAR = ".*(mlp|self_attn).*"


def size_of(artifact: Artifact) -> int:
    return sum(file.bytes for file in artifact.manifest.parts["text_encoder"].files)


def hashes(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for part in artifact.manifest.parts.values() for file in part.files}


def tensors(root: Path) -> dict[str, Any]:
    return dict(safetensors.numpy.load_file(root / "model.safetensors"))


def test_an_artifact_carries_what_its_receiver_needs(run_export: Run, checkpoint: Path) -> None:
    artifact = run_export("int8", parity="4")
    manifest = artifact.manifest
    assert {file.path for file in manifest.files} == {"spiece.model", "config.json", "NOTICE", "README.md"}
    assert manifest.source.weights_sha256 == Checkpoint.open(checkpoint).sha256
    assert manifest.scalars == pytest.approx({"logit_scale": np.log(10), "logit_bias": -10.0})
    assert {"medge", "onnx", "opset"} <= set(manifest.tools)
    for found in manifest.parity.values():
        assert found.samples == 4
        assert found.reference.startswith("torch ")
        assert found.reference.endswith(" cpu fp32")
        assert found.cosine_min >= 0.98
    card = (artifact.root / "README.md").read_text()
    assert "int8" in card
    assert "medical device" in card
    assert not [path for path in artifact.root.iterdir() if path.name.startswith(".")]


def test_the_published_model_s_terms_travel_with_it(run_export: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medge.export.pipeline.licence_of", lambda spec: "HAI-DEF")
    artifact = run_export()
    terms = "https://developers.google.com/health-ai-developer-foundations/terms"
    assert artifact.manifest.licence == "HAI-DEF"
    notice = (artifact.root / "NOTICE").read_text()
    assert notice.startswith(
        "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use"
    )
    assert terms in notice
    assert terms in (artifact.root / "README.md").read_text()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_request_writes_the_same_bytes(scheme: str, run_export: Run, tmp_path: Path) -> None:
    first, second = (run_export(scheme, out=tmp_path / name) for name in ("a", "b"))
    assert hashes(first) == hashes(second)
    assert first.digest == second.digest


def test_each_graph_passes_the_checkers_and_takes_any_batch(artifact: Path, reference: Any) -> None:
    for name, inputs in (("image_encoder", reference.pixels), ("text_encoder", reference.ids)):
        path = artifact / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (feed,) = session.get_inputs()
        (three,) = session.run(None, {feed.name: inputs[:3]})
        ones = [session.run(None, {feed.name: inputs[i : i + 1]})[0] for i in range(3)]
        np.testing.assert_allclose(np.concatenate(ones), three, atol=1e-5)
        assert session.get_outputs()[0].shape[0] == feed.shape[0] == "batch"


def test_half_precision_and_sharded_checkpoints_export(own_checkpoint: Path, run_export: Run, reference: Any) -> None:
    weights = tensors(own_checkpoint)
    (own_checkpoint / "model.safetensors").unlink()
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    keys = sorted(halves)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for shard, part in shards.items():
        safetensors.numpy.save_file({name: halves[name] for name in part}, own_checkpoint / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (own_checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = open_artifact(run_export(root=own_checkpoint).root)
    cosine = np.sum(model.embed_images(reference.images) * reference.image_embeddings, axis=1)
    assert cosine.min() > 0.9999


def test_cut_in_the_second_part_it_resumes_after_the_first(
    run_export: Run, written: list[str], kill_in_text_encoder: Callable[[], None], artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        run_export()
    assert not (tmp_path / "out").exists()
    kill_in_text_encoder()
    assert written == ["image_encoder"]
    finished = run_export()
    assert hashes(finished) == hashes(Artifact.open(artifact))
    assert list(finished.verify())


@pytest.mark.parametrize("changed", ["scheme", "weights", "setting"])
def test_another_request_starts_from_nothing(
    changed: str, run_export: Run, kill_in_text_encoder: Callable[[], None], own_checkpoint: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    with pytest.raises(KilledError):
        run_export(root=own_checkpoint)
    kill_in_text_encoder()
    if changed == "weights":
        weights = tensors(own_checkpoint)
        weights["logit_bias"] += 1
        safetensors.numpy.save_file(weights, own_checkpoint / "model.safetensors")
    parts: list[str] = request.getfixturevalue("written")
    settings = {"variant": "hf"} if changed == "setting" else {}
    run_export("fp16" if changed == "scheme" else "fp32", root=own_checkpoint, **settings)
    assert parts == ["image_encoder", "text_encoder"]


@pytest.mark.parametrize("damage", ["note", "file"])
def test_a_damaged_leftover_is_written_again(
    damage: str, run_export: Run, kill_in_text_encoder: Callable[[], None], artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        run_export()
    partial = tmp_path / ".out.partial"
    target = ".work/image_encoder.json" if damage == "note" else "image_encoder.onnx"
    (partial / target).write_bytes(b"{")
    kill_in_text_encoder()
    assert hashes(run_export()) == hashes(Artifact.open(artifact))


def test_what_is_there_stays_until_its_replacement_is_whole(
    run_export: Run, own_artifact: Path, kill_in_text_encoder: Callable[[], None]
) -> None:
    with pytest.raises(UsageError, match="exists"):
        run_export("int8", out=own_artifact)
    with pytest.raises(KilledError):
        run_export("int8", out=own_artifact, replace=True)
    assert Artifact.open(own_artifact).manifest.scheme == "fp32"
    kill_in_text_encoder()
    run_export("int8", out=own_artifact, replace=True)
    assert Artifact.open(own_artifact).manifest.scheme == "int8"


@pytest.mark.parametrize("inside", [False, True])
def test_the_checkpoint_is_never_replaced_by_its_export(inside: bool, own_checkpoint: Path, run_export: Run) -> None:
    out = own_checkpoint.parent if inside else own_checkpoint
    with pytest.raises(UsageError, match="holds the checkpoint itself"):
        run_export(root=own_checkpoint, out=out, replace=True)
    assert Checkpoint.open(own_checkpoint)


def test_nan_weights_leave_nothing_under_out(own_checkpoint: Path, run_export: Run, tmp_path: Path) -> None:
    weights = tensors(own_checkpoint)
    weights["text_model.final_layer_norm.weight"][3] = np.nan
    safetensors.numpy.save_file(weights, own_checkpoint / "model.safetensors")
    with pytest.raises(CorruptError, match=r"final_layer_norm\.weight.*NaN"):
        run_export(root=own_checkpoint)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_nothing_appears(own_checkpoint: Path, run_export: Run, tmp_path: Path) -> None:
    (own_checkpoint / "spiece.model").unlink()
    with pytest.raises(WeightsError, match=r"spiece\.model"):
        run_export(root=own_checkpoint)
    (own_checkpoint / "spiece.model").write_bytes(b"junk")
    with pytest.raises(CorruptError, match=r"spiece\.model is no SentencePiece model"):
        run_export(root=own_checkpoint)
    assert not list(tmp_path.glob("*out*"))


def test_failed_parity_leaves_nothing_under_out(run_export: Run, tmp_path: Path) -> None:
    strict = load("int4").model_copy(update={"parity_floor": 0.99999})
    with pytest.raises(RegressedError, match="Parity failed: image_encoder in int4 has cosine"):
        run_export(strict, parity="3")
    assert not (tmp_path / "out").exists()
    assert run_export(strict).manifest.parity == {}  # off writes it all the same


def test_weights_beyond_fp16_are_refused(own_checkpoint: Path, run_export: Run) -> None:
    weights = tensors(own_checkpoint)
    weights["text_model.head.weight"][0, 0] = 1e5
    safetensors.numpy.save_file(weights, own_checkpoint / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"text_model\.head.*65504"):
        run_export("fp16", root=own_checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parity": "some"}, "parity=some is neither"),
        ({"parity": "0"}, "parity=0 is neither"),
        ({"parity": "-1"}, "parity=-1 is neither"),
        ({"variant": "sideways"}, "Variants: bigvision, hf"),
        ({"layout": "diagonal"}, "layout=diagonal is none of"),
        ({"colour": "blue"}, "'colour' is no setting.*variant: preprocessing"),
    ],
)
def test_settings_are_refused_before_any_work(settings: dict[str, str], message: str, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Request(Checkpoint.open(checkpoint), "onnx", load("fp32"), Path("out"), settings)


def test_the_variant_reaches_the_manifest_and_the_runtime(run_export: Run, reference: Any) -> None:
    model = open_artifact(run_export(variant="hf").root)
    assert model.image.variant == "hf"
    assert not np.array_equal(model.pixels(reference.images[:1]), reference.pixels[:1])


@pytest.mark.parametrize("holds", [None, "notes.txt"])
def test_calibration_needs_images(holds: str | None, run_export: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    if holds:
        folder.mkdir()
        (folder / holds).write_text("")
    with pytest.raises(UsageError, match="holds no images to calibrate on"):
        run_export("int8-static", calibration=str(folder))
    assert not (tmp_path / "out").exists()


def test_static_says_which_layers_it_left(run_export: Run) -> None:
    layers = run_export("int8-static").manifest.layers
    assert set(layers.values()) == {"static"}
    assert len(layers) < 2 * 2 * 6 + 6  # a tenth keeps dynamic activations
    assert all(name.startswith(("vision_model.", "text_model.")) for name in layers)


def test_a_budget_is_spent_and_kept(run_export: Run, checkpoint: Path) -> None:
    scheme = load("int4-mixed")
    manifest = run_export(scheme).manifest
    assert set(manifest.layers.values()) == {"4 bits", "8 bits"}
    shapes = Checkpoint.open(checkpoint).spec.tensors  # the pooling head's rows are slices of one tensor: left out
    layers = [name for name in manifest.layers if f"{name}.weight" in shapes]
    counts = {name: np.prod(shapes[f"{name}.weight"]) for name in layers}
    stored = {"4 bits": 4.5, "8 bits": 8.0}
    mean = sum(stored[manifest.layers[name]] * n for name, n in counts.items()) / sum(counts.values())
    assert scheme.budget is not None
    assert 4.5 < mean <= scheme.budget.mean_bits + 0.05


def test_sensitivity_is_measured_once_for_all_formats(
    run_export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_export("int4-mixed", out=tmp_path / "first").manifest.layers
    monkeypatch.setattr("medge.export.evidence.observe", None)  # a second measurement would fail
    assert run_export("int4-mixed", out=tmp_path / "second").manifest.layers == first


def test_a_budget_leaves_alone_what_a_rule_leaves_alone(run_export: Run) -> None:
    base = load("int4-mixed")
    rules = (Rule(match=r"text_model\..*\.fc1", bits=32), *base.rules)
    scheme = base.model_copy(update={"rules": rules, "budget": Budget(mean_bits=7.9, samples=2)})
    artifact = run_export(scheme)
    left = {"text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1"}
    assert not left & set(artifact.manifest.layers)
    graph = onnx.load(artifact.root / "text_encoder.onnx", load_external_data=False).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for name in left:
        assert stored[f"{name}.weight"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("rule", "activations"),
    [
        pytest.param(Rule(match=LINEAR, bits=8, block=16), "dynamic", id="8 bits in blocks"),
        pytest.param(Rule(match=LINEAR, bits=8), "none", id="8 bits, float activations"),
        pytest.param(Rule(match=LINEAR, bits=4, block=32), "none", id="4 bits, float activations"),
        pytest.param(Rule(match=LINEAR, bits=4, block=32), "dynamic", id="4 bits in blocks"),
        pytest.param(Rule(match=LINEAR, bits=4), "dynamic", id="4 bits a channel"),
    ],
)
def test_a_user_s_scheme_is_built_as_it_says_or_refused(
    rule: Rule, activations: Any, run_export: Run, reference: Any, artifact: Path
) -> None:
    scheme = Scheme(name="mine", title="mine", activations=activations, rules=(rule, Rule(match=".*", bits=32)))
    try:
        built = run_export(scheme)
    except UnsupportedError:
        return
    cosine = np.sum(open_artifact(built.root).embed_texts(reference.texts) * reference.text_embeddings, axis=1)
    assert cosine.min() > (0.98 if rule.bits == 8 else 0.8)
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 240)
    saved = size_of(Artifact.open(artifact)) - size_of(built)
    assert saved > 0.75 * weights * (32 - rule.bits) / 8, "more bits in the file than the scheme says"


def test_the_reference_is_computed_once_a_checkpoint(
    run_export: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    first = run_export(parity="3", out=tmp_path / "a").manifest.parity
    with monkeypatch.context() as patch:
        patch.setattr(parity, "open_reference", lambda *_, **__: pytest.fail("computed again"))
        assert run_export(parity="3", out=tmp_path / "b").manifest.parity == first
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    cached.write_bytes(b"damaged")
    assert run_export(parity="3", out=tmp_path / "c").manifest.parity == first


def test_a_cache_that_cannot_be_written_costs_nothing(
    run_export: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "file" / name)
    assert run_export(parity="3").manifest.parity["text_encoder"].samples == 3


def test_progress_names_its_stages(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medge.export.pipeline import export

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing measured before

    stages: dict[str, int] = {}
    request = Request(
        Checkpoint.open(checkpoint), "onnx", load("int4-mixed"), tmp_path / "out", {"parity": "3"},
        on_progress=lambda stage, done, total: stages.__setitem__(stage, done),
    )  # fmt: skip
    assert isinstance(export(request).manifest.parts["image_encoder"], PartFiles)
    parts = ("image_encoder", "text_encoder")
    measured = [f"{stage} {part}" for part in parts for stage in ("observe", "sensitivity")]
    assert list(stages)[:5] == [*measured, "write weights"]
    assert {"parity image_encoder", "parity text_encoder"} <= set(stages)
