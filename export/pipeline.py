"""`medge export`: checkpoint to artifact folder, resumable by part, complete or absent."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from medge import __version__
from medge.export import parity
from medge.export.base import Exporter, PartJob
from medge.export.card import model_card, notice
from medge.export.evidence import Evidence, gather
from medge.export.formats import find, require_support
from medge.export.request import Request
from medge.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    File,
    Manifest,
    PartFiles,
    Source,
    describe,
    write_json,
)
from medge.registry import licence_of
from medge.runtimes import open as open_artifact
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.samples import list_images, sample_root, sample_texts
from medge.staging import staged

_WORK = ".work"
"""Notes of finished steps inside a partial folder; gone when the artifact is whole."""


def export(request: Request) -> Artifact:
    """Write the artifact and return it opened.

    Raises:
        UsageError: `out` exists, or the disk is full.
        UnsupportedError: the format cannot build this model in this scheme, with the reason.
        WeightsError, CorruptError: the tokenizer is missing or none, or a weight is not finite.
        RegressedError: parity with the reference failed; nothing appears under `out`.
    """
    if request.layout == "optimum":
        from medge.export.optimum_layout import export_joint

        return export_joint(request)
    exporter = find(request.format)
    spec = request.checkpoint.spec
    require_support(exporter, spec, request.scheme)
    SiglipTokenizer(request.checkpoint.tokenizer_file(), spec.tokenizer)  # a bad one: say so before the work, not after
    with staged(request.out, replace=request.replace, resume_key=request.key) as folder:
        (folder / _WORK).mkdir(exist_ok=True)
        _write(request, exporter, folder)
        shutil.rmtree(folder / _WORK)
    return Artifact.open(request.out)


def _write(request: Request, exporter: Exporter, folder: Path) -> None:
    spec = request.checkpoint.spec
    evidence = gather(request, folder / _WORK)
    advance = request.counter("write weights", spec.parameters)
    jobs = (
        PartJob(request.checkpoint, part, evidence.scheme, evidence.ranges.get(part.name, {}), advance)
        for part in spec.parts
    )
    parts = {job.part.name: _part(exporter, job, folder) for job in jobs}
    request.checkpoint.check_unread()
    manifest = _manifest(request, exporter, evidence, parts, _texts(request, folder))
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    if request.parity_samples:
        manifest = _with_parity(request, manifest, folder)
    (folder / "README.md").write_text(model_card(manifest, request.scheme.title), encoding="utf-8")
    card = describe(folder, "README.md")
    manifest = manifest.model_copy(update={"files": (*manifest.files, card)})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def _part(exporter: Exporter, job: PartJob, folder: Path) -> PartFiles:
    """Write one part, or take it from an earlier run that was cut after it."""
    note = folder / _WORK / f"{job.part.name}.json"
    finished = _finished(note, folder)
    if finished is not None:
        return finished
    files = tuple(describe(folder, name) for name in exporter.write(job, folder))
    written = PartFiles(files=files, inputs=job.part.inputs, outputs=job.part.outputs)
    write_json(note, written.model_dump(mode="json"))
    return written


def _finished(note: Path, folder: Path) -> PartFiles | None:
    try:
        found = PartFiles.model_validate_json(note.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    whole = all((folder / f.path).is_file() and (folder / f.path).stat().st_size == f.bytes for f in found.files)
    return found if whole else None


def _texts(request: Request, folder: Path) -> list[File]:
    """The files that no part owns, but for the model card, which reports on all others."""
    source = request.checkpoint.tokenizer_file()
    shutil.copyfile(source, folder / source.name)
    shutil.copyfile(request.checkpoint.root / "config.json", folder / "config.json")
    (folder / "NOTICE").write_text(notice(licence_of(request.checkpoint.spec)), encoding="utf-8")
    return [describe(folder, name) for name in (source.name, "config.json", "NOTICE")]


def _manifest(
    request: Request, exporter: Exporter, evidence: Evidence, parts: dict[str, PartFiles], files: list[File]
) -> Manifest:
    spec = request.checkpoint.spec
    return Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source(
            model=spec.id,
            hub_id=spec.hub_id,
            revision=spec.revision,
            weights_sha256=request.checkpoint.sha256,
        ),
        licence=licence_of(spec),
        task=spec.task,
        format=exporter.format,
        scheme=request.scheme.name,
        settings=dict(request.settings),
        parts=parts,
        files=tuple(files),
        image=spec.image.model_copy(update={"variant": request.variant}),
        tokenizer=spec.tokenizer,
        scalars=request.checkpoint.scalars(),
        session=exporter.session(evidence.scheme),
        layers=evidence.layers,
        tools=exporter.tools() | {"medge": __version__},
    )


def _with_parity(request: Request, manifest: Manifest, folder: Path) -> Manifest:
    count = request.parity_samples
    inputs = parity.Inputs(list_images(sample_root(), count), sample_texts(count))
    on_part = partial(_report_parity, request)
    expected = parity.expected(request.checkpoint, inputs, request.variant, partial(on_part, "reference"))
    found = parity.measure(open_artifact(folder), expected, inputs, partial(on_part, "parity"))
    parity.judge(found, request.scheme)
    return manifest.model_copy(update={"parity": found})


def _report_parity(request: Request, stage: str, part: str) -> None:
    request.on_progress(f"{stage} {part}", 0, 0)
