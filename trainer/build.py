"""Which code a process runs: a hash of this project's own files, compared wherever processes of one run meet.

A node with older code answers without an error and teaches wrong labels, so each process of a run is told the hash of
the controller's code and refuses to work with any other. A file here because every layer above asks for it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ConfigError

PACKAGES = ("configs", "trainer", "cluster", "launch")
SUFFIXES = frozenset({".py", ".jinja", ".html", ".css", ".js"})

VARIABLE = "STILLHOUSE_BUILD"
"""In the environment of every process of a run: the hash of the controller's code."""

FAST = "STILLHOUSE_FAST"
"""In the environment of a run, for all its processes: 1, the default; 0 for the plain formulas (`trainer/model/fast`);
onednn or blas for this library in every float32 product on a CPU, where 1 measures which is faster."""

LOG_LEVEL = "STILLHOUSE_LOG_LEVEL"
"""debug, info, warning or error: how much a run says of itself, and its libraries into the logs of its roles."""


@functools.cache
def build_hash() -> str:
    """16 hexadecimal digits over paths and bytes of all source files of the four packages, as they are imported here.

    The same for a checkout, an installation and an unpacked wheel of the same files.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_files()):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def check_build() -> None:
    """Raises `ConfigError` where this process runs other code than the controller that started it."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted != build_hash():
        raise ConfigError(
            f"node {socket.gethostname()} runs another version of Stillhouse: its code in {_folder('trainer').parent} "
            f"has the hash {build_hash()}, the controller's {wanted}. Install the same version on every node, or "
            "submit the run, which ships the code"
        )


def _files() -> Iterator[tuple[str, Path]]:
    """(path with slashes, beginning with the package; file) of every source file."""
    for package in PACKAGES:
        folder = _folder(package)
        for file in folder.rglob("*"):
            if file.suffix in SUFFIXES and file.is_file():
                yield f"{package}/{file.relative_to(folder).as_posix()}", file


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {package} of Stillhouse is not installed on node {socket.gethostname()}")
    return Path(spec.origin).parent
