"""Steps drawn from several tasks: exact counts, streams and cursors of their own, and what a resumed source accepts."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from tiny_models import tiny_folder
from tiny_runs import chat_row, tiny_run

from configs.labels import NoLabels
from configs.load import load_run
from configs.losses import CrossEntropy
from configs.schema import Run
from trainer.answers.dataset import GivenAnswers
from trainer.errors import ConfigError, DataError
from trainer.loop.inputs import read_inputs
from trainer.loop.rows import open_stream, seed_of
from trainer.loop.sources import Source
from trainer.types import AnswerCounters, Collected, Cursor, Prompt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    rows = [chat_row(i) | {"domain": "code" if i % 4 == 0 else "prose"} for i in range(24)]
    rows[9]["domain"] = "verse"
    (folder / "routed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run(folder)
    tiny_folder(folder / "code", seed=3)
    model = lambda name: f"{{model: {{path: {folder / name}}}, scorer: {{engine: hf}}}}"  # noqa: E731
    route = "route: {column: domain, map: {code: code, prose: prose}}"
    return load_run(
        config,
        [
            "teacher=null",
            f"teachers={{prose: {model('teacher')}, code: {model('code')}}}",
            f"tasks={{a: {{teacher: prose, share: 3}}, b: {{prompts: {{path: {folder / 'routed.jsonl'}}}, {route}}}}}",
        ],
    ).run


def source_of(run: Run) -> Source:
    inputs = read_inputs(run)
    streams = {name: open_stream(run, task, inputs, quarantine=None) for name, task in run.resolved_tasks().items()}
    shares = {name: task.share for name, task in run.resolved_tasks().items()}
    return Source(streams, dict.fromkeys(streams, GivenAnswers()), shares, sequences_per_step=6)


def drawn(source: Source, steps: range) -> list[list[tuple[str, str, str]]]:
    return [[(p.task, p.id, p.teacher) for p in source.take(step).prompts] for step in steps]


def test_a_task_that_asks_nobody_names_no_teacher_and_needs_no_column(run: Run) -> None:
    hard = run.tasks["b"].model_copy(update={"labels": NoLabels(), "objective": (CrossEntropy(),)})
    steps = drawn(source_of(run.model_copy(update={"tasks": run.tasks | {"b": hard}})), range(1, 5))
    assert {(task, teacher) for step in steps for task, _, teacher in step} == {("a", "prose"), ("b", "")}


def test_a_source_goes_on_from_its_cursor_with_the_same_prompts(run: Run) -> None:
    whole = drawn(source_of(run), range(1, 4))
    first = source_of(run)
    assert drawn(first, range(1, 3)) == whole[:2]
    resumed = source_of(run)
    resumed.seek(first.cursor)
    assert drawn(resumed, range(3, 4)) == whole[2:]
    assert first.cursor.counters.read == 12
    assert {name: one.position for name, one in first.cursor.tasks.items()} == {"a": 9, "b": 3}


def test_a_cursor_of_other_tasks_is_refused_with_what_to_do(run: Run) -> None:
    source = source_of(run)
    cursor = source.cursor
    without = replace(cursor, tasks={"a": cursor.tasks["a"]})
    with pytest.raises(ConfigError, match=r"trained on the tasks a, and the run has a, b.*another name or folder"):
        source.seek(without)


def test_each_task_has_an_order_of_its_own(run: Run) -> None:
    assert seed_of(run, "a") != seed_of(run, "b")
    assert seed_of(run.model_copy(update={"tasks": {}}), "main") == run.seed


def test_rows_go_to_the_teacher_that_their_column_names_and_a_value_without_one_is_named(run: Run) -> None:
    stream = open_stream(run, run.resolved_tasks()["b"], read_inputs(run), quarantine=None)
    found = {}

    def take_all() -> None:
        while True:
            (prompt,) = stream.take(1)
            found[prompt.origin.rpartition(":")[2]] = prompt.teacher

    with pytest.raises(DataError, match=r"routed.jsonl:10: domain: is 'verse', which is not in route.map"):
        take_all()
    assert found
    assert all(teacher == ("code" if (int(line) - 1) % 4 == 0 else "prose") for line, teacher in found.items())


def test_sequences_know_their_task_and_teacher(run: Run) -> None:
    source = source_of(run)
    collected = asyncio.run(source.collect(source.take(1)))
    assert [s.task for s in collected.sequences].count("a") >= 4
    assert {s.teacher for s in collected.sequences if s.task == "a"} == {"prose"}


class Writes:
    """Drops the answers to some prompts; more than `allowed` of all are an error."""

    def __init__(self, *, dropped: int, allowed: float) -> None:
        self.dropped, self.allowed = dropped, allowed

    async def collect(self, prompts: list[Prompt]) -> Collected:
        return Collected((), AnswerCounters(written=len(prompts), empty=self.dropped, dropped=self.dropped))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        if answers.dropped > self.allowed * answers.written:
            raise DataError(f"{answers.dropped} of {answers.written}")


def after_two_steps(run: Run, answers: dict[str, Writes]) -> tuple[Source, Cursor]:
    """A step each before and after the source was moved to where it stood."""
    cursor = source_of(run).cursor
    for step in (1, 2):
        plain = source_of(run)
        streams = plain._streams
        source = Source(streams, answers, {"a": 3.0, "b": 1.0}, sequences_per_step=4)
        source.seek(cursor)
        drawn_now = source.take(step)
        cursor = drawn_now.cursor.with_answers(asyncio.run(source.collect(drawn_now)).answers_by_task)
    return source, cursor


def test_answers_are_judged_task_by_task_over_the_whole_run(run: Run) -> None:
    source, cursor = after_two_steps(run, {"a": Writes(dropped=3, allowed=1.0), "b": Writes(dropped=0, allowed=0.0)})
    assert {name: (one.answers.written, one.answers.dropped) for name, one in cursor.tasks.items()} == {
        "a": (6, 6),
        "b": (2, 0),
    }
    assert (cursor.answers.written, cursor.answers.dropped) == (8, 6)
    source.judge(cursor, last=True)
    source, cursor = after_two_steps(run, {"a": Writes(dropped=0, allowed=1.0), "b": Writes(dropped=1, allowed=0.5)})
    with pytest.raises(DataError, match=r"^task b: 2 of 2$"):
        source.judge(cursor, last=True)
