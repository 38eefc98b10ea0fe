"""Gated weights: whatever the hub answers, one line says why and where to accept the terms. No network here."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medge.errors import UsageError, WeightsError
from medge.export.hub import fetch, fetch_lazily, resolve, supply
from medge.shards import HubSource, Shard

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
Cli = Callable[..., tuple[int, str, str]]
PAGE = "https://huggingface.co/google/medsiglip-448"


def response(kind: Any) -> Any:
    requests = pytest.importorskip("requests")
    answer = requests.Response()
    answer.status_code = 403
    return kind("the hub's own\nlong text", response=answer)


def chained() -> Exception:
    try:
        raise ConnectionError("no route")
    except ConnectionError as cause:
        error = RuntimeError("gave up")
        error.__cause__ = cause
        return error


FAILURES: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (lambda: response(errors.GatedRepoError), "gated"),
    "absent or private": (lambda: response(errors.RepositoryNotFoundError), "gated"),
    "offline mode": (lambda: errors.OfflineModeIsEnabled("offline"), "offline"),
    "not in the cache": (lambda: errors.LocalEntryNotFoundError("not here"), "offline"),
    "no connection": (lambda: ConnectionError("no route"), "offline"),
    "no connection, wrapped": (chained, "offline"),
    "the hub is down": (lambda: response(errors.HfHubHTTPError), "HfHubHTTPError"),
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def install(error: Exception) -> None:
        def snapshot_download(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(hub, "hf_hub_download", snapshot_download)
        monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=snapshot_download))

    return install


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_every_refusal_names_the_page_and_exits_4(
    name: str, lazy: bool, failing: Callable[[Exception], None], cli: Cli, tmp_path: Path
) -> None:
    make, reason = FAILURES[name]
    failing(make())
    code, out, err = cli("fetch", "medsiglip-448", *(["--lazy", tmp_path / "lazy"] if lazy else []))
    assert not list(tmp_path.iterdir())
    assert (code, out) == (4, "")
    assert len(err.splitlines()) == 1
    assert reason in err
    assert PAGE in err
    assert "HAI-DEF terms" in err


@pytest.mark.parametrize("name", FAILURES)
def test_a_refused_shard_says_why(name: str, failing: Callable[[Exception], None], tmp_path: Path) -> None:
    make, reason = FAILURES[name]
    failing(make())
    source = HubSource(hub_id="google/medsiglip-448", revision="c" * 40)
    with pytest.raises(WeightsError, match=reason) as caught:
        supply(source, "x.safetensors", Shard(bytes=1, sha256="0" * 64, tensors={}), tmp_path)
    assert PAGE in caught.value.remedy


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left"), RuntimeError("IO Error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_told_and_resumes(full: Exception, failing: Callable[[Exception], None], cli: Cli) -> None:
    failing(full)
    code, out, err = cli("fetch", "medsiglip-448")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "The disk is full" in err
    assert "it resumes" in err


def test_a_lazy_folder_needs_the_hub_s_hashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = SimpleNamespace(rfilename="model.safetensors", lfs=None)
    found = SimpleNamespace(sha="c" * 40, siblings=[plain])
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: found))
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(WeightsError, match=r"states no sha256 of model\.safetensors.*without --lazy"):
        fetch_lazily("medsiglip-448", tmp_path / "lazy")
    assert not (tmp_path / "lazy").exists()


def test_a_revision_that_is_not_there_is_named(failing: Callable[[Exception], None]) -> None:
    failing(response(errors.RevisionNotFoundError))
    with pytest.raises(WeightsError, match=r"no revision 'v9'.*/commits"):
        fetch("medsiglip-448", "v9")


def test_a_fetch_takes_weights_and_no_code(monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert cli("fetch", "medsiglip-448", "--revision", "abc") == (0, f"{tmp_path}\n", "")
    assert (asked["repo"], asked["revision"]) == ("google/medsiglip-448", "abc")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.py", "*.bin", "*.pt", "*.pkl"} & set(asked["allow_patterns"])


def test_force_is_for_a_folder(cli: Cli) -> None:
    code, out, err = cli("fetch", "medsiglip-448", "--force")
    assert (code, out) == (2, "")
    assert "--lazy" in err


def test_a_folder_is_taken_as_it_is(checkpoint: Path) -> None:
    assert resolve(str(checkpoint)).root == checkpoint


def test_an_id_is_found_where_it_was_fetched(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, *, local_files_only: bool, **_: object) -> str:
        assert (repo, local_files_only) == ("google/medsiglip-448", True)
        return str(checkpoint)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve("medsiglip-448").root == checkpoint


def test_an_id_that_was_not_fetched_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="medge fetch medsiglip-448"):
        resolve("medsiglip-448")


@pytest.mark.parametrize("model", ["no-such-model", "./no/such/folder", ""])
def test_neither_folder_nor_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        resolve(model)


def test_a_half_fetched_checkpoint_is_incomplete(own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_checkpoint / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(own_checkpoint))
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        resolve("medsiglip-448")
