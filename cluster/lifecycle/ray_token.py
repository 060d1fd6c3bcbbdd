"""Ray's token: where it lies, who may read it, and what a cluster without one means. A file beside `runtime.py`, which
starts and joins clusters, because `stillhouse doctor` asks the same questions without doing either.

Ray listens on every interface of a machine. Whoever reaches it and needs no token runs code as the user of the run.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from configs.paths import named_path
from trainer.errors import ConfigError

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
OWN_FILE = "ray_token"  # below this user's cache folder

WITHOUT_TOKEN = (
    "the Ray cluster asks for no token: whoever reaches its ports runs code as the user of its nodes. Stop it, set "
    f"{MODE}=token and {TOKEN_PATH} (one file with mode 0600, the same text on every node) before `ray start`, and here"
)


def uses_token(environment: Mapping[str, str]) -> bool:
    """Whether Ray in a process with this environment shows a token. Unset, Ray decides by whether it finds its file."""
    mode = environment.get(MODE, "").lower()
    return mode == "token" or (not mode and _default_file().exists())


def named_token_file(environment: Mapping[str, str]) -> Path | None:
    """The file Ray will read its token from; None where the token itself is in the environment, or none is used."""
    if not uses_token(environment) or environment.get(TOKEN):
        return None
    named = environment.get(TOKEN_PATH)
    return named_path(TOKEN_PATH, named) if named else _default_file()


def refuse_open_token(path: Path) -> None:
    """Raises `ConfigError` where others than the owner may read or write the file; says how to close it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"Ray's token file {path} cannot be read ({error.strerror}): copy it from a node of the cluster, and "
            f"chmod 600 {path}"
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"Ray's token file {path} has mode {mode:04o}, so others may read it: chmod 600 {path}, and "
            "take a new token where somebody may have"
        )


def own_token_file(folder: Path) -> Path:
    """This user's token for clusters started here, below their cache folder; made once, readable by nobody else."""
    path = folder / OWN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(draft, path)  # whoever is first wins, and nobody reads half a token
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
    return path


def _default_file() -> Path:
    """Where Ray looks by itself."""
    return Path.home() / ".ray" / "auth_token"
