"""The contract between exporters, runtimes, the gate and the phone: what it refuses, and by which name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medge.errors import CorruptError, MedgeError, UsageError
from medge.manifest import MANIFEST, Artifact, File, Manifest, json_schema, read_manifest, sha256, write_json

Change = Callable[[dict[str, Any]], Any]


def edit(root: Path, change: Change) -> None:
    document = json.loads((root / MANIFEST).read_text())
    change(document)
    (root / MANIFEST).write_text(json.dumps(document))


def test_round_trip(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_the_schema_describes_what_is_written(artifact: Path) -> None:
    schema = json_schema()
    document = json.loads((artifact / MANIFEST).read_text())
    assert set(document) <= set(schema["properties"])
    assert set(schema["required"]) <= set(document)
    assert schema["additionalProperties"] is False


def test_an_artifact_accounts_for_every_file(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    listed = {file.path for file in opened.verify()}
    assert listed | {MANIFEST} == {path.name for path in artifact.iterdir()}
    assert opened.bytes == sum((artifact / name).stat().st_size for name in listed)


@pytest.mark.parametrize(
    "path",
    ["../secret", "a/../../secret", "/etc/passwd", "..", "", "..\\secret", "a\\b", "C:secret", "C:/secret", "a\0b"],
)
def test_a_path_out_of_the_folder_is_refused(path: str, own_artifact: Path) -> None:
    with pytest.raises(ValidationError):
        File(path=path, sha256="0" * 64, bytes=0)
    edit(own_artifact, lambda m: m["files"][0].update(path=path))
    with pytest.raises(CorruptError, match=r"invalid at 'files\.0\.path'"):
        Artifact.open(own_artifact)


@given(path=st.text(alphabet="ab./\\:", max_size=12))
def test_no_accepted_path_leaves_the_folder(path: str) -> None:
    root = Path("/nowhere/artifact")
    try:
        accepted = File(path=path, sha256="0" * 64, bytes=0).path
    except ValidationError:
        return
    assert (root / accepted).resolve().is_relative_to(root)


def test_a_link_out_of_the_folder_is_refused(own_artifact: Path, tmp_path: Path) -> None:
    target = own_artifact / "NOTICE"
    outside = target.rename(tmp_path / "outside")
    target.symlink_to(outside)
    with pytest.raises(CorruptError, match="leads out of the artifact"):
        Artifact.open(own_artifact)


def test_a_link_to_the_artifact_itself_opens(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    assert Artifact.open(tmp_path / "link").bytes > 0


def damage_size(root: Path) -> None:
    with (root / "NOTICE").open("a") as stream:
        stream.write("x")


def remove(root: Path) -> None:
    (root / "NOTICE").unlink()


def replace_by_folder(root: Path) -> None:
    remove(root)
    (root / "NOTICE").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_size, "bytes, the manifest says"), (remove, "is missing"), (replace_by_folder, "is missing")],
)
def test_a_file_that_is_not_as_stated_never_opens(
    damage: Callable[[Path], None], message: str, own_artifact: Path
) -> None:
    damage(own_artifact)
    with pytest.raises(CorruptError, match=message):
        Artifact.open(own_artifact)


def test_verify_finds_one_changed_bit(own_artifact: Path) -> None:
    path = own_artifact / "image_encoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened = Artifact.open(own_artifact)  # sizes are right
    with pytest.raises(CorruptError, match=r"image_encoder\.onnx\.data was altered"):
        list(opened.verify())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m: m.update(schema_version=2), "Update medge", id="newer"),
        pytest.param(lambda m: m.update(schema_version="2"), "no schema version", id="newer, as a string"),
        pytest.param(lambda m: m.update(schema_version=2.0), "no schema version", id="newer, as a float"),
        pytest.param(lambda m: m.update(schema_version=True), "no schema version", id="true"),
        pytest.param(lambda m: m.update(schema_version=0), "no schema version", id="zero"),
        pytest.param(lambda m: m.pop("schema_version"), "no schema version", id="none"),
        pytest.param(lambda m: m.update(surprise=1), "'surprise'", id="unknown field"),
        pytest.param(lambda m: m.pop("source"), "'source'", id="missing field"),
        pytest.param(lambda m: m.update(format="zip"), "'format'", id="unknown format"),
        pytest.param(lambda m: m["files"][0].update(bytes=-1), r"'files\.0\.bytes'", id="negative size"),
        pytest.param(lambda m: m["files"][0].update(sha256="0"), r"'files\.0\.sha256'", id="short hash"),
        pytest.param(lambda m: m["parts"]["image_encoder"].update(files=[]), "files'", id="part without files"),
        pytest.param(lambda m: m["image"].update(size=10**9), r"'image\.size'", id="gigantic image"),
        pytest.param(lambda m: m["tokenizer"].update(length=10**9), r"'tokenizer\.length'", id="gigantic text"),
        pytest.param(lambda m: m["scalars"].update(logit_scale=float("nan")), "logit_scale", id="NaN scalar"),
    ],
)
def test_an_invalid_manifest_is_refused_where_it_is_wrong(change: Change, message: str, own_artifact: Path) -> None:
    edit(own_artifact, change)
    with pytest.raises(CorruptError, match=message) as caught:
        Artifact.open(own_artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}", "[" * 100_000, '"' + "x" * 100])
def test_no_manifest_at_all(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CorruptError):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("kind", ["absent", "empty", "a file", "a folder as manifest"])
def test_what_is_no_artifact_is_a_usage_error(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "x"
    if kind == "a file":
        root.write_text("")
    elif kind != "absent":
        root.mkdir()
    if kind == "a folder as manifest":
        (root / MANIFEST).mkdir()
    with pytest.raises(UsageError):
        Artifact.open(root)


@given(data=st.binary(max_size=100))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / MANIFEST).write_bytes(data)
    with pytest.raises(MedgeError):
        read_manifest(root)


def test_the_digest_is_of_what_is_computed(own_artifact: Path) -> None:
    before = Artifact.open(own_artifact).digest
    edit(own_artifact, lambda m: m.update(created="2001-01-01T00:00:00Z", licence="other"))
    assert Artifact.open(own_artifact).digest == before
    edit(own_artifact, lambda m: m["parts"]["image_encoder"]["files"][0].update(sha256="0" * 64))
    assert Artifact.open(own_artifact).digest != before


def test_files_are_found_by_their_path_only_when_accounted_for(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    assert opened.file("spiece.model") == artifact / "spiece.model"
    with pytest.raises(CorruptError, match="accounts for no"):
        opened.file("../spiece.model")
    with pytest.raises(UsageError, match="no part 'decoder'"):
        opened.part_path("decoder")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
