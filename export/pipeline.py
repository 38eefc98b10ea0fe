"""`medge export`: checkpoint to artifact folder, resumable by part, complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from medge import __version__
from medge.export.base import Exporter, PartJob
from medge.export.card import model_card, notice
from medge.export.evidence import Evidence, gather, samples
from medge.export.formats import find, require_support
from medge.export.kinds import Kind
from medge.export.kinds import of as kind_of
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
from medge.spec import Frozen, Part
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
    kind = kind_of(request)
    require_support(exporter, request.checkpoint.any_spec, request.scheme)
    kind.check(request)
    with ThreadPoolExecutor(1) as aside, staged(request.out, replace=request.replace, resume_key=request.key) as folder:
        aside.submit(lambda: request.checkpoint.sha256)  # the manifest needs it at the end: seconds for gigabytes
        (folder / _WORK).mkdir(exist_ok=True)
        _write(request, kind, exporter, folder)
        shutil.rmtree(folder / _WORK)
    return Artifact.open(request.out)


def _write(request: Request, kind: Kind, exporter: Exporter, folder: Path) -> None:
    spec = request.checkpoint.any_spec
    evidence = gather(replace(request, scheme=kind.scheme(request)), exporter.stored_bits, folder / _WORK)
    advance = request.counter("write weights", spec.parameters)
    jobs = (part_job(request, part, evidence, advance) for part in exporter.parts(spec))
    parts = {job.part.name: _part(exporter, job, folder, kind.facts(request, job.part)) for job in jobs}
    request.checkpoint.check_unread()
    manifest = _manifest(request, kind, exporter, evidence, parts, _texts(request, kind, folder))
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    if request.parity_samples:
        manifest = manifest.model_copy(update={"parity": kind.parity(request, folder)})
    (folder / "README.md").write_text(model_card(manifest, request.scheme.title), encoding="utf-8")
    card = describe(folder, "README.md")
    manifest = manifest.model_copy(update={"files": (*manifest.files, card)})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def part_job(request: Request, part: Part, evidence: Evidence, on_tensor: Callable[[int], None]) -> PartJob:
    """What an exporter is told of one part."""
    return PartJob(
        request.checkpoint,
        part,
        evidence.scheme,
        evidence.ranges.get(part.name, {}),
        evidence.importance,
        on_tensor,
        settings=request.settings,
        tapped=request.tapped,
        on_step=request.on_progress,
        samples=partial(samples, request, part),
        context=request.context,
    )


def _part(exporter: Exporter, job: PartJob, folder: Path, facts: dict[str, str]) -> PartFiles:
    """Write one part, or take it from an earlier run that was cut after it."""
    note = folder / _WORK / f"{job.part.name}.json"
    finished = _finished(note, folder)
    if finished is not None:
        for name in finished.read:
            job.checkpoint.done_with(name)
        return finished.part
    written = exporter.write(job, folder)
    files = tuple(describe(folder, name) for name in written.files)
    part = PartFiles(files=files, inputs=job.part.inputs, outputs=job.outputs, facts=written.facts | facts)
    write_json(note, _Finished(part=part, read=tuple(sorted(job.checkpoint.seen))).model_dump(mode="json"))
    return part


class _Finished(Frozen):
    """A part that an earlier run wrote."""

    part: PartFiles
    read: tuple[str, ...]
    """Tensors that were read, and found finite, by then: nobody reads them again."""


def _finished(note: Path, folder: Path) -> _Finished | None:
    try:
        found = _Finished.model_validate_json(note.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    files = ((folder / file.path, file.bytes) for file in found.part.files)
    return found if all(path.is_file() and path.stat().st_size == size for path, size in files) else None


def _texts(request: Request, kind: Kind, folder: Path) -> list[File]:
    """The files that no part owns, but for the model card, which reports on all others."""
    names = kind.files(request, folder)
    shutil.copyfile(request.checkpoint.root / "config.json", folder / "config.json")
    (folder / "NOTICE").write_text(notice(licence_of(request.checkpoint.any_spec)), encoding="utf-8")
    return [describe(folder, name) for name in (*names, "config.json", "NOTICE")]


def _manifest(
    request: Request, kind: Kind, exporter: Exporter, evidence: Evidence, parts: dict[str, PartFiles], files: list[File]
) -> Manifest:
    spec = request.checkpoint.any_spec
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
        settings=request.recorded,
        parts=parts,
        files=tuple(files),
        session=exporter.session(evidence.scheme),
        layers=evidence.layers,
        tools=exporter.tools() | {"medge": __version__},
        **kind.fields(request),
    )
