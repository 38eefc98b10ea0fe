"""The artifact folder: the only contract between exporters, runtimes, the gate and the phone.

    DIR/manifest.json            this module's `Manifest`; its JSON Schema is docs/manifest.schema.json
    DIR/image_encoder.onnx …     one or more files a part, each with sha256 and size
    DIR/spiece.model …           the tokenizer
    DIR/README.md, NOTICE        model card and terms

A folder is written beside its place and renamed once, so a half-written one never opens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationError

from medge.errors import CorruptError, UsageError
from medge.spec import ChatFormat, Frozen, ImageSpec, Task, TensorSpec, TokenizerSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

Format = Literal["onnx", "executorch", "coreml", "gguf"]


def _inside(path: str) -> str:
    """A manifest's paths stay in its folder: relative, forward slashes, no '..'."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"path '{path}' leaves the artifact folder")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(Frozen):
    """One file of the artifact."""

    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0)


class PartFiles(Frozen):
    """One graph: the file that a runtime opens first, then what that file refers to."""

    files: tuple[File, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: dict[str, str] = {}
    """What the exporter saw in the files: method name, share delegated, which GELU."""


class Source(Frozen):
    """Where the weights came from."""

    model: str
    hub_id: str
    revision: str
    weights_sha256: Sha256
    teacher: str | None = None


class Parity(Frozen):
    """Export parity of one part, against the reference on real inputs."""

    reference: str
    """What it was measured against, for example "torch 2.13 cpu fp32"."""
    samples: int
    cosine_mean: float
    cosine_min: float
    centred_cosine_min: float | None = None
    """After subtracting the reference's mean over the samples; None below 3 samples."""


class Manifest(Frozen):
    """manifest.json."""

    schema_version: int
    source: Source
    licence: str
    task: Task
    format: Format
    scheme: str
    settings: dict[str, str] = {}
    parts: dict[str, PartFiles]
    files: tuple[File, ...] = ()
    """Everything that no part owns: tokenizer, model card, NOTICE, config.json."""
    image: ImageSpec | None = None
    tokenizer: TokenizerSpec | None = None
    chat: ChatFormat | None = None
    scalars: dict[str, FiniteFloat] = {}
    session: dict[str, str] = {}
    """Settings that the runtime's session needs to run this artifact as measured."""
    layers: dict[str, str] = {}
    """What was measured and decided layer by layer: bits of a mixed scheme, static activations."""
    parity: dict[str, Parity] = {}
    tools: dict[str, str] = {}
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def all_files(self) -> Iterator[File]:
        """Every file that the manifest accounts for."""
        for part in self.parts.values():
            yield from part.files
        yield from self.files


class Artifact:
    """An artifact folder, opened: its manifest is valid and its files are there at their sizes."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | Path) -> Artifact:
        """Read and check the manifest; sizes are compared, hashes are left to `verify`.

        Raises:
            UsageError: no artifact there.
            CorruptError: the manifest is invalid, newer than this medge, or a file is missing or misized.
        """
        root = Path(root)
        artifact = cls(root, read_manifest(root))
        for file in artifact.manifest.all_files():
            artifact._check_size(file)
        return artifact

    def path(self, file: File) -> Path:
        """Where a file lies; symbolic links may not lead out of the folder either."""
        path = self.root / file.path
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise CorruptError(f"'{file.path}' leads out of the artifact {self.root}", "Export it again")
        return path

    def part_path(self, name: str) -> Path:
        """The file that a runtime opens for a part."""
        if name not in self.manifest.parts:
            raise UsageError(f"{self.root} has no part '{name}'", f"It has: {', '.join(self.manifest.parts)}")
        return self.path(self.manifest.parts[name].files[0])

    def verify(self) -> Iterator[File]:
        """Re-hash every file, yielding each after it passed.

        Raises:
            CorruptError: a file's bytes are not those of the manifest.
        """
        for file in self.manifest.all_files():
            self._check_size(file)
            if sha256(self.path(file)) != file.sha256:
                raise CorruptError(f"{self.root / file.path} was altered: its sha256 differs", "Export it again")
            yield file

    def file(self, path: str) -> Path:
        """Where a file lies that the manifest accounts for.

        Raises:
            CorruptError: it accounts for no such file.
        """
        for file in self.manifest.all_files():
            if file.path == path:
                return self.path(file)
        raise CorruptError(f"{self.root / MANIFEST} accounts for no '{path}'", "Export the artifact again")

    @property
    def digest(self) -> str:
        """What the artifact computes: a sha256 over its files' hashes, not over when they were made."""
        lines = sorted(f"{f.sha256} {f.path}" for p in self.manifest.parts.values() for f in p.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.manifest.all_files())

    def _check_size(self, file: File) -> None:
        path = self.path(file)
        if not path.is_file():
            raise CorruptError(f"{path} is missing", "Export the artifact again")
        if path.stat().st_size != file.bytes:
            raise CorruptError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {file.bytes}",
                "Export the artifact again",
            )


def read_manifest(root: Path) -> Manifest:
    """manifest.json of an artifact folder, validated.

    Raises:
        UsageError: no such file.
        CorruptError: it is no manifest of a schema that this medge knows.
    """
    path = root / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{root} is no artifact: it has no {MANIFEST}", "Make one with: medge export") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is no JSON: {error}", "Export the artifact again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:  # what pydantic would coerce ("2", 2.0, true) is no version
        raise CorruptError(f"{path} states no schema version", "Export the artifact again")
    if version > SCHEMA_VERSION:
        raise CorruptError(
            f"{path} has schema version {version}, this medge reads up to {SCHEMA_VERSION}", "Update medge"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path} is invalid at '{where}': {first['msg']}", "Export the artifact again") from None


def write_json(path: Path, document: Any) -> None:
    """Write through a neighbour file and one rename, so that a reader sees the old or the new, whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def sha256(path: Path) -> str:
    """Hex digest of a file, streamed."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe(root: Path, path: str) -> File:
    """The File entry of a file just written."""
    full = root / path
    return File(path=path, sha256=sha256(full), bytes=full.stat().st_size)


def json_schema() -> dict[str, Any]:
    """The manifest's published JSON Schema."""
    return Manifest.model_json_schema()
