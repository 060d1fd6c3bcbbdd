"""The layers, kept by a test: imports go launch -> cluster -> trainer -> configs, and heavy packages stay in place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPTH = 12
"""Files in the longest chain of imports: what a reader may have to follow from a command to its last fact."""

LAYERS = ("configs", "trainer", "cluster", "launch")  # each may import itself and what stands before it
ALLOWED = {
    "ray": ("cluster/", "launch/"),
    "vllm": ("cluster/", "launch/"),
    "deepspeed": ("trainer/model/zero.py",),
    "torch": ("trainer/", "cluster/", "launch/"),
}
DEVICE_FILE = "cluster/runtime.py:"
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def wrong_imports(name: str, source: str) -> list[str]:
    """`file:line: import` for each import that `name` may not have."""
    own, wrong = LAYERS.index(name.split("/")[0]), []
    for line, module in imports(source):
        top = module.split(".")[0]
        upward = top in LAYERS and LAYERS.index(top) > own
        misplaced = top in ALLOWED and not name.startswith(ALLOWED[top])
        if upward or misplaced or module.startswith("."):
            wrong.append(f"{name}:{line}: {module}")
    return wrong


def kinds_of_gpu(name: str, source: str) -> list[str]:
    """`file:line` of each "cuda", "cuda:0" or `.cuda()`: one kind of GPU among several. "cpu" is host memory
    everywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        if called or text == "cuda" or text.startswith("cuda:"):
            found.add(node.lineno)
    return [f"{name}:{line}" for line in sorted(found)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(file: Path) -> None:
    assert wrong_imports(file.relative_to(ROOT).as_posix(), file.read_text()) == []


def test_a_kind_of_gpu_is_named_in_one_file_only() -> None:
    files = [file for file in FILES if file.relative_to(ROOT).parts[0] in ("trainer", "cluster")]
    found = [hit for file in files for hit in kinds_of_gpu(file.relative_to(ROOT).as_posix(), file.read_text())]
    assert [hit for hit in found if not hit.startswith(DEVICE_FILE)] == []


def test_the_checks_find_what_they_are_for() -> None:
    upward = "def f():\n    from cluster.runtime import y"
    assert wrong_imports("trainer/x.py", upward) == ["trainer/x.py:2: cluster.runtime"]
    assert wrong_imports("trainer/x.py", "import deepspeed.comm") == ["trainer/x.py:1: deepspeed.comm"]
    assert wrong_imports("trainer/model/zero.py", "import deepspeed.comm") == []
    assert wrong_imports("configs/x.py", "import torch, json") == ["configs/x.py:1: torch"]
    assert kinds_of_gpu("x", 'a.cuda()\nb.to("cuda:0")\nc = "cpu"\nd = "cuda"') == ["x:1", "x:2", "x:4"]


def longest_chain(sources: Mapping[str, str]) -> list[str]:
    """The longest chain of modules of which each imports the next when it is imported itself: imports inside functions
    and under TYPE_CHECKING do not count."""
    below = {name: set(imported(source, sources)) - {name} for name, source in sources.items()}

    @cache
    def chain(name: str) -> list[str]:
        return [name, *max(map(chain, below[name]), key=len, default=[])]

    return max((chain(name) for name in below), key=len)


def imported(source: str, modules: Collection[str]) -> Iterator[str]:
    """Those of the modules that are imported together with this source; of `from p import m` the module p.m, or p."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in within]
        else:
            continue
        yield from (name for name in names if name in modules)


def test_no_chain_of_imports_is_longer_than_a_reader_can_follow() -> None:
    sources = {}
    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text()
    chain = longest_chain(sources)
    assert len(chain) <= DEPTH, " > ".join(chain)


def test_the_longest_chain_is_found() -> None:
    lazy = "def f():\n    import c\nif TYPE_CHECKING:\n    import c"
    assert longest_chain({"a": "from p import b", "p": "", "p.b": "import c, os", "c": ""}) == ["a", "p.b", "c"]
    assert longest_chain({"a": "import b", "b": lazy, "c": ""}) == ["a", "b"]


def test_importing_the_configuration_brings_neither_torch_nor_ray() -> None:
    code = "import sys, configs.load; print(sorted({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
