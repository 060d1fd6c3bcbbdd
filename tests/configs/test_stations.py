"""Kinds of stations and their parameters: built in, or in a file of the user's, which is imported when it is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.answers import ANSWERS
from configs.engines import ENGINES
from configs.errors import ConfigError
from configs.labels import LABELS, NoLabels, Token, TopK
from configs.load import dump_run, load_run
from configs.losses import LOSSES
from configs.stations import Station

SOURCE = '''
from __future__ import annotations
from typing import Annotated, ClassVar, Literal
from pydantic import Field, PositiveInt
from configs.labels import Labels

WIDTH = 7

class Encoding(Labels):
    """A plug-in."""
    needs: ClassVar[Literal["logits", "hidden"]] = "logits"
    count: PositiveInt
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    mode: Literal["fast", "exact"] = "fast"
    pair_of: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = ()
    maybe: int | None = None
    width: int = WIDTH
    table: dict[str, int] = Field(default_factory=dict)
    computed: int = len("abc")
    _own: int = 3
'''

RUN = """\
name: x
student: {model: {path: a}}
teacher: {model: {path: b}}
prompts: {path: c}
training: {steps: 1}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A package on the Python path, of a name that no other test has imported."""
    folder = tmp_path / "house" / f"house_{abs(hash(request.node.nodeid))}"
    folder.mkdir(parents=True)
    (folder / "labels.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_a_class_of_a_users_brings_its_parameters(package: Path) -> None:
    chosen = LABELS.validate({"kind": f"{package.name}.labels", "count": 2, "pair_of": [3, 4]})
    assert chosen.flat() == {
        "kind": f"{package.name}.labels",
        "temperature": 1.0,
        "count": 2,
        "share": 0.5,
        "mode": "fast",
        "pair_of": [3, 4.0],
        "many": [],
        "maybe": None,
        "width": 7,
        "table": {},
        "computed": 3,
    }
    assert LABELS.validate(chosen.flat()) == chosen


@pytest.mark.parametrize("station", [LOSSES, LABELS], ids=lambda station: station.tag)
def test_words_of_papers_and_other_trainers_lead_to_a_kind(station: Station) -> None:
    for word, meant in station.other_words.items():
        assert meant in station.kinds()
        for written in (word, word.upper().replace("_", "-")):
            with pytest.raises(ValueError, match=f"unknown {station.tag} '{written}'; did you mean '{meant}'"):
                station.parameters_of(written)


def test_a_run_with_a_class_of_a_users_is_dumped_and_loaded(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN + f"labels: {{kind: {package.name}.labels, count: 3}}\n")
    run = load_run(file).run
    file.write_text(dump_run(run))
    assert load_run(file).run == run
    assert run.labels.count == 3


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
        ({"count": 2, "pair_of": [1]}, "pair_of", "missing"),
        ({"count": 2, "many": [1]}, "many", "string_type"),
        ({"count": 2, "needs": "hidden"}, "needs", "extra_forbidden"),
        ({"count": 2, "_own": 1}, "_own", "extra_forbidden"),
        ({"count": 2, "temperature": 0}, "temperature", "greater_than_equal"),
    ],
)
def test_a_wrong_parameter_is_refused_at_its_name(
    package: Path, parameters: dict[str, object], place: str, kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        LABELS.validate({"kind": f"{package.name}.labels", **parameters})
    assert [(error["loc"][0], error["type"]) for error in caught.value.errors()] == [(place, kind)]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("PACKAGE.label", "there is no module 'PACKAGE.label'"),
        ("PACKAGE.labels.more", "there is no module 'PACKAGE.labels.more'"),
        ("PACKAGE.", "neither a kind nor a Python module"),
        ("../topk", "neither a kind nor a Python module"),
        ("PACKAGE.broken", "broken.py, line 1"),
        ("PACKAGE.raising", "PACKAGE.raising fails when it is imported: RuntimeError: no GPU"),
        ("PACKAGE.leaving", "PACKAGE.leaving fails when it is imported: it calls sys.exit(7)"),
        ("PACKAGE.needing", "fails when it is imported: ModuleNotFoundError: No module named 'a_package_that"),
        ("PACKAGE.other", "defines no class Encoding"),
        ("PACKAGE.plain", "is no parameter class: derive it from configs.labels.Labels"),
        ("math.pi", "there is no module 'math.pi'"),
        ("encoding", "unknown kind 'encoding'"),
        ("topkk", "did you mean 'topk'?"),
        ("__init__", "unknown kind '__init__'"),
    ],
)
def test_a_kind_that_leads_nowhere_is_one_message_at_its_line(
    package: Path, tmp_path: Path, kind: str, part: str
) -> None:
    (package / "broken.py").write_text("class Encoding(:\n")
    (package / "raising.py").write_text("raise RuntimeError('no GPU')\n")
    (package / "leaving.py").write_text("raise SystemExit(7)\n")
    (package / "needing.py").write_text("import a_package_that_does_not_exist\n")
    (package / "other.py").write_text("x = 1\n")
    (package / "plain.py").write_text("class Encoding:\n    k: int = 1\n")
    file = tmp_path / "run.yaml"
    file.write_text(RUN + f"seed: -1\nlabels:\n  kind: {kind.replace('PACKAGE', package.name)}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(file)
    message = str(caught.value)
    assert f"{file}:8: labels.kind" in message
    assert part.replace("PACKAGE", package.name) in message
    assert "2 problems" in message, "the seed, too, is wrong"


@pytest.mark.parametrize("station", [ENGINES, LABELS, ANSWERS])
def test_the_code_of_every_kind_takes_exactly_the_parameters_of_its_class(station: Station) -> None:
    for parameters in station.built_in:
        if parameters in (NoLabels, Token):
            continue  # nothing is made
        chosen = station.validate(station.kind_of(parameters))
        assert station.validate(chosen.flat()) == chosen
        code = station.load(chosen)
        assert isinstance(code, parameters)
        assert dict(code) == dict(chosen)
        assert set(type(code).model_fields) == set(parameters.model_fields), "one place for a parameter"


def test_the_kind_is_the_default_one_where_only_parameters_are_given() -> None:
    assert LABELS.validate({"k": 8}) == TopK(k=8)
    with pytest.raises(ValidationError, match="needs a loss: one of forward_kl"):
        LOSSES.validate({"weight": 2.0})


def test_a_divergence_says_of_every_encoding_how_exact_it_is_and_what_to_use_where_it_is_refused() -> None:
    kinds = {LABELS.kind_of(one) for one in LABELS.built_in} - {"none"}
    divergences = [one for one in LOSSES.built_in if "labels" in one.needs]
    assert {"forward_kl", "reverse_kl", "jsd", "dkd"} <= {LOSSES.kind_of(one) for one in divergences}
    for one in divergences:
        assert set(one.exactness) == kinds
        assert ("refused" in one.exactness.values()) <= ("write labels:" in one.instead)


def test_loading_a_configuration_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    code = (
        f"import sys; from configs.load import load_run; load_run({str(file)!r});"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'datasets', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("missing", "text"), [("align", "has no align; "), ("layout", "has no layout; "), ("", None)])
def test_a_class_without_a_member_is_refused_by_name(package: Path, missing: str, text: str | None) -> None:
    members = ["needs", "layout", "encode", "prepare", "align", "mass"]
    body = "".join(f"    def {member}(self): ...\n" for member in members if member != missing)
    (package / "mine.py").write_text(f"from configs.labels import Labels\nclass Encoding(Labels):\n{body}")
    chosen = LABELS.validate(f"{package.name}.mine")
    if text is None:
        assert LABELS.load(chosen) is chosen
        return
    with pytest.raises(ConfigError, match=text):
        LABELS.load(chosen)
