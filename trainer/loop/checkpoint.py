"""Checkpoints that are complete and verified, or do not exist.

    begin: checkpoints/.step_000120.tmp-<id>/  ->  ranks write and fsync  ->  commit: MANIFEST.json with size and hash
    of every file, fsync, rename to step_000120, fsync of the parent  ->  only then older ones are removed

The truth is the newest folder whose manifest verifies; there is no pointer file that could disagree with it. A ZeRO
checkpoint is a pickle, so only files that lie in the run folder itself, and that its manifest lists, are ever loaded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError
from trainer.loop.manifest import MANIFEST, Damaged, Manifest, TrainingState, check_files, read_manifest, write_manifest

_Stamps = dict[str, tuple[int, int, int]]
_FOLDER = re.compile(r"step_([0-9]{6,})")


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint whose manifest is what was written and whose files have the sizes and hashes it lists."""

    folder: Path
    state: TrainingState


class Checkpoints:
    """The `checkpoints/` folder of one run; the caller holds the run folder's lock."""

    def __init__(self, folder: Path, *, keep: int, note: Callable[[str], None] = lambda text: None) -> None:
        self._folder = folder
        self._keep = keep
        self._note = note
        self._newest: Path | None = None  # that was committed or found here
        self._verified: dict[Path, _Stamps] = {}  # hashed here, and what their files looked like then

    def begin(self, step: int) -> Path:
        """An empty temporary folder for the shards of a step. Leftovers of killed attempts are removed first.

        Raises OSError where the disk has no room for as much as the newest checkpoint: a rank that finds that out while
        it writes costs the whole group.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        needed, free = self._newest_bytes(), shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"the last checkpoint has {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            )
        temporary = self._folder / f".step_{step:06d}.tmp-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, state: TrainingState) -> Path:
        """Make the shards in `temporary` the checkpoint of `state.step`, then apply retention. Returns its folder."""
        write_manifest(temporary, state)
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            _fsync_folder(folder)
        target = self._folder / f"step_{state.step:06d}"
        if target.exists():  # the same step trained again after a damaged checkpoint was skipped
            shutil.rmtree(target)
        os.rename(temporary, target)
        _fsync_folder(self._folder)
        self._newest, self._verified[target] = target, _stamps(target)
        self._retain(state)
        return target

    def discard(self, temporary: Path) -> None:
        """Remove the leftovers of a failed save."""
        shutil.rmtree(temporary, ignore_errors=True)

    def sweep(self) -> None:
        """Remove temporary folders: whoever wrote them is gone, since the run's lock is ours."""
        for path in self._folder.glob(".step_*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def latest(self, *, config_hash: str) -> Committed | None:
        """The newest checkpoint that verifies. Damaged ones are skipped with a note naming the file.

        Raises ConfigError if the newest valid one was made by another configuration, or one leads out of the folder.
        """
        for step, folder in sorted(self._steps(), reverse=True):
            try:
                committed = verified(folder, step=step)
            except Damaged as problem:
                self._note(f"checkpoint of step {step} is damaged and skipped: {problem}")
                continue
            if committed.state.config_hash != config_hash:
                raise ConfigError(
                    f"{folder} was made with another configuration (hash {committed.state.config_hash}, this one is "
                    f"{config_hash}); give the run another name or folder, or remove the folder to start afresh"
                )
            self._newest, self._verified[folder] = folder, _stamps(folder)
            return committed
        return None

    def peek(self) -> TrainingState | None:
        """The state in the newest manifest that is whole; the files beside it, which may be large, are not read.
        Manifests that are not are skipped with the same note as `latest` makes."""
        for step, folder in sorted(self._steps(), reverse=True):
            try:
                state = read_manifest(folder).state
                if state.step != step:
                    raise Damaged(f"{folder} was written as the checkpoint of step {state.step}")
            except Damaged as problem:
                self._note(f"checkpoint of step {step} is damaged and skipped: {problem}")
                continue
            return state
        return None

    def _steps(self) -> list[tuple[int, Path]]:
        if not self._folder.is_dir():
            return []
        for path in (self._folder, *self._folder.iterdir()):
            if path.is_symlink():
                raise ConfigError(
                    f"{path} is a link: checkpoints are loaded from the run folder alone; move there what it points "
                    "to, or give the run another folder"
                )
        found = ((_FOLDER.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [(int(match.group(1)), path) for match, path in found if match and path.is_dir()]

    def _newest_bytes(self) -> int:
        return sum(size for size, *_ in _stamps(self._newest).values()) if self._newest else 0

    def _retain(self, newest: TrainingState) -> None:
        """Keep what was just committed and the newest ones before it that verify, `keep` in all, and remove what is
        older. Damaged and foreign folders do not count; those of later steps are left alone."""
        kept = 0
        for step, folder in sorted(self._steps(), reverse=True):
            if step > newest.step:
                continue
            if kept < self._keep:
                kept += step == newest.step or self._is_of_use(folder, step=step, config_hash=newest.config_hash)
                continue
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self._note(f"the old checkpoint of step {step} could not be removed: {error}")

    def _is_of_use(self, folder: Path, *, step: int, config_hash: str) -> bool:
        """Whether the run could go on from an older checkpoint. Files are hashed again only if they were touched."""
        stamps = _stamps(folder)
        if self._verified.get(folder) == stamps:
            return True
        try:
            committed = verified(folder, step=step)
        except (Damaged, ConfigError):
            return False
        if committed.state.config_hash != config_hash:
            return False
        self._verified[folder] = stamps
        return True


def _stamps(folder: Path) -> _Stamps:
    """Size, time of the last change and inode of every file: equal as long as nobody wrote into the folder."""
    stamps = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # what NFS keeps of a removed file goes at some time
            found = path.lstat()
            stamps[str(path.relative_to(folder))] = (found.st_size, found.st_mtime_ns, found.st_ino)
    return stamps


def verified(folder: Path, *, step: int) -> Committed:
    """The checkpoint in a folder that is named after a step. Raises `Damaged` where anything is not as it was written;
    ConfigError where it was not written by a run."""
    manifest = read_manifest(folder)
    if manifest.state.step != step:
        raise Damaged(f"{folder} was written as the checkpoint of step {manifest.state.step}")
    _refuse_foreign_files(folder, manifest)
    check_files(folder, manifest)
    return Committed(folder=folder, state=manifest.state)


def _refuse_foreign_files(folder: Path, manifest: Manifest) -> None:
    """Raises ConfigError where a checkpoint holds or names what no run writes: links, files that its manifest does not
    list, paths that lead out of it."""
    advice = "it was not written by a run: remove the folder, or give the run another one"
    for name in sorted(manifest.files):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{folder / MANIFEST} names {name!r}, which lies outside of the checkpoint; {advice}")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to {os.readlink(path)}; {advice}")
        # NFS keeps a removed file that is still open under such a name
        if path.is_file() and name not in {*manifest.files, MANIFEST} and not path.name.startswith(".nfs"):
            raise ConfigError(f"{path} is not listed in {MANIFEST}; {advice}")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
