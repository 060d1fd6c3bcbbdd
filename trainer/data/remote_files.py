"""Files that are named by a URL: whatever fsspec reads (`https://`, `s3://`, `gs://`, `hf://`, ...), as local copies.

A copy lies in the cache of `datasets` under the hash of the URL and of what the server says of the file (size, ETag,
time of change): a file that changes there is fetched again, and one of which nothing is said, every time.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from fsspec.callbacks import Callback

from configs.refusal import did_you_mean
from trainer.data.cache import cache_folder
from trainer.errors import ConfigError, DataError, StillhouseError, reason_of
from trainer.threads import within

CONNECT_S, SILENCE_S = 15, 60
"""How long a server may take to be reached, and to send something."""

_IDENTITY = (
    *("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
    *("Content-MD5", "md5Hash", "blob_id", "content_hash", "generation", "VersionId"),
)
"""What file systems call that by which a changed file is told."""


def name_in_url(url: str) -> str:
    """The last part of the path, by which a format is told: `rows.jsonl` of `https://host/rows.jsonl?download=true`."""
    scheme, _, rest = url.partition("://")
    path = urlsplit(url).path if scheme.lower() in ("http", "https") else rest
    return PurePosixPath(unquote(path)).name


def expand_url(url: str) -> list[str]:
    """The URL itself, or those of the files that its pattern matches, sorted. Raises `ConfigError`."""
    marks = "*" if url.lower().startswith(("http://", "https://")) else "*?["
    if not any(mark in url for mark in marks):
        return [url]
    system, path = file_system(url)
    with asking(url):
        found = within(SILENCE_S, partial(system.glob, path, detail=True), doing=f"looking for {url}")
    names = sorted(name for name, info in found.items() if info.get("type") == "file")
    if not names:
        raise ConfigError(f"the pattern {url} matches no file there")
    return [system.unstrip_protocol(name) for name in names]


def identity(url: str) -> dict[str, str] | None:
    """What the server says of the file: its size and by what a change is told; None where it says nothing of the kind.
    Raises `ConfigError` where there is no such file or no such server."""
    system, path = file_system(url)
    with asking(url):
        info = within(SILENCE_S, partial(system.info, path), doing=f"looking for {url}")
    if info.get("type") == "directory":
        raise ConfigError(f"the dataset {url} is a folder: name its files, such as {url.rstrip('/')}/*.jsonl")
    told = {key: str(info[key]) for key in _IDENTITY if info.get(key) is not None}
    return {"size": str(info.get("size")), **told} if told else None


def local_copy(url: str) -> Path:
    """Fetched unless it is here already. Raises `ConfigError` for what is not there, `DataError` for what does not
    arrive."""
    told = identity(url)
    target = cache_folder([url, told]) / "copy"
    if told is not None and target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=target.parent)
    os.close(descriptor)
    try:
        _fetch(url, draft)
        os.replace(draft, target)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return target


class _Progress(Callback):
    """When something arrived last."""

    def __init__(self) -> None:
        super().__init__()
        self.at = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        self.at = time.monotonic()


def _fetch(url: str, draft: str) -> None:
    system, path = file_system(url)
    progress = _Progress()
    with asking(url, arriving=True):
        get = partial(system.get_file, path, draft, callback=progress)
        within(2 * SILENCE_S, get, doing=f"fetching {url}", alive=lambda: progress.at)


def file_system(url: str) -> tuple[Any, str]:
    """Raises `ConfigError` for an unknown protocol, and for one whose package is missing."""
    import fsspec
    from fsspec.registry import known_implementations, registry

    protocol = url.partition("://")[0].lower()
    if "::" in url:
        raise ConfigError(f"the dataset {url}: URLs inside of others are not read; unpack the file, and name it")
    known = sorted({*known_implementations, *registry})
    if protocol not in known:
        hint = did_you_mean(protocol, known) or "; such as https, s3, gs, abfs, hf or file"
        raise ConfigError(f"the dataset {url}: there is no protocol {protocol}://{hint}")
    try:
        return fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        said = known_implementations.get(protocol, {}).get("err", str(error))
        named = re.search(r"[Ii]nstall (\w+)|requires \"(\w+)\"", said)
        write = f"pip install {named[1] or named[2]}" if named else reason_of(error)
        raise ConfigError(f"the dataset {url}: {protocol}:// needs a package that is not installed: {write}") from error
    except Exception as error:
        raise ConfigError(f"cannot look at the dataset {url}: {reason_of(error)}") from error


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


@contextmanager
def asking(url: str, *, arriving: bool = False) -> Iterator[None]:
    """Around a question about a URL: its errors as a `ConfigError`, or while it is `arriving` a `DataError`."""
    try:
        yield
    except StillhouseError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # over HTTP the reason, of whatever kind
        if cause is None or getattr(cause, "status", None) in (404, 410):
            raise ConfigError(f"the dataset {url} does not exist: the server has no such file") from error
        raise ConfigError(f"cannot read the dataset {url}: {reason_of(cause)}{_advice(cause)}") from error
    except PermissionError as error:
        raise ConfigError(f"the dataset {url} may not be read: {reason_of(error)}; are credentials needed?") from error
    except Exception as error:
        kind = DataError if arriving else ConfigError
        raise kind(f"cannot read the dataset {url}: {reason_of(error)}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    """What to look at. A server that answers with a status was reached."""
    status = getattr(error, "status", None)
    if status in (401, 403):
        return "; are credentials needed?"
    return "; can this machine reach it?" if not status else ""
