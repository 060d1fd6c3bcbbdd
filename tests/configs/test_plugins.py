"""Plug-in parameters come from the source of the plug-in's class, which is never imported."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.plugins import ELICITATION, ENGINES, LABELS, Family, Plugin
from configs.signature import read_signature
from trainer.errors import ConfigError
from trainer.labels.encoding import load_encoding
from trainer.types import EncodingSpec

SOURCE = '''
from __future__ import annotations
import a_package_that_does_not_exist
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal
from pydantic import Field, PositiveInt

WIDTH = 7

@dataclass(frozen=True)
class Base:
    base: int = 1

@dataclass(frozen=True, slots=True)
class Encoding(Base):
    """A plug-in."""
    needs: ClassVar[Literal["logits", "hidden"]] = "logits"
    needs_writer: ClassVar[bool] = True
    count: PositiveInt
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    mode: Literal["fast", "exact"] = "fast"
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = field(default=())
    maybe: int | None = None
    text: "str" = "x"
    width: int = WIDTH
    table: dict[str, int] = field(default_factory=dict)
    negative: float = -1.5
    computed: int = len("abc")
    writers: Writers = None
    hidden: int = field(init=False, default=3)
    _own: int = 3
    plain = 4
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`my_house/labels.py` on the Python path; importing either file would fail."""
    folder = tmp_path / "my_house"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "labels.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_plugin_of_somebody_else_is_read_without_being_imported(package: Path) -> None:
    plugin = LABELS.validate({"kind": "my_house.labels", "count": 2, "pair": [3, 4]})
    assert plugin.parameters == {
        "base": 1,
        "count": 2,
        "share": 0.5,
        "mode": "fast",
        "pair": (3, 4.0),
        "many": (),
        "maybe": None,
        "text": "x",
        "width": 7,
        "table": {},
        "negative": -1.5,
    }
    assert "my_house" not in sys.modules


def test_a_default_that_only_running_the_file_would_tell_is_left_to_the_class(package: Path) -> None:
    assert "computed" not in LABELS.validate({"kind": "my_house.labels", "count": 2}).parameters
    assert LABELS.validate({"kind": "my_house.labels", "count": 2, "computed": 9}).parameters["computed"] == 9


@pytest.mark.parametrize(
    ("parameters", "place", "kind"),
    [
        ({}, "count", "missing"),
        ({"count": 0}, "count", "greater_than"),
        ({"count": "2"}, "count", "int_type"),
        ({"count": True}, "count", "int_type"),
        ({"count": 2, "share": 1.5}, "share", "less_than_equal"),
        ({"count": 2, "share": float("nan")}, "share", "finite_number"),
        ({"count": 2, "mode": "slow"}, "mode", "literal_error"),
        ({"count": 2, "pair": [1]}, "pair", "missing"),
        ({"count": 2, "many": [1]}, "many", "string_type"),
        ({"count": 2, "writers": 1}, "writers", "extra_forbidden"),
        ({"count": 2, "needs": "hidden"}, "needs", "extra_forbidden"),
        ({"count": 2, "hidden": 1}, "hidden", "extra_forbidden"),
        ({"count": 2, "_own": 1}, "_own", "extra_forbidden"),
        ({"count": 2, "plain": 1}, "plain", "extra_forbidden"),
    ],
)
def test_a_wrong_parameter_is_refused_at_its_name(
    package: Path, parameters: dict[str, object], place: str, kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        LABELS.validate({"kind": "my_house.labels", **parameters})
    assert [(error["loc"][0], error["type"]) for error in caught.value.errors()] == [(place, kind)]


def test_the_arguments_of_init_are_parameters_where_the_class_is_no_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "engine.py"
    file.write_text(
        "class Engine:\n"
        "    batch: int = 3\n"
        "    def __init__(self, plan: EnginePlan, size: int, name: str = 'x', *, share: float = 0.5) -> None: ...\n"
    )
    signature = read_signature(file, "Engine")
    assert signature.fill('{"size": 4}') == {"size": 4, "name": "x", "share": 0.5}


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("my_house.label", "no module 'my_house.label'"),
        ("my_house.labels.more", "is a module, not a package"),
        ("my_house.", "neither a kind nor a Python module"),
        ("../topk", "neither a kind nor a Python module"),
        ("my_house.broken", "line 1"),
        ("my_house.other", "defines no class Encoding"),
        ("math.pi", "is a module, not a package"),
        ("encoding", "unknown kind 'encoding'"),
        ("__init__", "unknown kind '__init__'"),
    ],
)
def test_a_kind_that_leads_nowhere_says_why(package: Path, kind: str, part: str) -> None:
    (package / "broken.py").write_text("class Encoding(:\n")
    (package / "other.py").write_text("x = 1\n")
    with pytest.raises(ValidationError) as caught:
        LABELS.validate({"kind": kind})
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [(ENGINES, {"vllm", "hf"}), (LABELS, {"topk", "dense", "hidden"}), (ELICITATION, {"feature", "labeling"})],
)
def test_the_kinds_of_a_family_are_its_files_that_define_its_class(family: Family, kinds: set[str]) -> None:
    assert kinds <= set(family.kinds())
    assert not {"__init__", "plan", "units", "encoding"} & set(family.kinds())
    for kind in family.kinds():
        plugin = family.validate(kind)
        assert family.validate(plugin.flat()) == plugin == family.validate(Plugin(kind))


def test_what_was_read_are_exactly_the_parameters_that_the_class_takes() -> None:
    for family in (ENGINES, LABELS, ELICITATION):
        for kind in family.kinds():
            taken = getattr(importlib.import_module(f"{family.package}.{kind}"), family.class_name)
            plugin = family.validate(kind)
            expected = {field.name: getattr(taken(), field.name) for field in dataclasses.fields(taken) if field.init}
            assert plugin.parameters == expected, (family, kind)


def test_loading_a_configuration_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "{name: x, student: {model: {path: a}}, teacher: {model: {path: b}},"
        " data: {train: {path: c}}, training: {steps: 1}}"
    )
    code = (
        f"import sys; from configs.load import load_run; load_run({str(file)!r});"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'datasets', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "text"), [("pair", "has no pair; "), ("temperature", "has no temperature; "), ("", None)]
)
def test_a_plug_in_without_a_member_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, text: str | None
) -> None:
    members = ["needs", "temperature", "layout", "make", "ready", "pair", "mass"]
    package = f"incomplete_{missing or 'not'}"
    (tmp_path / package).mkdir()
    body = "".join(f"    {member} = None\n" for member in members if member != missing)
    (tmp_path / package / "mine.py").write_text(f"class Encoding:\n{body}")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = EncodingSpec(kind=f"{package}.mine")
    if text is None:
        assert load_encoding(spec).pair is None
        return
    with pytest.raises(ConfigError, match=text):
        load_encoding(spec)
