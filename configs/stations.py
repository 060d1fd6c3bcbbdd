"""A choice between kinds, each with its own parameters: a tagged union of pydantic classes.

In YAML a choice is flat, `{kind: topk, k: 64}`, or just `topk`. The built-in kinds are classes of `configs/`, free of
torch; the code behind a kind is a class of the same parameters in a file named as the kind. `kind: package.module`
names a file of the user's: it is imported when it is named, and its class is itself the class of its parameters.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from configs.errors import ConfigError, foreign_errors
from configs.refusal import did_you_mean, refusal
from configs.section import Section

DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Choice(Section):
    """Base of the parameter classes of all kinds."""

    kind: str

    def flat(self) -> dict[str, Any]:
        """The form of YAML and of label headers: plain values, the kind among them."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, eq=False)
class Station:
    """The kinds of one station; used as `Annotated[Base, STATION]` it validates what a user wrote there."""

    base: type[Section]
    built_in: tuple[type[Section], ...]
    package: str = ""  # holds the code of the built-in kinds, a file each; "": they have none
    class_name: str = ""  # of the class in each file, one of a user's too
    tag: str = "kind"
    default: str | None = None  # the kind where only parameters are given
    members: tuple[str, ...] = ()  # what the class in each file must have
    contract: str = ""  # the file that describes them
    formerly: Mapping[str, str] = field(default_factory=dict)  # kinds of older versions, and what they are now
    refused: Mapping[str, str] = field(default_factory=dict)  # what looks like a kind, and why it is none
    other_words: Mapping[str, str] = field(default_factory=dict)  # of papers and other trainers, and what is meant

    def kinds(self) -> tuple[str, ...]:
        return tuple(self.kind_of(one) for one in self.built_in)

    def kind_of(self, parameters: Section | type[Section]) -> str:
        """The tag of an instance, or the one that a built-in class stands for."""
        if isinstance(parameters, type):
            return str(parameters.model_fields[self.tag].default)
        return str(getattr(parameters, self.tag))

    def parameters_of(self, kind: Any) -> type[Section]:
        """The class of a kind's parameters. Raises `ValueError` with a message for the user."""
        if not isinstance(kind, str):
            raise ValueError(f"needs a {self.tag}: {self._allowed()}")
        for one in self.built_in:
            if self.kind_of(one) == kind:
                return one
        if "." in kind:
            return self._foreign(kind)
        if kind in self.formerly:
            raise ValueError(f"the {self.tag} {kind} is now called {self.formerly[kind]}; write {self.formerly[kind]}")
        if kind in self.refused:
            raise ValueError(self.refused[kind])
        meant = self.other_words.get(kind.lower().replace("-", "_"))
        hint = f"; did you mean '{meant}'?" if meant else did_you_mean(kind, self.kinds())
        raise ValueError(f"unknown {self.tag} '{kind}'{hint} ({self._allowed()})")

    def validate(self, value: Any) -> Section:
        """A mapping, a bare kind or parameters -> parameters. Raises `ValidationError`."""
        if isinstance(value, (self.base, *self.built_in)):
            return value
        place: tuple[str, ...] = (self.tag,)
        if isinstance(value, str):
            value, place = {self.tag: value}, ()
        if not isinstance(value, dict):
            example = self.default or self.kinds()[0]
            raise refusal((), value, f"must be a {self.tag}, such as {example}, or a mapping with {self.tag}")
        kind = value.get(self.tag, self.default)
        try:
            found = self.parameters_of(kind)
        except ValueError as error:
            raise refusal(place, kind, str(error)) from None
        return found.model_validate_json(json.dumps({**value, self.tag: kind}), strict=True)

    def load(self, parameters: Any) -> Any:
        """The object behind a kind, of the class in its file. Imports that file, with all that it imports; raises
        `ConfigError` where the class of a file of the user's lacks a member."""
        kind = self.kind_of(parameters)
        module = importlib.import_module(kind if "." in kind else f"{self.package}.{kind}")
        found = getattr(module, self.class_name)
        made = parameters if isinstance(parameters, found) else found(**dict(parameters))
        if missing := [member for member in self.members if not hasattr(made, member)]:
            lacks = f"its class {self.class_name} has no {', '.join(missing)}"
            raise ConfigError(f"{self.tag}: {kind}: {lacks}; {self.contract} says what it needs")
        return made

    def _allowed(self) -> str:
        return f"one of {', '.join(self.kinds())}, or package.module for a file of yours"

    def _foreign(self, kind: str) -> type[Section]:
        module = import_plugin(kind)
        found = getattr(module, self.class_name, None)
        if found is None:
            raise ValueError(f"{module.__file__} defines no class {self.class_name}")
        if not (isinstance(found, type) and issubclass(found, self.base)):
            base = f"{self.base.__module__}.{self.base.__name__}"
            raise ValueError(
                f"the class {self.class_name} in {module.__file__} is no parameter class: derive it from {base}, and "
                "declare its parameters as fields of pydantic"
            )
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda one: one.model_dump(mode="json")),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        forms: list[dict[str, Any]] = [{"enum": list(self.kinds())}]
        for one in self.built_in:
            form, kind = one.model_json_schema(), self.kind_of(one)
            if kind != self.default:
                form["required"] = [self.tag, *form.get("required", [])]
            forms.append({**form, "title": kind})
        foreign = {
            "type": "string",
            "pattern": f"^{DOTTED_NAME.pattern}$",
            "description": "A Python module of yours.",
        }
        mapping = {"type": "object", "properties": {self.tag: foreign}, "required": [self.tag]}
        return {"anyOf": [*forms, foreign, {**mapping, "title": "package.module"}]}


def import_plugin(name: str) -> ModuleType:
    """The module `package.module`. Raises `ValueError` with a message for the user where there is none, or where it
    fails while it is imported."""
    if not DOTTED_NAME.fullmatch(name):
        raise ValueError(f"'{name}' is neither a kind nor a Python module such as my_package.my_module")
    try:
        with foreign_errors(f"the module {name} fails when it is imported"):
            return importlib.import_module(name)
    except SystemExit as left:
        raise ValueError(f"the module {name} fails when it is imported: it calls sys.exit({left.code!r})") from None
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise ValueError(f"there is no module '{cause.name}' on the Python path (kind '{name}')") from None
        raise ValueError(str(error)) from None
