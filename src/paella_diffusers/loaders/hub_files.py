"""Files of a Hub repository or a folder, and errors that say what is missing and what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# what `hf_hub_download` takes beside the file
HUB_OPTIONS = ("cache_dir", "force_download", "token", "local_files_only")


@contextmanager
def loading_errors(repo_id: str, filename: str, revision: str | None = None):
    """
    Say which file of which repository cannot be had, and what to do, whatever wraps the client's error.

    Raises:
        FileNotFoundError: If the repository has no such file; `LocalEntryNotFoundError`, one of them, while offline.
        OSError: If the repository, its revision or access to it is missing, or the connection breaks.
    """
    with connection_errors(f"{repo_id} was loaded", "Call again: whole files are kept."):
        try:
            yield
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(f"{repo_id} has no {filename}.") from error
        except Exception as error:
            for reason in _chain(error):
                if isinstance(reason, LocalEntryNotFoundError):
                    what = f"{filename} of {repo_id}" if reason is error else f"Some of {repo_id} ({error})"
                    raise LocalEntryNotFoundError(
                        f"{what} is not in the cache, and the Hub is out of reach: load it once while online, without "
                        "`local_files_only`, or pass the `cache_dir` that it is in."
                    ) from error
                message = _what_to_do(reason, repo_id, filename, revision)
                if message is not None:
                    raise OSError(message) from error
            raise


@contextmanager
def connection_errors(what: str, remedy: str):
    """Say what broke off and what to do, where the Hub's client would only name the HTTP library's error."""
    try:
        yield
    except LocalEntryNotFoundError:
        raise
    except Exception as error:
        if not any(map(_is_connection_error, _chain(error))):
            raise
        raise OSError(f"The connection to the Hub broke while {what} ({error}). {remedy}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_connection_error(error: BaseException) -> bool:
    """Whether it is an `httpx.TransportError`; newer clients come with an httpx of another name."""
    kinds = type(error).__mro__
    return any(kind.__name__ == "TransportError" and kind.__module__.startswith("httpx") for kind in kinds)


def _what_to_do(error: BaseException, repo_id: str, filename: str, revision: str | None) -> str | None:
    if isinstance(error, HFValidationError):
        return f"{repo_id} is neither a folder nor a Hub id like owner/name."
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: {filename} needs its owners' consent. Ask for it on {repo_id}'s page on the Hub, then log "
            "in with `hf auth login`, or pass `token`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no {repo_id} on the Hub, or it is private ({filename} was asked for). Check the name; for a private "
            "one log in with `hf auth login`, or pass `token`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision} ({filename} was asked for)."
    return None


def download(repo_id: str, filename: str, revision: str | None, options: dict[str, Any]) -> str:
    """A file of a Hub repository, in the cache; raises as [`loading_errors`]."""
    with loading_errors(repo_id, filename, revision):
        return hf_hub_download(repo_id, filename, revision=revision, **options)


def find_file(path: str | Path, filename: str, revision: str | None, options: dict[str, Any]) -> str:
    """A file of a folder, or of a Hub repository, downloaded; raises as [`loading_errors`]."""
    if Path(path).is_dir():
        if not (Path(path) / filename).is_file():
            raise FileNotFoundError(f"{path} has no {filename}.")
        return str(Path(path) / filename)
    return download(str(path), filename, revision, options)


def read_json(path: str | Path) -> dict[str, Any]:
    """
    The contents of a JSON file.

    Raises:
        ValueError: If it is damaged, or holds anything but an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not JSON ({error}): save or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(content)[:80]}.")
    return content
