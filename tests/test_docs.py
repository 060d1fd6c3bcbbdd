"""The documents: every command in them is run by a test, or says that it is not.

The convention, for README.md, CONTRIBUTING.md and docs/*.md: commands stand in ```console blocks, each after `$ `.
A block under a line `<!-- not run here: WHY -->` is run by nobody. Any other command is either run below (dry runs and
what only looks at a configuration), or stands in `BY_TEST` with the test that runs the like of it.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from doc_blocks import Block, blocks_of
from ruamel.yaml import YAML
from typer.testing import CliRunner

from cluster.placement.roles import roles_of
from cluster.runtime import GPU
from configs.load import load_run, load_section
from launch.check.places import devices_text
from launch.cli import app
from launch.targets import KINDS, load_target
from trainer.losses.terms import function_of
from trainer.types import PairedLogProbs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"console", "yaml", "json", "bash", "python", ""}

AFTER = "tests/test_after_training.py::test_the_python_of_the_page_runs_and_both_ways_to_ask_agree"
SERVED = "tests/test_after_training.py::test_the_server_of_the_page_answers_as_transformers_does_and_only_with_the_key"
RUNS = "tests/e2e/test_runs.py::test_a_run_leaves_a_student_that_learned_a_report_and_no_process"
STORED = "tests/e2e/test_label_store.py::test_labels_are_made_without_a_student_and_then_trained_without_a_teacher"
LOCAL = "tests/launch/test_submit.py::test_a_job_outlives_its_submission_and_saves_when_it_is_stopped"
CLUSTER = (
    "tests/launch/test_submit_stack.py::test_a_cluster_without_stillhouse_runs_what_was_submitted_and_gives_it_back"
)
SLURM = "tests/hosts/test_slurm.py::test_a_job_that_succeeds_is_completed_and_leaves_nothing"
SLURM_VERBS = "tests/launch/test_targets_slurm.py::test_a_submitted_job_is_followed_and_stopped"

BY_TEST = {
    r"make demo": "tests/e2e/test_vllm_runs.py::test_the_demo_learns_in_a_handful_of_steps_and_vllm_loads_its_student",
    r"make demo-quick": "tests/e2e/test_vllm_runs.py::test_the_quick_demo_learns_with_one_engine",
    r"make test": "tests/test_house.py::test_ci_runs_the_test_command_of_the_readme",
    r"stillhouse check my-run.yaml --rows \d( --from \d+ --tokens)?": "tests/launch/test_shown_rows.py::"
    "test_the_command_check_prints_the_rows_before_its_verdict",
    r"stillhouse check \S+": "tests/launch/test_check.py::test_a_run_that_may_start_is_ready_and_leaves_no_trace",
    r"stillhouse train my-run.yaml( --set training.depth=0)?": RUNS,
    r"stillhouse export runs/my-run models/my-student": "tests/launch/test_export.py::"
    "test_a_whole_student_is_exported_with_tokenizer_template_and_card",
    r"stillhouse export runs/my-run models/my-student-bf16 --dtype bfloat16": AFTER,
    r"export VLLM_API_KEY=.*": SERVED,
    r"python -m vllm\.entrypoints\.openai\.api_server .*": SERVED,
    r"stillhouse prune .*": "tests/trainer/model/test_prune.py::"
    "test_pruned_logits_equal_a_model_built_by_hand_from_the_kept_layers",
    r"stillhouse label my-run.yaml --set store.path=labels": STORED,
    r"stillhouse train my-run.yaml --set store.path=labels --set store.mode=only": STORED,
    r"stillhouse doctor( configs/demo.yaml)?": "tests/launch/test_doctor.py::test_each_line_is_ok_or_says_what_to_do",
    r"stillhouse submit my-run.yaml --to local": LOCAL,
    r"stillhouse (status|stop|list)( my-run)?": LOCAL,
    r"stillhouse submit my-run.yaml --to ray --follow": CLUSTER,
    r"stillhouse (logs -f|fetch) my-run": CLUSTER,
    r"stillhouse list --to ray": "tests/launch/test_submit.py::test_logs_come_whole_and_list_names_only_our_jobs",
    r"stillhouse submit my-run.yaml --to slurm .*folder=/shared/runs/my-run": SLURM,
    r"stillhouse list --to slurm": SLURM_VERBS,
    r"stillhouse sync runs/my-run.*": "tests/launch/trackers/test_follower.py::"
    "test_sync_sends_a_run_that_is_over_and_only_what_is_missing",
}


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text())]


def is_run_below(command: str) -> bool:
    return command.startswith("stillhouse config show ") or (
        command.startswith("stillhouse submit ") and command.endswith(" --dry-run")
    )


def unaccounted(block: Block) -> list[str]:
    """Commands of a block that nobody runs and nothing marks."""
    if block.language in ("sh", "shell", "zsh") or block.language not in LANGUAGES:
        return [f"{block.page.name}:{block.line}: write ```console, with $ before each command"]
    if block.language != "console" or block.not_run:
        return []
    found = [c for c in block.commands if not is_run_below(c) and not any(re.fullmatch(p, c) for p in BY_TEST)]
    return [f"{block.page.name}:{block.line}: {command}" for command in found]


def test_python_in_the_documents_is_a_term_that_computes() -> None:
    found = [block for block in BLOCKS if block.language == "python" and "class Term" in block.text]
    assert found
    for block in found:
        names: dict = {}
        exec(compile(block.text, f"{block.page.name}:{block.line}", "exec"), names)
        teacher, student = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.75, 0.25]])
        pair = PairedLogProbs(student.log(), teacher.log(), exhaustive=True)
        value = function_of(names["Term"](loss="my.term"))(pair, alpha=0.5)
        torch.testing.assert_close(value, torch.tensor([0.5]))


def test_every_command_is_run_by_a_test_or_says_that_it_is_not() -> None:
    assert [text for block in BLOCKS for text in unaccounted(block)] == []
    assert all(block.commands for block in BLOCKS if block.language == "console")


def test_a_command_that_nobody_runs_would_be_seen() -> None:
    page = ROOT / "docs" / "x.md"
    command = "```console\n$ stillhouse launch-rockets\n```\n"
    assert [unaccounted(b) for b in blocks_of(page, command)] == [["x.md:1: stillhouse launch-rockets"]]
    assert [unaccounted(b) for b in blocks_of(page, f"<!-- not run here: has no rocket -->\n{command}")] == [[]]
    assert [len(unaccounted(b)) for b in blocks_of(page, f"<!-- not run -->\n{command}")] == [1]
    assert [len(unaccounted(b)) for b in blocks_of(page, "```sh\nrm x\n```\n")] == [1]


@pytest.mark.parametrize("test", sorted(set(BY_TEST.values())))
def test_the_tests_that_are_named_exist_and_know_the_command(test: str) -> None:
    file, _, function = test.partition("::")
    text = (ROOT / file).read_text()
    assert function in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    for pattern in (pattern for pattern, named in BY_TEST.items() if named == test):
        words = re.match(r"\w+ \(?([\w|-]+)", pattern)
        assert words is not None
        assert all(word in text for word in words[1].split("|")), pattern


# --- what is run here -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of the documents are typed: the README's configuration, its files, and files of the pages."""
    (readme,) = [b for b in BLOCKS if b.page.name == "README.md" and b.language == "yaml"]
    (tmp_path / "my-run.yaml").write_text(readme.text)
    (tmp_path / "data").mkdir()
    for name in ("chats", "held-out"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "a row"}\n')
    for block in BLOCKS:
        named = re.match(r"# ([\w-]+\.(?:yaml|sh))\b", block.text)
        if named:
            (tmp_path / named[1]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", sorted({c for b in BLOCKS if not b.not_run for c in b.commands if is_run_below(c)}))
def test_a_command_that_starts_nothing_does_what_the_page_says(command: str, folder: Path) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    words = shlex.split(command)[1:]
    # The rows here are stand-ins, and the models of the README are on no machine of the tests.
    result = CliRunner().invoke(app, [*words, *(["--no-check"] if words[0] == "submit" else [])])
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    assert "my-run" in result.output
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_the_readme_says_how_many_gpus_its_run_asks_for_and_how_to_ask_for_two(folder: Path) -> None:
    said = re.search(r"This run asks for (\d+) GPUs", (ROOT / "README.md").read_text())
    assert said is not None
    roles = roles_of(load_run(folder / "my-run.yaml").run, GPU)
    assert sum(role.count * role.shards for role in roles) == int(said[1])
    assert devices_text(load_run(folder / "my-run.yaml").run).startswith(f"{said[1]} GPUs")
    small = ["teacher.scorer.replicas=1", "teacher.scorer.tensor_parallel_size=1", "student.ranks=1"]
    assert devices_text(load_run(folder / "my-run.yaml", small).run).startswith("2 GPUs")


def test_the_loop_of_the_page_on_exit_codes_starts_again_only_what_may_go_on(folder: Path) -> None:
    script = folder / "run-until-done.sh"
    assert subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True).returncode == 0
    command = folder / "stillhouse"
    command.write_text('#!/bin/bash\necho "$*" >> calls\ncodes=(75 4 5)\nexit "${codes[$(wc -l < calls) - 1]}"\n')
    command.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    assert subprocess.run(["bash", script, "my-run.yaml"], env=environment).returncode == 5
    assert (folder / "calls").read_text() == "train my-run.yaml\n" * 3


def test_sections_of_a_configuration_in_the_pages_are_sections_of_one(folder: Path) -> None:
    yaml = YAML(typ="safe")
    seen = 0
    for block in (b for b in BLOCKS if b.language == "yaml" and not b.text.startswith("# ")):
        run = yaml.load((folder / "my-run.yaml").read_text())
        for section, values in yaml.load(block.text).items():
            merged = isinstance(values, dict) and section != "labels"  # each kind of which has keys of its own
            run[section] = {**run.get(section, {}), **values} if merged else values
        if "tasks" in run and run["training"].pop("epochs", None):
            run["training"]["steps"] = 100
        if "teachers" in run:
            del run["teacher"]
        else:
            run["teacher"]["scorer"] = {"engine": "vllm", **run["teacher"]["scorer"]}
        with (folder / "merged.yaml").open("w") as file:
            yaml.dump(run, file)
        load_run(folder / "merged.yaml")
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize(("name", "kind"), [("site.yaml", "slurm"), ("pods.yaml", "kuberay")])
def test_files_of_options_in_the_pages_are_options(folder: Path, name: str, kind: str) -> None:
    assert load_section(load_target(kind).Options, folder / name, [], title=name, option="--with")


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("local", "single-node.md"),
        ("ray", "ray-cluster.md"),
        ("slurm", "slurm.md"),
        ("kuberay", "kubernetes.md"),
        ("skypilot", "kubernetes.md"),
    ],
)
def test_every_option_of_a_target_is_in_the_table_of_its_page(kind: str, page: str) -> None:
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"`(\w+)(?:=[^`]*)?`", row.split("|")[1])}
    missing = set(load_target(kind).Options.model_fields) - named
    assert missing == set()


def test_every_target_has_a_page() -> None:
    text = "\n".join((ROOT / "docs" / page.name).read_text() for page in (ROOT / "docs").glob("*.md"))
    assert [kind for kind in KINDS if f"--to {kind}" not in text] == []


def test_the_exit_codes_of_the_page_are_those_of_the_errors() -> None:
    from trainer import errors

    table = (ROOT / "docs" / "exit-codes.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    raised = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
    assert raised | {0, 130} <= codes


MADE = [("objectives", "terms_table"), ("exactness", "exactness_table"), ("metrics", "metrics_table")]


@pytest.mark.parametrize(("page", "made_by"), MADE)
def test_a_page_that_is_made_of_code_is_what_the_code_says(page: str, made_by: str) -> None:
    make = runpy.run_path(str(ROOT / "docs" / f"{made_by}.py"))[made_by]
    assert (ROOT / "docs" / f"{page}.md").read_text() == make()
