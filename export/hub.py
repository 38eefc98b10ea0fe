"""Where checkpoints come from: a local folder, or the hub behind the user's own accepted licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medge.checkpoint import Checkpoint
from medge.errors import MedgeError, WeightsError, require
from medge.registry import Model, find

_FILES = [
    "*.safetensors",
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
        UsageError: an unknown model.
        WeightsError: refused, offline, or the revision does not exist; says where to accept the terms.
    """
    model = find(model_id)
    hub = require("huggingface_hub", "export")
    try:
        return Path(hub.snapshot_download(model.hub_id, revision=revision or model.revision, allow_patterns=_FILES))
    except Exception as error:
        raise _explain(hub, model, revision, error) from error


def resolve(model: str) -> Checkpoint:
    """A checkpoint from a folder's path, or a model's id when it has been fetched.

    Raises:
        UsageError: neither a folder nor a known id.
        WeightsError: a known id that was not fetched.
    """
    if Path(model).is_dir():
        return Checkpoint.open(model)
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


def _explain(hub: Any, model: Model, revision: str | None, error: Exception) -> MedgeError:
    errors = hub.errors
    page = f"https://huggingface.co/{model.hub_id}"
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return WeightsError(
            f"The hub refuses {model.hub_id}: it is gated, and this machine shows no accepted licence",
            f"Accept the HAI-DEF terms at {page}, then run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(f"{model.hub_id} has no revision '{revision}'", f"See {page}/commits")
    reason = "this machine is offline" if _offline(hub, error) else f"{type(error).__name__}"
    return WeightsError(
        f"{model.hub_id} cannot be downloaded: {reason}",
        f"The model is gated: accept the HAI-DEF terms at {page}. Or copy the files here and pass their folder",
    )


def _offline(hub: Any, error: Exception) -> bool:
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
