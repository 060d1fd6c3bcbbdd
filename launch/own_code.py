"""This installation's own code as files, to be sent with a run.

A run may be submitted from a checkout, from an installation or from a bundle, and each sends exactly what it would
itself execute: the packages beside this file, and the metadata whose entry point vLLM's worker processes look for.
Equal code gives equal bytes.
"""

from __future__ import annotations

import importlib.metadata
import site
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from cluster.preflight.software import PLUGIN, PLUGIN_GROUP
from configs.schema import Run
from configs.stations import import_plugin
from launch.files import files_in, refuse_secret
from launch.identity import HOME, PACKAGES
from trainer.errors import ConfigError

ROWS = HOME / "configs" / "data"
"""Of the demo: rows travel by themselves, where a run reads them."""

SUFFIXES = frozenset({".py", ".jinja", ".html", ".css", ".js", ".json", ".yaml", ".jsonl", ".md"})
"""Of the files that are code or read at run time; what editors and compilers leave is not sent."""

ENTRY_POINT = (PLUGIN_GROUP, PLUGIN)
"""(group, value): without it a vLLM process makes no labels."""


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A file below code/."""

    path: str  # with slashes
    content: bytes


def own_code() -> list[CodeFile]:
    """The four packages and their dist-info. Raises `ConfigError` where the metadata is missing or lacks the entry
    point, as in a checkout that was never installed."""
    packages = [
        CodeFile(file.relative_to(HOME).as_posix(), file.read_bytes())
        for name in PACKAGES
        for file in sorted((HOME / name).rglob("*"))
        if file.suffix in SUFFIXES and file.is_file() and ROWS not in file.parents
    ]
    return packages + _metadata()


def plugin_code(run: Run) -> list[CodeFile]:
    """The user's own plug-ins, chosen as `package.module`: their top-level packages, unless those are installed as
    packages of the environment, which the nodes must have themselves."""
    found: dict[str, CodeFile] = {}
    kinds = {station.kind_of(choice) for _, station, choice in run.choices()}
    for kind in sorted(kind for kind in kinds if "." in kind):
        file = Path(str(import_plugin(kind).__file__))
        root = file.parents[kind.count(".") + (file.name == "__init__.py")]
        if root.resolve() in _installed_places():
            continue
        package = root / kind.split(".")[0]
        for name, source in files_in(package, subject=f"kind: {kind}"):
            if source.suffix in SUFFIXES:
                if source.suffix != ".py":
                    refuse_secret(name, source, subject=f"kind: {kind}")
                path = f"{package.name}/{name}"
                found[path] = CodeFile(path, source.read_bytes())
    return list(found.values())


def _metadata() -> list[CodeFile]:
    try:
        installed = importlib.metadata.distribution("stillhouse")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"the Stillhouse in {HOME} is not installed, so its vLLM plug-in would not be found elsewhere: run "
            f"pip install --no-deps -e {HOME}"
        ) from None
    group, value = ENTRY_POINT
    if not any(point.group == group and point.value == value for point in installed.entry_points):
        raise ConfigError(f"the installed metadata of Stillhouse has no entry point {group}: {value}; install it again")
    name = f"stillhouse-{installed.version}.dist-info"
    head = ["Metadata-Version: 2.1", "Name: stillhouse", f"Version: {installed.version}"]
    for key in ("Requires-Python", "Requires-Dist"):  # the ranges that a node is asked about
        head += [f"{key}: {value}" for value in installed.metadata.get_all(key) or []]
    texts = {
        "METADATA": "\n".join(head) + "\n",
        "entry_points.txt": installed.read_text("entry_points.txt") or "",
    }
    return [CodeFile(f"{name}/{key}", text.encode()) for key, text in texts.items()]


def _installed_places() -> set[Path]:
    places = {sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")}
    return {Path(place).resolve() for place in {*places, site.getusersitepackages()}}
