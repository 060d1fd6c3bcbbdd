"""Prints what pip is told on this machine (environment, pip.conf) in uv's words, as `export` lines for a shell.

uv reads neither: behind a proxy with a certificate of its own, or with a mirror in pip.conf, pip would install and uv
would not. A variable of uv's own that is set already stays. Needs nothing but pip.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys

WORDS = {
    "cert": ("SSL_CERT_FILE",),
    "proxy": ("HTTPS_PROXY", "HTTP_PROXY"),
    "trusted-host": ("UV_INSECURE_HOST",),
    "index-url": ("UV_DEFAULT_INDEX",),
    "extra-index-url": ("UV_INDEX",),
    "find-links": ("UV_FIND_LINKS",),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
}
SECTIONS = ("global", "install", ":env:")
"""Later ones count more, as with pip."""


def told(listing: str) -> dict[str, str]:
    """Settings of `pip config list` (lines of `section.name='value'`) by name."""
    found: dict[str, str] = {}
    for section in SECTIONS:
        for line in listing.splitlines():
            place, equals, value = line.partition("=")
            if equals and place.startswith(f"{section}."):
                found[place.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


def exports(settings: dict[str, str], environment: dict[str, str]) -> dict[str, str]:
    """The variables that uv needs and does not have."""
    values: dict[str, str] = {}
    for name, variables in WORDS.items():
        parts = settings.get(name, "").split()
        if name == "extra-index-url":  # pip passes over folders that lack a package, uv does not
            parts = [part for part in parts if not part.startswith("file:")]
        if parts:
            text = (",".join if name == "find-links" else " ".join)(parts)
            values |= {variable: text for variable in variables if variable not in environment}
    if "UV_INDEX" in values:
        values["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best of all indexes
    return values


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, value in exports(told(listing), dict(os.environ)).items():
        print(f"export {name}={shlex.quote(value)}")
