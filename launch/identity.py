"""Whether `trainer`, `cluster`, `launch` and `configs` are this installation's own.

The four names are common words. Where another folder of that name comes first on the Python path, nothing after this
check would do what it says; so it runs before any of the four is imported, and itself imports none of them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "trainer", "cluster", "launch")
EXIT_CODE = 2  # of ConfigError, which cannot be imported before this check has passed


def refuse_foreign_packages() -> None:
    """Raises `SystemExit` after saying which folder comes first and what to do."""
    problem = foreign_packages()
    if problem is not None:
        print(problem, file=sys.stderr)
        raise SystemExit(EXIT_CODE)


def foreign_packages() -> str | None:
    """The message for the user, or None where all four packages lie in this installation."""
    for name in PACKAGES:
        found = _folder(name)
        own = HOME / name
        if found is None:
            return f"error: the package '{name}' is missing beside {HOME / 'launch'}; install stillhouse again"
        if found != own:
            return (
                f"error: Python finds another package named '{name}': {found} comes before {own}.\n"
                f"  Start stillhouse from a folder that holds no '{name}', take {found.parent} out of PYTHONPATH, or\n"
                f"  uninstall the package that put it there (a virtual environment with stillhouse alone is safest)."
            )
    return None


def _folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
