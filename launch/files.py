"""Files of a folder that are sent elsewhere, or copied into something that will be published.

No link that leads out of the folder is followed: whoever can write to the folder could otherwise have any of the
user's files sent.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.errors import ConfigError

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
DATASET_CARD = "README.md"  # names the files of each split

_SECRET_NAME = re.compile(
    r"^id_(rsa|dsa|ecdsa|ed25519)|credential|secret|passw|(api|access|private)[_-]?key|service[_-]?account|kubeconfig"
    r"|^(hf_?|auth_?)?tokens?\.",
    re.IGNORECASE,
)


def files_in(folder: Path, *, subject: str, names: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
    """(name relative to the folder with slashes, file) of all files below it in order, hidden ones left out; with
    `names` only what lies in the folder under one of them, and below.

    `subject` begins the message of a `ConfigError` for a link that leads out of the folder or nowhere.
    """
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        wanted = names if names is not None and Path(place) == folder else None
        shown = [name for name in (*files, *folders) if not name.startswith(".") and (wanted is None or name in wanted)]
        folders[:] = sorted(set(folders).intersection(shown))
        for name in sorted(shown):
            path = Path(place, name)
            if path.is_symlink() and not _leads_inside(path, inside):
                raise ConfigError(
                    f"{subject}: {path} is a link to {os.readlink(path)}, outside of the folder, and what it leads to "
                    "would be taken along: put a copy of the file in its place, or remove the link"
                )
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _leads_inside(link: Path, inside: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(inside)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False


def row_files(folder: Path, *, subject: str) -> tuple[list[tuple[str, Path]], list[str]]:
    """The files of a folder of rows that can hold rows, as `files_in`, and the names of those that cannot.

    Raises `ConfigError` for a link that leads out, and for a file of rows whose name is that of a secret.
    """
    chosen, left_out = [], []
    for name, file in files_in(folder, subject=subject):
        if not _may_hold_rows(file):
            left_out.append(name)
            continue
        refuse_secret(name, file, subject=subject)
        chosen.append((name, file))
    return chosen, left_out


def refuse_secret(name: str, file: Path, *, subject: str) -> None:
    """Raises `ConfigError` where a file that would be sent, or a folder in its `name`, is called like a secret."""
    if any(_SECRET_NAME.search(part) for part in name.split("/")):
        raise ConfigError(
            f"{subject}: {file} has the name of a secret and would be sent along: move it out of the folder, or give "
            "it another name if it is none"
        )


def _may_hold_rows(file: Path) -> bool:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return file.name == DATASET_CARD or (bool(suffixes) and suffixes[-1] in ROW_SUFFIXES)


def copy_files(source: Path, target: Path, *, subject: str, names: Collection[str] | None = None) -> None:
    """Copy files of a folder, as `files_in` finds them."""
    for name, file in files_in(source, subject=subject, names=names):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)
