"""Where checkpoints come from: a local folder, or the hub behind the user's own accepted licence."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medge.checkpoint import Checkpoint
from medge.errors import MedgeError, UsageError, WeightsError, require
from medge.export import synth
from medge.manifest import write_json
from medge.registry import find
from medge.shards import RECIPE, HubSource, Recipe, Shard, Source, SynthSource, shard_names
from medge.staging import staged

_WEIGHTS = "*.safetensors"
_FILES = [
    "*.json",
    "spiece.model",
    "tokenizer.model",
    "*.jinja",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]


def fetch(model_id: str, revision: str | None = None) -> Path:
    """Download a gated checkpoint into the hub's own cache; returns the folder. No code of the repository runs.

    Raises:
        UsageError: an unknown model, or the disk is full.
        WeightsError: refused, offline, or the revision does not exist; says where to accept the terms.
    """
    model = find(model_id)
    revision = revision or model.revision
    with _explained(model.hub_id, revision) as hub:
        return Path(hub.snapshot_download(model.hub_id, revision=revision, allow_patterns=[_WEIGHTS, *_FILES]))


def fetch_lazily(model_id: str, out: Path, revision: str | None = None, *, replace: bool = False) -> Path:
    """Write a checkpoint folder without weights: its shards are downloaded when an export reads them (medge.shards).

    Raises:
        UsageError, WeightsError: as `fetch`; or `out` exists, or the hub knows no sha256 of a shard.
    """
    model = find(model_id)
    with staged(out, replace=replace) as folder:
        with _explained(model.hub_id, revision or model.revision) as hub:
            recipe = _recipe(hub, model.hub_id, revision or model.revision, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on what it downloaded
        write_json(folder / RECIPE, recipe.model_dump(mode="json"))
    return out


def _recipe(hub: Any, hub_id: str, revision: str, folder: Path) -> Recipe:
    """Download all but the weights, and note where those are."""
    found = hub.HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    source = HubSource(hub_id=hub_id, revision=found.sha)
    hub.snapshot_download(hub_id, revision=found.sha, allow_patterns=_FILES, local_dir=folder)
    files = {file.rfilename: file for file in found.siblings}
    shards = {name: _described(hub, source, name, files.get(name)) for name in shard_names(folder)}
    return Recipe(source=source, shards=shards)


def _described(hub: Any, source: HubSource, name: str, file: Any) -> Shard:
    """Length and hash as the hub states them, and the header, which is all that is downloaded here."""
    if file is None or file.lfs is None:
        raise WeightsError(f"{source.hub_id} states no sha256 of {name}", "Fetch all of it, without --lazy")
    header = hub.HfApi().parse_safetensors_file_metadata(source.hub_id, name, revision=source.revision)
    tensors = {tensor: _entry(info) for tensor, info in header.tensors.items()}
    return Shard(bytes=file.lfs.size, sha256=file.lfs.sha256, tensors=tensors)


def _entry(info: Any) -> dict[str, Any]:
    known = asdict(info)
    return {key: known[key] for key in ("dtype", "shape", "data_offsets")}


def supply(source: Source, name: str, shard: Shard, folder: Path) -> None:
    """Make or download one shard of a lazy checkpoint.

    Raises:
        UsageError: the disk is full.
        WeightsError: the hub refuses it, or this machine is offline.
    """
    if isinstance(source, SynthSource):
        synth.write_shard(source, name, shard, folder)
        return
    with _explained(source.hub_id, source.revision) as hub:
        hub.hf_hub_download(source.hub_id, name, revision=source.revision, local_dir=folder)


def resolve(model: str) -> Checkpoint:
    """A checkpoint from a folder's path, or a model's id when it has been fetched.

    Raises:
        UsageError: neither a folder nor a known id.
        WeightsError: a known id that was not fetched.
    """
    if Path(model).is_dir():
        return Checkpoint.open(model, supply)
    known = find(model)
    hub = require("huggingface_hub", "export")
    try:
        path = hub.snapshot_download(known.hub_id, revision=known.revision, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        raise WeightsError(
            f"The weights of {model} are not on this machine",
            f"Run: medge fetch {model} (or `medge synth {model}` for random ones)",
        ) from None
    return Checkpoint.open(path)


@contextmanager
def _explained(hub_id: str, revision: str) -> Iterator[Any]:
    """The hub's package; whatever it raises becomes one line."""
    hub = require("huggingface_hub", "export")
    try:
        yield hub
    except MedgeError:
        raise
    except Exception as error:
        raise _explain(hub, hub_id, revision, error) from error


def _explain(hub: Any, hub_id: str, revision: str, error: Exception) -> MedgeError:
    errors = hub.errors
    page = f"https://huggingface.co/{hub_id}"
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return WeightsError(
            f"The hub refuses {hub_id}: it is gated, and this machine shows no accepted licence",
            f"Accept the HAI-DEF terms at {page}, then run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(f"{hub_id} has no revision '{revision}'", f"See {page}/commits")
    if _disk_full(error):
        return UsageError(
            f"The disk is full while downloading {hub_id}", "Free some space. Then run the same command: it resumes"
        )
    reason = "this machine is offline" if _offline(error) else f"{type(error).__name__}"
    return WeightsError(
        f"{hub_id} cannot be downloaded: {reason}",
        f"The model is gated: accept the HAI-DEF terms at {page}. Or copy the files here and pass their folder",
    )


def _disk_full(error: Exception) -> bool:
    """As Python says it, or as the hub's Rust library does."""
    full = (errno.ENOSPC, errno.EDQUOT)
    number = error.errno if isinstance(error, OSError) else None
    return number in full or any(f"(os error {code})" in str(error) for code in full)


def _offline(error: Exception) -> bool:
    names = (
        "ConnectionError",
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectTimeout",
        "ProxyError",
    )
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ in names:
            return True
        chain = chain.__cause__ or chain.__context__
    return False
