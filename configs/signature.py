"""The parameters of a plug-in, read from the source of its class without importing it.

A file of its own because it is the reason why checking a configuration needs neither torch nor vLLM: `ast` finds the
class, its annotated parameters become a pydantic model, and that model judges what the user wrote.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

PLAIN_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path, "None": None}
CONSTRAINED_TYPES = frozenset(
    {"PositiveInt", "NonNegativeInt", "PositiveFloat", "NonNegativeFloat", "NegativeInt", "NegativeFloat"}
)
BOUNDS = {"Gt": "gt", "Ge": "ge", "Lt": "lt", "Le": "le"}
CONTAINERS = {"tuple": tuple, "list": list, "dict": dict, "Sequence": list, "Mapping": dict}


class NotConfigurable(Exception):
    """A type that YAML cannot hold: the program supplies this argument, the configuration does not."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a plug-in's class takes from the configuration."""

    model: type[pydantic.BaseModel]
    constants: Mapping[str, Any]  # class variables with literal values, such as needs_writer
    unreadable_defaults: frozenset[str]
    """Optional parameters whose default is computed; where the user gives none, the class fills it."""

    def fill(self, parameters_json: str) -> dict[str, Any]:
        """The parameters with their defaults. Raises `pydantic.ValidationError`; no type is converted silently."""
        filled = self.model.model_validate_json(parameters_json, strict=True)
        left_out = self.unreadable_defaults - filled.model_fields_set
        return {name: value for name, value in filled.model_dump().items() if name not in left_out}


def defines_class(file: Path, class_name: str) -> bool:
    """Whether the file defines that class at its top level; a Protocol of that name only describes it."""
    found = _find_class(_parse(file.read_bytes(), file), class_name)
    return found is not None and not any(_name(base) == "Protocol" for base in found.bases)


def read_signature(file: Path, class_name: str) -> Signature:
    """The signature of a top-level class.

    Parameters are a dataclass' annotated fields (those of bases in the same file first), else the annotated arguments
    of `__init__`. Not parameters: ClassVar, `field(init=False)`, a leading underscore, and types YAML cannot hold.
    Raises `ValueError` where the file has no such class or is no Python.
    """
    return _signature_of(file.read_bytes(), file, class_name)


@functools.lru_cache(maxsize=32)
def _signature_of(source: bytes, file: Path, class_name: str) -> Signature:
    """Pure, and kept because a configuration with its defaults asks for the same few files many times."""
    module = _parse(source, file)
    found = _find_class(module, class_name)
    if found is None:
        raise ValueError(f"{file} defines no class {class_name}")
    constants = _literals(module.body)
    fields: dict[str, Any] = {}
    unreadable = set()
    for name, annotation, default in _parameters(module, found):
        try:
            kind = _type(annotation)
        except NotConfigurable:
            fields.pop(name, None)
            continue
        if default is None:
            fields[name] = (kind, ...)
            continue
        try:
            fields[name] = (kind, _default(default, constants))
        except ValueError:
            fields[name] = (kind, None)
            unreadable.add(name)
    settings = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    model = pydantic.create_model(class_name, __config__=settings, **fields)
    return Signature(model, _literals(found.body), frozenset(unreadable))


@functools.lru_cache(maxsize=32)
def _parse(source: bytes, file: Path) -> ast.Module:
    try:
        return ast.parse(source, filename=str(file))
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from error


def _find_class(module: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _parameters(module: ast.Module, found: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """(name, annotation, default or None) in order."""
    if not any(_name(getattr(d, "func", d)) == "dataclass" for d in found.decorator_list):
        yield from _init_arguments(found)
        return
    for base in found.bases:
        parent = _find_class(module, _name(base))
        if parent is not None:
            yield from _parameters(module, parent)
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if not node.target.id.startswith("_") and not _is_class_variable(node.annotation) and _is_init(node.value):
            yield node.target.id, node.annotation, node.value


def _init_arguments(found: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            plain, keyword = node.args.args[1:], node.args.kwonlyargs
            missing: list[ast.expr | None] = [None] * (len(plain) - len(node.args.defaults))
            defaults = [*missing, *node.args.defaults][-len(plain) :] if plain else []
            for argument, default in zip(plain + keyword, defaults + node.args.kw_defaults, strict=True):
                if argument.annotation is not None:
                    yield argument.arg, argument.annotation, default


def _name(node: ast.expr) -> str:
    """`Literal` of `Literal`, `typing.Literal` and `Literal[...]`."""
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_class_variable(annotation: ast.expr) -> bool:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return "ClassVar" in annotation.value
    return _name(annotation) == "ClassVar"


def _is_init(default: ast.expr | None) -> bool:
    if not isinstance(default, ast.Call) or _name(default.func) != "field":
        return True
    return not any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and not k.value.value for k in default.keywords
    )


def _type(node: ast.expr) -> Any:
    """The type an annotation names, from a closed list: nothing of the plug-in is executed."""
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([node.left, node.right])
    name = _name(node)
    if isinstance(node, ast.Subscript):
        return _generic(name, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])
    if name in PLAIN_TYPES:
        return PLAIN_TYPES[name]
    if name in CONSTRAINED_TYPES:
        return getattr(pydantic, name)
    if name in CONTAINERS:
        return CONTAINERS[name]
    raise NotConfigurable


def _generic(name: str, arguments: list[ast.expr]) -> Any:
    if name == "Literal":
        return Literal[tuple(ast.literal_eval(a) for a in arguments)]
    if name == "Optional":
        return _type(arguments[0]) | None
    if name == "Union":
        return _union(arguments)
    if name == "Annotated":
        return Annotated[_type(arguments[0]), pydantic.Field(**_constraints(arguments[1:]))]
    if name in CONTAINERS:
        ellipsis = [isinstance(a, ast.Constant) and a.value is ... for a in arguments]
        items = tuple(... if dots else _type(a) for a, dots in zip(arguments, ellipsis, strict=True))
        return CONTAINERS[name][items if len(items) > 1 or name == "tuple" else items[0]]
    raise NotConfigurable


def _union(members: list[ast.expr]) -> Any:
    return functools.reduce(operator.or_, [_type(m) for m in members])


def _constraints(metadata: list[ast.expr]) -> dict[str, Any]:
    """The literal keywords of `Field(...)` and of `Gt(0)` and its kin; anything else stays the plug-in's own affair."""
    found: dict[str, Any] = {}
    for node in metadata:
        if isinstance(node, ast.Call) and _name(node.func) == "Field":
            found.update({k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg and _is_literal(k.value)})
        elif isinstance(node, ast.Call) and _name(node.func) in BOUNDS and node.args:
            found[BOUNDS[_name(node.func)]] = ast.literal_eval(node.args[0])
    return found


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _default(node: ast.expr, constants: dict[str, Any]) -> Any:
    """The value of a default. Raises `ValueError` where only running the file would tell."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Call) and _name(node.func) == "field":
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default" in given:
            return _default(given["default"], constants)
        factory = given.get("default_factory")
        if factory is not None and _name(factory) in ("tuple", "list", "dict"):
            return CONTAINERS[_name(factory)]()
        if isinstance(factory, ast.Lambda):
            return ast.literal_eval(factory.body)
        raise ValueError("a default that only the class can make")
    return ast.literal_eval(node)


def _literals(body: list[ast.stmt]) -> dict[str, Any]:
    """Names that a module or class body sets to literal values."""
    found = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_literal(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({t.id: ast.literal_eval(node.value) for t in targets if isinstance(t, ast.Name)})
    return found
