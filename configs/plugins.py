"""Choosing a plug-in by `kind`: a file name of the family's folder, with the plug-in's own parameters beside it.

In YAML a plug-in is flat, `{kind: topk, k: 64}`, or just `topk`. A kind with a dot, `package.module`, is somebody
else's file. The file is found and read, never imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from configs.errors import ConfigError
from configs.refusal import did_you_mean, refusal
from configs.signature import Signature, defines_class, read_signature

ROOT = Path(__file__).resolve().parent.parent
DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A chosen plug-in. After validation `parameters` holds every parameter, defaults included."""

    kind: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """The form of YAML."""
        return {"kind": self.kind, **self.parameters}


@dataclass(frozen=True, slots=True)
class Family:
    """Plug-ins of one folder. Used as `Annotated[Plugin, LABELS]` it validates what the user chose; where only
    parameters are given they are those of the default kind."""

    package: str
    class_name: str
    default_kind: str

    def kinds(self) -> tuple[str, ...]:
        """The files of the folder that define the family's class."""
        folder = ROOT.joinpath(*self.package.split("."))
        return tuple(sorted(file.stem for file in folder.glob("*.py") if defines_class(file, self.class_name)))

    def validate(self, value: Any) -> Plugin:
        """A mapping, a bare kind or a `Plugin` -> the plug-in with all parameters. Raises `ValidationError`."""
        if isinstance(value, Plugin):
            value = value.flat()
        if isinstance(value, str):
            value, place = {"kind": value}, ()
        else:
            place = ("kind",)
        if not isinstance(value, dict):
            raise refusal((), value, f"must be a kind, such as {self.default_kind}, or a mapping with kind")
        kind = value.get("kind", self.default_kind)
        if not isinstance(kind, str):
            raise refusal(place, kind, f"needs a kind: one of {', '.join(self.kinds())}, or package.module")
        try:
            signature = self.signature(kind)
        except ValueError as error:
            raise refusal(place, kind, str(error)) from None
        given = {name: item for name, item in value.items() if name != "kind"}
        return Plugin(kind, signature.fill(json.dumps(given)))

    def signature(self, kind: str) -> Signature:
        """Raises `ValueError` with a message for the user where the kind does not exist or its file is broken."""
        if "." in kind:
            return read_signature(find_module(kind), self.class_name)
        if kind not in self.kinds():
            raise ValueError(
                f"unknown kind '{kind}'{did_you_mean(kind, self.kinds())} "
                f"(there are {', '.join(self.kinds())}; package.module names a file of yours)"
            )
        return read_signature(ROOT.joinpath(*self.package.split("."), f"{kind}.py"), self.class_name)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(Plugin.flat),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        forms: list[dict[str, Any]] = [{"type": "string", "description": f"A kind: {', '.join(self.kinds())}"}]
        for kind in self.kinds():
            form = self.signature(kind).model.model_json_schema()
            form["properties"] = {"kind": {"const": kind}, **form.get("properties", {})}
            if kind != self.default_kind:
                form["required"] = ["kind", *form.get("required", [])]
            forms.append({**form, "title": kind})
        return {"anyOf": forms}


ENGINES = Family("cluster.engines", "Engine", "vllm")
LABELS = Family("trainer.labels", "Encoding", "topk")
ELICITATION = Family("trainer.elicitation", "Strategy", "feature")


def refuse_incomplete(made: object, kind: str, *, members: Sequence[str], contract: str) -> None:
    """Raises `ConfigError` where an object of a plug-in's class lacks members; `contract` says where they are
    described."""
    if missing := [member for member in members if not hasattr(made, member)]:
        raise ConfigError(
            f"kind: {kind}: its class {type(made).__name__} has no {', '.join(missing)}; {contract} says what it needs"
        )


def find_module(name: str) -> Path:
    """The file of `package.module`, found level by level because `find_spec` would import the packages above it."""
    if not DOTTED_NAME.fullmatch(name):
        raise ValueError(f"'{name}' is neither a kind nor a Python module such as my_package.my_module")
    places, spec = None, None
    for part, seen in _prefixes(name):
        spec = importlib.machinery.PathFinder.find_spec(seen, places) if places else importlib.util.find_spec(part)
        if spec is None:
            raise ValueError(f"there is no module '{seen}' on the Python path (kind '{name}')")
        places = list(spec.submodule_search_locations or [])
        if not places and seen != name:
            raise ValueError(f"'{seen}' is a module, not a package (kind '{name}')")
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"'{name}' is no Python file")
    return Path(spec.origin)


def _prefixes(name: str) -> list[tuple[str, str]]:
    parts = name.split(".")
    return [(part, ".".join(parts[: i + 1])) for i, part in enumerate(parts)]
