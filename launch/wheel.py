"""This installation's own code as files and as a wheel, without pip, a build tool or a network.

A file of its own because a run may be submitted from a checkout, from an installed wheel or from a bundle, and each
must send exactly what it would itself execute: the packages as they lie beside this file, and the metadata whose entry
point vLLM's worker processes look for. Equal code gives equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import site
import sysconfig
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.plugins import find_module
from configs.schema import Run
from launch.files import files_in, refuse_secret
from launch.identity import HOME, PACKAGES
from trainer.errors import ConfigError

SUFFIXES = frozenset({".py", ".jinja", ".html", ".css", ".js", ".json", ".yaml", ".jsonl", ".md"})
"""Of the files that are code or read at run time; editors' and compilers' leftovers stay behind."""

ENTRY_POINT = ("vllm.general_plugins", "cluster.engines.vllm_labels:register")
"""(group, value): without it a vLLM process makes no labels."""

EPOCH = (2020, 1, 1, 0, 0, 0)  # of every file in the wheel, so that equal code gives equal bytes


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A file below code/."""

    path: str  # with slashes
    content: bytes
    in_wheel: bool


def own_code() -> list[CodeFile]:
    """The four packages and their dist-info. Raises `ConfigError` where the metadata is missing or lacks the entry
    point, as in a checkout that was never installed."""
    packages = [
        CodeFile(file.relative_to(HOME).as_posix(), file.read_bytes(), in_wheel=True)
        for name in PACKAGES
        for file in sorted((HOME / name).rglob("*"))
        if file.suffix in SUFFIXES and file.is_file()
    ]
    return packages + _metadata(packages)


def plugin_code(run: Run) -> list[CodeFile]:
    """The user's own plug-ins, chosen as `package.module`: their top-level packages, unless those are installed as
    packages of the environment, which the nodes must have themselves."""
    chosen = [run.labels, run.elicitation, *(replicas.engine for replicas in run.teacher.roles().values())]
    found: dict[str, CodeFile] = {}
    for kind in sorted({plugin.kind for plugin in chosen if "." in plugin.kind}):
        file = find_module(kind)
        root = file.parents[kind.count(".") + (file.name == "__init__.py")]
        if root.resolve() in _installed_places():
            continue
        package = root / kind.split(".")[0]
        for name, source in files_in(package, subject=f"kind: {kind}"):
            if source.suffix in SUFFIXES:
                if source.suffix != ".py":
                    refuse_secret(name, source, subject=f"kind: {kind}")
                path = f"{package.name}/{name}"
                found[path] = CodeFile(path, source.read_bytes(), in_wheel=False)
    return list(found.values())


def write_code(code: Iterable[CodeFile], folder: Path) -> Path:
    """Write `code/` and the wheel under a folder; returns the wheel."""
    files = list(code)
    for file in files:
        target = folder / "code" / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
    info = next(file.path.split("/")[0] for file in files if ".dist-info/" in file.path)
    wheel = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            if file.in_wheel:
                entry = zipfile.ZipInfo(file.path, date_time=EPOCH)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.content)
    return wheel


def _metadata(packages: list[CodeFile]) -> list[CodeFile]:
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
    texts = {
        "METADATA": installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: stillhouse\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": installed.read_text("entry_points.txt") or "",
        "top_level.txt": "".join(f"{package}\n" for package in sorted(PACKAGES)),
    }
    files = [CodeFile(f"{name}/{key}", text.encode(), in_wheel=True) for key, text in texts.items()]
    lines = [f"{file.path},sha256={_digest(file.content)},{len(file.content)}\n" for file in [*packages, *files]]
    record = "".join([*lines, f"{name}/RECORD,,\n"])
    return [*files, CodeFile(f"{name}/RECORD", record.encode(), in_wheel=True)]


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _installed_places() -> set[Path]:
    places = {sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")}
    return {Path(place).resolve() for place in {*places, site.getusersitepackages()}}
