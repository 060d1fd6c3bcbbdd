"""The bundle: everything of a run that has to travel to where it will be executed, in one folder.

    <folder>/  run.yaml              the resolved run, its paths as they are valid there
               code/                 this installation of Stillhouse: four packages and their dist-info
               prompts/              rows and templates that are files here

A job starts in that folder with PYTHONPATH=<folder>/code and needs neither pip nor a network.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.load import dump_run, load_run, run_folder
from configs.models import ModelSource, Teacher
from configs.paths import is_pattern, is_url, named_path
from configs.prompts import Dataset
from configs.schema import Run
from configs.tasks import Task
from launch.files import refuse_secret, row_files
from launch.own_code import CodeFile, own_code, plugin_code
from trainer.build import build_hash
from trainer.data.local_files import local_files
from trainer.errors import ConfigError

MAX_BYTES = 100 * 2**20
"""Of an upload, unless the user allows more: Ray keeps uploads in the memory of the cluster's head."""

SHOWN_FILES = 5
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jinja")  # which hub names do not have


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of the bundle; `path` is relative to its folder, with slashes."""

    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A made bundle."""

    folder: Path
    run: Run  # as it will be there
    build: str  # `trainer.build.build_hash()` of the code
    files: tuple[BundleFile, ...]
    left_out: tuple[str, ...] = ()  # files in folders of rows that cannot hold rows
    fetched: tuple[str, ...] = ()  # URLs and names of the hub by which rows are read from where the run is

    @property
    def num_bytes(self) -> int:
        """The size of the whole upload."""
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class _Local:
    """A file or folder of this machine that travels."""

    setting: str  # where the configuration names it
    source: Path
    path: str  # in the bundle
    files: tuple[tuple[str, Path], ...]  # (name relative to the source with a slash, "" for a file itself; file)
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, setting: str, source: Path) -> _Local:
        """Raises `ConfigError` for what must not be sent (`launch/files.py`)."""
        if source.is_file():
            found, left_out = [("", source)], []
        else:
            rows, left_out = row_files(source, subject=setting)
            if not rows:
                raise ConfigError(
                    f"{setting}: the folder {source} holds no files of rows (such as .jsonl or .parquet): nothing "
                    "would be sent"
                )
            found = [(f"/{name}", file) for name, file in rows]
        path = f"prompts/{_digest(found)}-{source.name}"
        return cls(setting, source, path, tuple(found), tuple(str(source / name) for name in left_out))

    @classmethod
    def of_pattern(cls, setting: str, pattern: Path, files: Sequence[Path]) -> _Local:
        """The files that a pattern matches. Raises `ConfigError` for one that is called like a secret."""
        for file in files:
            refuse_secret(file.name, file, subject=setting)
        found = [(f"/{number:05}-{file.name}", file) for number, file in enumerate(files, start=1)]
        return cls(setting, pattern, f"prompts/{_digest(found)}-files", tuple(found))


def make_bundle(
    config: Path,
    overrides: list[str],
    *,
    folder: Path,
    max_bytes: int = MAX_BYTES,
    shared: Sequence[Path] = (),
) -> Bundle:
    """Make the bundle of a configuration in an empty or missing folder.

    Rows and templates that are files here are copied, and run.yaml names the copies. Model folders, run folder and
    label store become absolute paths, of which models must exist where the run will be; so do rows inside one of the
    `shared` folders, which every node sees at the same path. Equal inputs give an equal run.yaml, byte for byte: the
    same command resumes.

    Of a folder of rows, the files travel that can hold rows; `Bundle.left_out` names the others.

    Raises `ConfigError` for a wrong configuration, for links out of a folder of rows, and for a bundle over
    `max_bytes`, naming its largest files; nothing has been written then.
    """
    loaded = load_run(config, overrides).run
    paths = _Paths([named_path("--shared", path).resolve() for path in shared])
    run, locals_ = paths.rewritten(loaded), paths.sent
    code = [*own_code(), *plugin_code(loaded)]
    sources = [(f"{local.path}{name}", file) for local in locals_ for name, file in local.files]
    _refuse_large(code, locals_, max_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_run(run), encoding="utf-8")
    for file in code:
        _place(folder / "code" / file.path).write_bytes(file.content)
    for name, source in sources:
        shutil.copyfile(source, _place(folder / name))
    files = sorted((file.relative_to(folder).as_posix(), file.stat().st_size) for file in folder.rglob("*"))
    files = [(name, size) for name, size in files if (folder / name).is_file()]
    left_out = tuple(name for local in locals_ for name in local.left_out)
    return Bundle(
        folder, run, build_hash(), tuple(BundleFile(name, size) for name, size in files), left_out, paths.fetched
    )


def _place(file: Path) -> Path:
    """The path itself, its folder made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


class _Paths:
    """Rewrites the paths of a run to those of where it will be executed, and collects what has to be sent there."""

    def __init__(self, shared: Sequence[Path]) -> None:
        self._shared = shared
        self.sent: list[_Local] = []
        self._fetched: list[str] = []

    @property
    def fetched(self) -> tuple[str, ...]:
        """What rows are read by that does not travel, each once."""
        return tuple(dict.fromkeys(self._fetched))

    def rewritten(self, run: Run) -> Run:
        changes = {
            "folder": run_folder(run).expanduser().absolute(),
            "student": run.student.model_copy(update={"model": self._model("student.model.path", run.student.model)}),
            "teacher": run.teacher and self._teacher("teacher", run.teacher),
            "teachers": {name: self._teacher(f"teachers.{name}", one) for name, one in run.teachers.items()},
            "tasks": {name: self._task(name, one) for name, one in run.tasks.items()},
            "prompts": self._dataset("prompts", run.prompts),
            "data": run.data.model_copy(
                update={"evaluation": self._dataset("data.evaluation", run.data.evaluation)},
            ),
            "store": run.store and run.store.model_copy(update={"path": run.store.path.absolute()}),
        }
        return run.model_copy(update=changes)

    def _task(self, name: str, task: Task) -> Task:
        rows = {"prompts": task.prompts, "evaluation": task.evaluation}
        return task.model_copy(update={key: self._dataset(f"tasks.{name}.{key}", one) for key, one in rows.items()})

    def _dataset(self, setting: str, dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        if dataset.path is None:  # a fraction of the rows to train on
            return dataset
        paths = [self._rows(f"{setting}.path", path) for path in dataset.paths]
        return dataset.model_copy(update={"path": paths[0] if isinstance(dataset.path, str) else tuple(paths)})

    def _rows(self, setting: str, path: str) -> str:
        """Of a pattern, the files that it matches here are sent, in a folder and under names that sort as they do."""
        if is_url(path):
            self._fetched.append(path)
            return path
        if not is_pattern(path) and not Path(path).expanduser().exists() and not path.startswith("/"):
            self._fetched.append(path)
        files = [file.path for file in local_files(path)]
        if not files or Path(path).expanduser().exists():
            return self._file(setting, path)
        if all(self._is_shared(file) for file in files):
            return str(Path(path).expanduser().absolute())
        self.sent.append(_Local.of_pattern(setting, Path(path).expanduser(), files))
        return f"{self.sent[-1].path}/*"

    def _teacher(self, place: str, teacher: Teacher) -> Teacher:
        template = teacher.chat_template and self._file(f"{place}.chat_template", teacher.chat_template)
        model = self._model(f"{place}.model.path", teacher.model)
        return teacher.model_copy(update={"model": model, "chat_template": template})

    def _model(self, setting: str, source: ModelSource) -> ModelSource:
        """Weights are not sent: a folder here must exist there."""
        place = Path(source.path).expanduser()
        if not place.is_dir():
            _refuse_missing(setting, source.path)
            return source
        return source.model_copy(update={"path": str(place.absolute())})

    def _file(self, setting: str, path: str) -> str:
        """Of rows or a template, which are sent unless they lie in a shared folder."""
        source = Path(path).expanduser()
        if not source.exists():
            _refuse_missing(setting, path)
            return path  # a hub name, or a path of the nodes
        if self._is_shared(source):
            return str(source.absolute())
        self.sent.append(_Local.of(setting, source))
        return self.sent[-1].path

    def _is_shared(self, source: Path) -> bool:
        return any(source.resolve().is_relative_to(place) for place in self._shared)


def _refuse_missing(setting: str, path: str) -> None:
    """Raises `ConfigError` for a path that is relative to nothing: not here, and no name of a hub."""
    looks_local = path.startswith((".", "~")) or path.count("/") > 1 or path.endswith(FILE_SUFFIXES)
    if looks_local and not path.startswith("/"):
        raise ConfigError(
            f"{setting}: {path} does not exist (looked for {Path(path).expanduser().absolute()}); what lies on the "
            "nodes needs an absolute path"
        )


def _digest(files: Sequence[tuple[str, Path]]) -> str:
    """8 hexadecimal digits over names and contents."""
    digest = hashlib.sha256()
    for name, file in files:
        with file.open("rb") as content:
            digest.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()[:8]


def _refuse_large(code: list[CodeFile], locals_: list[_Local], max_bytes: int) -> None:
    sizes = [(len(file.content), f"code/{file.path}") for file in code]
    for local in locals_:
        sizes += [(file.stat().st_size, f"{file} ({local.setting})") for _, file in local.files]
    total = sum(size for size, _ in sizes)
    if total <= max_bytes:
        return
    largest = sorted(sizes, reverse=True)[:SHOWN_FILES]
    lines = [f"  {size / 2**20:10.1f} MiB  {name}" for size, name in largest]
    raise ConfigError(
        "\n".join(
            [
                f"the upload has {total / 2**20:.1f} MiB, more than the {max_bytes / 2**20:g} MiB allowed; largest:",
                *lines,
                "Put large files where every node sees them and name that place with --shared FOLDER (their paths are "
                "sent, not their bytes), use a hub dataset, or allow more with --max-upload MIB",
            ]
        )
    )
