"""Bad input gets one clear line and the right exit code, and loses nothing; --json prints one document."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from medge.manifest import MANIFEST, Artifact, Manifest, describe, write_json

Cli = Callable[..., tuple[int, str, str]]
Damage = Callable[[Path], object]
ROOT = Path(__file__).parent.parent
NAME = "text_model.head.bias"


def refused(result: tuple[int, str, str], code: int, *parts: str) -> None:
    """One line on stderr that says all parts, nothing on stdout, the exit code."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def image(path: Path, size: tuple[int, int] = (60, 40), format: str | None = None) -> Path:
    rng = np.random.default_rng(size[0])
    small = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small.resize(size).save(path, format)
    return path


@pytest.fixture
def xray(tmp_path: Path) -> Path:
    return image(tmp_path / "xray.png")


# --- a checkpoint ------------------------------------------------------------------------------------------------


def truncate(root: Path) -> None:
    path = root / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        tensors = dict(safetensors.numpy.load_file(root / "model.safetensors"))
        change(tensors)
        safetensors.numpy.save_file(tensors, root / "model.safetensors")

    return damage


def change_config(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 128
    (root / "config.json").write_text(json.dumps(config))


def missing_shard(root: Path) -> None:
    (root / "model.safetensors").rename(root / "a.safetensors")
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        pytest.param(truncate, 5, "is truncated", id="truncated"),
        pytest.param(change_weights(lambda t: t[NAME].fill(np.nan)), 5, f"'{NAME}'", id="NaN"),
        pytest.param(change_config, 5, "config.json says", id="shapes disagree"),
        pytest.param(missing_shard, 4, "b.safetensors is missing", id="missing shard"),
        pytest.param(change_weights(lambda t: t.pop(NAME)), 4, f"lacks '{NAME}'", id="missing tensor"),
        pytest.param(change_weights(lambda t: t.update(extra=t[NAME].copy())), 5, "'extra'", id="surplus tensor"),
        pytest.param(lambda r: (r / "spiece.model").unlink(), 4, "spiece.model is missing", id="no tokenizer"),
        pytest.param(lambda r: (r / "spiece.model").write_text("x"), 5, "no SentencePiece", id="no real tokenizer"),
        pytest.param(lambda r: (r / "config.json").write_text("{"), 5, "config.json is no JSON", id="config no JSON"),
        pytest.param(lambda r: (r / "config.json").unlink(), 2, "is no checkpoint", id="no config"),
        pytest.param(shutil.rmtree, 2, "neither a folder nor a known model", id="no folder"),
    ],
)
def test_a_damaged_checkpoint(damage: Damage, code: int, says: str, own_checkpoint: Path, cli: Cli) -> None:
    damage(own_checkpoint)
    out = own_checkpoint.parent / "out"
    refused(cli("export", own_checkpoint, "-o", out, "--set", "parity=2"), code, says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--scheme", "int3"], 2, "Schemes: fp32"),
        (["--format", "zip"], 2, "Formats: onnx"),
        (["--format", "coreml", "--scheme", "int5"], 3, "Nearest: --scheme "),
        (["--set", "target=ios17"], 2, "a setting of coreml"),
        (["--format", "coreml", "--set", "target=ios3"], 2, "none of: ios18, ios17"),
        (["--set", "colour=blue"], 2, "'colour' is no setting"),
        (["--set", "variant"], 2, "is not KEY=VALUE"),
        (["--set", "parity=many"], 2, "neither 'off' nor a number"),
        (["--set", "layout=optimum"], 3, "optimum's own fp32"),
        (["--scheme", "mine.toml"], 2, "cannot be read"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], code: int, says: str, checkpoint: Path, cli: Cli, tmp_path: Path
) -> None:
    refused(cli("export", checkpoint, "-o", tmp_path / "out", *options), code, says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["export"], ["verify"], ["classify", "--threads", "0"], ["synth", "--seed", "-1"]]
)
def test_usage_errors_exit_2(arguments: list[str], cli: Cli) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: medge" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["synth", "no-such-model"], 2, "Known: medsiglip-448"),
        (["synth", "medsiglip-448", "--size", "huge"], 2, "Sizes: tiny, full"),
        (["export", "no-such-model"], 2, "Known: medsiglip-448"),
        (["export", "medgemma-4b-it"], 4, "medge fetch medgemma-4b-it"),
    ],
)
def test_models_that_are_not_there(
    arguments: list[str], code: int, says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(cli(*arguments, "-o", tmp_path / "out"), code, says)
    assert list(tmp_path.iterdir()) == []


# --- images ------------------------------------------------------------------------------------------------------


def text_as_png(folder: Path) -> Path:
    (folder / "x.png").write_text("this is no image")
    return folder / "x.png"


def cut_jpeg(folder: Path) -> Path:
    path = image(folder / "x.jpg", (400, 300))
    path.write_bytes(path.read_bytes()[:1500])
    return path


def dicom_without_pixels(folder: Path) -> Path:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.Dataset()
    dataset.file_meta, dataset.Modality, dataset.PatientName = meta, "DX", "Doe^Jane"
    dataset.save_as(folder / "x.dcm", enforce_file_format=True)
    return folder / "x.dcm"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(text_as_png, "x.png is no image", id="text named .png"),
        pytest.param(cut_jpeg, "x.jpg is damaged or cut short", id="cut JPEG"),
        pytest.param(dicom_without_pixels, "x.dcm holds no pixels", id="DICOM without pixels"),
        pytest.param(lambda folder: folder / "absent.png", "absent.png does not exist", id="absent"),
        pytest.param(lambda folder: folder, "is a folder, not an image", id="a folder"),
    ],
)
def test_an_image_that_is_none(
    make: Callable[[Path], Path], says: str, artifact: Path, cli: Cli, tmp_path: Path
) -> None:
    result = cli("classify", artifact, make(tmp_path), "--label", "a", "--label", "b")
    refused(result, 2, says)
    assert "Doe" not in result[2]


@pytest.mark.parametrize("size", [(1, 1), (8000, 5000), (1, 3000)], ids=["1 pixel", "40 megapixels", "a line"])
def test_an_image_of_any_size_works(size: tuple[int, int], artifact: Path, cli: Cli, tmp_path: Path) -> None:
    path = image(tmp_path / "x.jpg", size)
    code, out, _ = cli("classify", artifact, path, "--label", "a", "--label", "b", "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert sum(row["scores"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "No label given"),
        (["--label", "a", "--label", "a"], "given twice"),
        (["--label", "a", "--template", "no place"], "needs '{}' once"),
    ],
)
def test_labels_that_cannot_be_used(options: list[str], says: str, artifact: Path, cli: Cli, xray: Path) -> None:
    refused(cli("classify", artifact, xray, *options), 2, says)


def test_nothing_to_embed(artifact: Path, cli: Cli) -> None:
    refused(cli("embed", artifact), 2, "Nothing to embed")


def test_a_file_name_that_is_no_text_is_shown_all_the_same(artifact: Path, cli: Cli, xray: Path) -> None:
    odd = xray.rename(xray.parent / os.fsdecode(b"\xff [red]x.png"))
    process = start("classify", artifact, odd, "--label", "[bold]a", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    (row,) = json.loads(out)
    assert row["image"] == str(odd)
    assert list(row["scores"]) == ["[bold]a"]


# --- an artifact -------------------------------------------------------------------------------------------------


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((root / MANIFEST).read_text())
    change(document)
    (root / MANIFEST).write_text(json.dumps(document))


def path_of(value: str) -> Damage:
    return lambda root: edit(root, lambda m: m["files"][0].update(path=value))


def link_out(root: Path) -> None:
    outside = (root / "NOTICE").rename(root.parent / "outside")
    (root / "NOTICE").symlink_to(outside)


def garbage_graph(root: Path) -> None:
    (root / "image_encoder.onnx").write_bytes(b"garbage")
    edit(root, lambda m: m["parts"]["image_encoder"]["files"].__setitem__(
        0, describe(root, "image_encoder.onnx").model_dump()))  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        pytest.param(path_of("../spiece.model"), 5, "leaves the artifact folder", id="dots"),
        pytest.param(path_of("/etc/passwd"), 5, "leaves the artifact folder", id="absolute"),
        pytest.param(path_of("..\\spiece.model"), 5, "leaves the artifact folder", id="backslash"),
        pytest.param(link_out, 5, "leads out of the artifact", id="link"),
        pytest.param(lambda r: edit(r, lambda m: m.update(schema_version=99)), 5, "Update medge", id="newer schema"),
        pytest.param(lambda r: (r / "NOTICE").write_text("x"), 5, "the manifest says", id="size"),
        pytest.param(lambda r: (r / "NOTICE").unlink(), 5, "NOTICE is missing", id="missing file"),
        pytest.param(lambda r: (r / MANIFEST).write_text("{"), 5, "is no JSON", id="manifest no JSON"),
        pytest.param(lambda r: (r / MANIFEST).unlink(), 2, "is no artifact", id="no manifest"),
        pytest.param(garbage_graph, 5, "cannot open", id="garbage graph"),
        pytest.param(lambda r: edit(r, lambda m: m.update(format="executorch")), 5, "Export", id="other format"),
        pytest.param(lambda r: edit(r, lambda m: m["tokenizer"].update(file="../x")), 5, "'../x'", id="tokenizer out"),
        pytest.param(lambda r: edit(r, lambda m: m["image"].update(size=28)), 5, "cannot run", id="another size"),
        pytest.param(lambda r: edit(r, lambda m: m["parts"].pop("image_encoder")), 3, "another tool", id="no part"),
        pytest.param(lambda r: edit(r, lambda m: m["scalars"].clear()), 5, "lacks the scalars", id="no scalars"),
    ],
)
def test_a_damaged_artifact(damage: Damage, code: int, says: str, own_artifact: Path, cli: Cli, xray: Path) -> None:
    damage(own_artifact)
    refused(cli("classify", own_artifact, xray, "--label", "a"), code, says)


def test_an_altered_file_opens_and_fails_to_verify(own_artifact: Path, cli: Cli) -> None:
    path = own_artifact / "text_encoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(cli("verify", own_artifact), 5, "text_encoder.onnx.data was altered")


def test_weights_that_became_nan_are_named_not_printed(own_artifact: Path, cli: Cli, xray: Path) -> None:
    path = own_artifact / "image_encoder.onnx.data"
    path.write_bytes(b"\xff" * path.stat().st_size)
    refused(cli("classify", own_artifact, xray, "--label", "a", "--json"), 5, "NaN", "medge verify")


def test_a_hostile_string_reaches_the_terminal_on_one_line(own_artifact: Path, cli: Cli) -> None:
    edit(own_artifact, lambda m: m.update({"a\nTraceback\n[red]": 1}))
    code, _, err = cli("verify", own_artifact)
    assert code == 5
    assert len(err.splitlines()) == 1


# --- what is missing on the machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absent", "arguments", "says"),
    [
        ("onnx", ["export", "{checkpoint}", "-o", "{out}"], "medge[export]"),
        ("huggingface_hub", ["fetch", "medsiglip-448"], "medge[export]"),
        ("huggingface_hub", ["export", "medsiglip-448", "-o", "{out}"], "medge[export]"),
        ("transformers", ["export", "{checkpoint}", "-o", "{out}", "--set", "parity=2"], "medge[export]"),
    ],
)
def test_a_missing_extra_is_named(
    absent: str,
    arguments: list[str],
    says: str,
    checkpoint: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else found(name, *rest))
    monkeypatch.setattr("medge.export.parity._load", lambda path: None)
    filled = [argument.format(checkpoint=checkpoint, out=tmp_path / "out") for argument in arguments]
    refused(cli(*filled), 3, f"'{absent}' is not installed", says)
    assert not (tmp_path / "out").exists()


def test_targets_says_that_the_exporter_is_not_installed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else found(name, *rest))
    code, out, _ = cli("targets", "--json")
    assert code == 0
    assert json.loads(out)[0]["reason"] == "'onnx' is not installed"


# --- where it is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["synth", "export"])
def test_what_exists_is_untouched(verb: str, checkpoint: Path, cli: Cli, tmp_path: Path) -> None:
    source = "medsiglip-448" if verb == "synth" else checkpoint
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused(cli(verb, source, "-o", tmp_path / "out"), 2, "exists", "--force")
    refused(cli(verb, source, "-o", tmp_path / "out", "--force"), 2, "no folder that medge wrote")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "arguments",
    [["synth", "medsiglip-448"], ["export", "{checkpoint}"], ["embed", "{artifact}", "--text", "a"]],
)
def test_a_file_as_parent_folder(
    arguments: list[str], checkpoint: Path, artifact: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    filled = [argument.format(checkpoint=checkpoint, artifact=artifact) for argument in arguments]
    refused(cli(*filled, "-o", tmp_path / "file" / "out"), 2, "file/")
    assert (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of that size; skips the test where it cannot be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("verb", ["synth", "export"])
def test_a_really_full_disk(verb: str, checkpoint: Path, cli: Cli, tmp_path: Path) -> None:
    source = "medsiglip-448" if verb == "synth" else checkpoint
    with small_disk(tmp_path / "disk", "2m") as disk:
        command = [verb, source, "-o", disk / "out", *(["--set", "parity=off"] if verb == "export" else [])]
        refused(cli(*command), 2, "The disk is full while writing", "Free some space")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert cli(*command)[0] == 0
        assert (disk / "out").is_dir()
        assert not list(disk.glob(".*"))


def test_a_disk_that_fills_up_at_the_end(
    checkpoint: Path, artifact: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["export", checkpoint, "--scheme", "fp32", "-o", tmp_path / "out", "--set", "parity=off"]
    with monkeypatch.context() as patch:
        patch.setattr("medge.export.pipeline._texts", full)
        refused(cli(*command), 2, "The disk is full", "it resumes")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("medge.export.onnx.OnnxExporter.write", lambda *_: pytest.fail("wrote a part again"))
        assert cli(*command)[0] == 0
    assert Artifact.open(tmp_path / "out").digest == Artifact.open(artifact).digest


# --- the end of the process --------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """The medge command as a process of its own."""
    command = [sys.executable, "-c", "from medge.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_killed_at_any_moment_it_leaves_all_or_nothing(
    checkpoint: Path, artifact: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["export", checkpoint, "--scheme", "fp32", "-o", out, "--set", "parity=off"]
    seen: set[str] = set()
    for target in (".resume-key", "image_encoder.onnx.data", ".work/image_encoder.json", "text_encoder.onnx.data",
                   ".work/text_encoder.json", MANIFEST):  # fmt: skip
        process = start(*command)
        while process.poll() is None and not (tmp_path / ".out.partial" / target).exists():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():  # it was faster than the signal
            assert list(Artifact.open(out).verify())
            shutil.rmtree(out)
        seen |= {path.name for path in tmp_path.iterdir()}
    assert seen <= {".out.partial"}
    assert seen, "no kill came in time"
    assert cli(*command)[0] == 0
    assert cli("verify", out)[0] == 0
    finished, whole = Artifact.open(out), Artifact.open(artifact)
    for part, files in whole.manifest.parts.items():
        assert finished.manifest.parts[part].files == files.files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_is_130_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    process = start("synth", "medsiglip-448", "--size", "full", "-o", tmp_path / "out")
    while process.poll() is None and not list(tmp_path.glob(".out.partial/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_shows_a_traceback_only_to_who_asks(
    debug: bool, artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(_: object) -> None:
        raise ZeroDivisionError("at\nlength")

    monkeypatch.setattr(Artifact, "open", bug)
    monkeypatch.setenv("MEDGE_DEBUG", "1" if debug else "")
    if debug:
        with pytest.raises(ZeroDivisionError):
            cli("verify", artifact)
        return
    code, out, err = cli("verify", artifact)
    assert (code, out) == (70, "")
    assert err == "internal error: ZeroDivisionError: at; run with MEDGE_DEBUG=1 for the traceback\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("targets")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=30)
    assert b"Traceback" not in err
    assert b"internal error" not in err


# --- what works --------------------------------------------------------------------------------------------------


def document(result: tuple[int, str, str]) -> Any:
    """stdout is one JSON document, and nothing else."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_json_is_one_document_for_every_verb(
    checkpoint: Path, artifact: Path, cli: Cli, xray: Path, tmp_path: Path
) -> None:
    cells = document(cli("targets", "--json"))
    assert {"model", "format", "scheme", "ok", "reason"} == set(cells[0])
    exported = document(cli("export", checkpoint, "--scheme", "int8", "-o", tmp_path / "int8", "--json"))
    manifest = Manifest.model_validate(exported["manifest"])
    assert manifest.scheme == "int8"
    assert manifest.parity["image_encoder"].cosine_min > 0.98
    assert exported["digest"] == Artifact.open(tmp_path / "int8").digest
    verified = document(cli("verify", artifact, "--json"))
    assert verified["ok"] is True
    assert "image_encoder.onnx" in verified["files"]
    embedded = document(cli("embed", artifact, xray, "--text", "a", "--json"))
    assert [row["input"] for row in embedded] == [str(xray), "a"]
    assert np.linalg.norm(embedded[0]["embedding"]) == pytest.approx(1)
    scored = document(cli("classify", artifact, xray, "--label", "a", "--label", "b", "--multilabel", "--json"))
    assert set(scored[0]["scores"]) == {"a", "b"}
    assert {"host", "extras", "cuda", "fits"} == set(document(cli("doctor", "--json")))


def test_json_of_optimum_s_layout_too(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    process = start(
        "export", checkpoint, "--scheme", "fp32", "--set", "layout=optimum", "-o", tmp_path / "out", "--json"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["manifest"]["parts"].keys() == {"joint"}
    assert b"Traceback" not in err


def test_people_get_tables(artifact: Path, cli: Cli, xray: Path) -> None:
    code, out, err = cli("classify", artifact, xray, "--label", "[red]pneumonia", "--label", "no finding")
    assert code == 0
    assert "[red]pneumonia" in out
    assert "no diagnosis" in err
    code, out, _ = cli("targets")
    assert code == 0
    assert "medsiglip-448" in out
    assert cli("doctor")[0] == 0


def test_embeddings_are_kept_as_numbers_without_pickle(artifact: Path, cli: Cli, xray: Path, tmp_path: Path) -> None:
    assert cli("embed", artifact, xray, "--text", "a", "--text", "b", "-o", tmp_path / "x.npy")[0] == 0
    rows = np.load(io.BytesIO((tmp_path / "x.npy").read_bytes()), allow_pickle=False)
    assert rows.shape == (3, 64)


def test_a_probe_from_fit_to_apply(own_artifact: Path, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    for label in ("black", "white"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(4):
            level = 10 * i if label == "black" else 255 - 10 * i
            PIL.Image.new("RGB", (20, 20), (level,) * 3).save(tmp_path / "data" / label / f"{i}.png")
    assert cli("probe", "fit", own_artifact, "--data", tmp_path / "data")[0] == 0
    image_path = tmp_path / "data" / "white" / "0.png"
    (row,) = document(cli("probe", "apply", own_artifact, image_path, "--json"))
    assert max(row["scores"], key=row["scores"].get) == "white"
    assert cli("verify", own_artifact)[0] == 0  # a probe beside the artifact is not of it
    edit(own_artifact, lambda m: m["source"].update(weights_sha256="0" * 64))
    refused(cli("probe", "apply", own_artifact, image_path), 2, "another model's embeddings")


def test_a_probe_that_cannot_be(artifact: Path, cli: Cli, xray: Path, tmp_path: Path) -> None:
    refused(cli("probe", "apply", artifact, xray, "--probe", tmp_path / "absent"), 2, "medge probe fit")
    (tmp_path / "junk").write_bytes(b"junk")
    refused(cli("probe", "apply", artifact, xray, "--probe", tmp_path / "junk"), 5, "is no probe")


@pytest.mark.parametrize(
    "verb", [[], ["export"], ["classify"], ["probe"], ["probe", "fit"], ["baseline"], ["check"], ["bench"]]
)
def test_every_verb_explains_itself(verb: list[str], cli: Cli) -> None:
    code, out, _ = cli(*verb, "--help")
    assert code == 0
    assert " ".join(["Usage: medge", *verb]) in out


def test_an_artifact_whose_manifest_was_rewritten_still_opens(own_artifact: Path, cli: Cli) -> None:
    manifest = Artifact.open(own_artifact).manifest
    write_json(own_artifact / MANIFEST, manifest.model_dump(mode="json"))
    assert cli("verify", own_artifact)[0] == 0


def test_a_frame_is_chosen_by_index(artifact: Path, cli: Cli, tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (20, 20), color) for color in ("black", "white")]
    frames[0].save(tmp_path / "two.tiff", save_all=True, append_images=frames[1:])
    rows = []
    for index in ("0", "1"):
        code, out, _ = cli("embed", str(artifact), str(tmp_path / "two.tiff"), "--frame", index, "--json")
        assert code == 0
        rows.append(json.loads(out)[0]["embedding"])
    assert rows[0] != rows[1]
    code, _, error = cli("embed", str(artifact), str(tmp_path / "two.tiff"), "--frame", "2")
    assert code == 2
    assert "frame" in error
