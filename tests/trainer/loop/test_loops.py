"""The two loops over fakes of the protocols: order, depth, bytes, lost labels, divergence, stopping."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from configs.labels import GivenIds, Labels, TopK
from configs.section import MAIN
from trainer.errors import (
    DataError,
    Diverged,
    InfrastructureError,
    LabelsLost,
    Preempted,
    StudentsLost,
    UnitRejected,
)
from trainer.loop.hooks import Checkpoint, Evaluate
from trainer.loop.scoring import UnitScorers, score_and_stage
from trainer.loop.settings import LoopSettings
from trainer.loop.sources import Source
from trainer.loop.supply import Supply
from trainer.loop.train import Loops
from trainer.protocols import Moment, TeacherPools
from trainer.types import (
    AnswerCounters,
    Collected,
    Cursor,
    Evaluation,
    Prompt,
    RankBatch,
    Sequence,
    StepMetrics,
    Trained,
    Unit,
    UnitReport,
)

SETTINGS = LoopSettings(
    total_steps=8,
    sequences_per_step=4,
    micro_batch_tokens=64,
    depth=2,
    max_label_bytes=10**9,
    label_bytes_per_row=10,
    units_per_rank=1,
    max_unit_attempts=3,
    evaluate_every=0,
    save_every=0,
    max_non_finite_steps=1,
)


TOPK = TopK()


class Stream:
    """Sixteen-token prompts with answers, numbered; position is all its state."""

    def __init__(self) -> None:
        self.position = 0
        self.answers = AnswerCounters()

    @property
    def cursor(self) -> Cursor:
        return Cursor(epoch=0, position=self.position, seed=0, answers=self.answers)

    def take(self, num: int) -> list[Prompt]:
        mask = np.arange(16) < 15
        ids = [self.position + i for i in range(num)]
        self.position += num
        return [Prompt(f"0:{i}", np.arange(16, dtype=np.int32) + i, mask, f"row {i}") for i in ids]


class FromDataset:
    async def collect(self, prompts: list[Prompt]) -> Collected:
        return Collected(tuple(Sequence(p.id, p.token_ids, p.loss_mask, "dataset") for p in prompts))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        pass


@dataclass
class Trace:
    """What happened, in order."""

    events: list[tuple[Any, ...]] = field(default_factory=list)

    def step(self, metrics: StepMetrics) -> None:
        self.events.append(("step", metrics.step))

    def evaluation(self, evaluation: Evaluation, when: Moment) -> None:
        self.events.append(("evaluation", evaluation.step, when))

    def generation(self, who: str, rows: tuple[Sequence, ...], texts: list[np.ndarray]) -> None:
        raise AssertionError("the loops generate nothing")

    def phase(self, text: str) -> None:
        raise AssertionError("the loops are one phase")

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def span(self, lane: str, kind: str, start_s: float, stop_s: float, label: str = "") -> None:
        assert stop_s >= start_s


class Scorers:
    def __init__(self, trace: Trace, *, delay_s: float = 0.0) -> None:
        self.trace, self.delay_s = trace, delay_s
        self.in_flight = self.max_in_flight = 0
        self.fail: Callable[[Unit], Exception | None] = lambda unit: None

    async def score(self, unit: Unit, encoding: Labels, given: str | None = None) -> tuple[UnitReport, str]:
        assert given == (f"ids of {unit.id}" if encoding.takes_ids else None)
        self.trace.events.append(("score", unit.id))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        error = self.fail(unit)
        if error is not None:
            raise error
        report = UnitReport(
            unit.id, unit.tokens_hash(), "fake", unit.num_rows, unit.num_tokens, 1, 0, 0.9, self.delay_s, 0.0
        )
        return report, f"block of {unit.id}"


class Students:
    world = 2

    def __init__(self, trace: Trace, *, delay_s: float = 0.0) -> None:
        self.trace, self.delay_s = trace, delay_s
        self.trained: list[list[str]] = []
        self.staged: dict[int, tuple[RankBatch, ...]] = {}
        self.max_staged = 0
        self.skipped: set[int] = set()
        self.lose_once: set[int] = set()
        self.busy = False

    async def propose(self, batches: tuple[RankBatch, ...]) -> dict[str, str]:
        assert not self.busy, "ranks do one thing at a time"
        self.busy = True
        await asyncio.sleep(0.001)
        self.busy = False
        self.trace.events.append(("ids", batches[0].step))
        return {unit.id: f"ids of {unit.id}" for batch in batches for unit in batch.units}

    async def stage(self, batches: tuple[RankBatch, ...], blocks: list[list[str]]) -> None:
        step = batches[0].step
        if step in self.lose_once:
            self.lose_once.remove(step)
            raise LabelsLost([batches[1].units[0].id])
        assert blocks == [[f"block of {unit.id}" for unit in batch.units] for batch in batches]
        self.staged[step] = batches
        self.max_staged = max(self.max_staged, len(self.staged))

    async def step(self, step: int) -> StepMetrics:
        batches = self.staged.pop(step)
        assert not self.busy
        self.busy = True
        await asyncio.sleep(self.delay_s)
        self.busy = False
        self.trained.append(sorted(s.id for batch in batches for unit in batch.units for s in unit.sequences))
        return StepMetrics(step, {"train/loss": 1.0, "train/skipped": float(step in self.skipped)})

    async def evaluate(self, step: int) -> Evaluation:
        return Evaluation(step, 5, 1.0, 0.5, 10.0, 5.0)


@dataclass
class Made:
    """The loops and the fakes around them; a test may replace what the fakes do, and `save`."""

    loops: Loops
    trace: Trace
    scorers: Scorers
    students: Students
    stream: Stream
    answers: FromDataset
    evaluate: Evaluate
    checkpoint: Checkpoint
    stop: asyncio.Event
    save: Callable[[Trained], Awaitable[bool]]
    saved: list[tuple[int, int]]  # (step, position)

    def run(self, start_step: int = 0) -> None:
        asyncio.run(asyncio.wait_for(self.loops.run(start_step), 20))


def make(
    settings: LoopSettings = SETTINGS,
    *,
    answers: FromDataset | None = None,
    labels: Labels = TOPK,
    **delays: float,
) -> Made:
    trace, saved, stream = Trace(), [], Stream()
    answers = answers or FromDataset()
    scorers = Scorers(trace, delay_s=delays.get("score", 0.0))
    students = Students(trace, delay_s=delays.get("train", 0.0))

    async def keep(trained: Trained) -> bool:
        saved.append((trained.step, trained.cursor.position))
        return True

    async def save(trained: Trained) -> bool:
        return await made.save(trained)

    source = Source({MAIN: stream}, {MAIN: answers}, {MAIN: 1.0}, sequences_per_step=settings.sequences_per_step)
    unit_scorers = UnitScorers({"teacher": TeacherPools(scorers, None)}, {MAIN: labels})
    supply = Supply(source, unit_scorers, students, settings=settings, observer=trace)
    checkpoint = Checkpoint(save, trace, settings)
    evaluate = Evaluate(students, trace, settings, checkpoint)
    stop = asyncio.Event()
    loops = Loops(supply, students, [evaluate, checkpoint], settings=settings, observer=trace, stop_requested=stop)
    made = Made(loops, trace, scorers, students, stream, answers, evaluate, checkpoint, stop, keep, saved)
    return made


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_each_step_trains_its_own_positions_once_and_in_order_at_every_depth(depth: int) -> None:
    made = make(replace(SETTINGS, depth=depth), score=0.002)
    made.run()
    assert made.students.trained == [sorted(f"0:{i}" for i in range(4 * s, 4 * s + 4)) for s in range(8)]
    assert [e[1] for e in made.trace.events if e[0] == "step"] == list(range(1, 9))
    assert made.saved == [(8, 32)]


def test_depth_zero_scores_nothing_while_a_step_trains() -> None:
    made = make(replace(SETTINGS, depth=0), train=0.005)
    made.run()
    kinds = [e[0] for e in made.trace.events if e[0] in ("score", "step")]
    assert kinds == ["score", "score", "step"] * 8


@pytest.mark.parametrize("depth", [1, 2])
def test_supply_runs_ahead_by_exactly_the_depth(depth: int) -> None:
    made = make(replace(SETTINGS, depth=depth), train=0.1)
    made.run()
    scored_at_first_step = made.trace.events.index(("step", 1))
    before = {e[1].split("/")[0] for e in made.trace.events[:scored_at_first_step] if e[0] == "score"}
    assert before == {str(step) for step in range(1, depth + 2)}
    assert made.students.max_staged <= depth + 1


def test_a_byte_cap_below_one_step_means_one_step_at_a_time() -> None:
    made = make(replace(SETTINGS, depth=4, max_label_bytes=1), score=0.003)
    made.run()
    assert len(made.students.trained) == 8
    assert made.students.max_staged == 1
    assert made.scorers.max_in_flight == 2  # the two units of one step


def test_lost_labels_are_scored_again_and_only_those() -> None:
    made = make()
    made.students.lose_once = {3}
    made.run()
    scored = [e[1] for e in made.trace.events if e[0] == "score" and e[1].startswith("3/")]
    assert len(scored) == 3
    assert len(set(scored)) == 2
    assert len(made.students.trained) == 8


def test_an_error_of_a_scorer_ends_the_run_as_itself_when_its_step_is_due_and_what_was_trained_is_saved() -> None:
    made = make(train=0.01)
    made.scorers.fail = lambda unit: UnitRejected("bad unit") if unit.id.startswith("4/") else None
    with pytest.raises(UnitRejected, match="bad unit"):
        made.run()
    assert len(made.students.trained) == 3
    assert made.saved == [(3, 12)]


def test_a_bad_row_ends_the_run_when_its_step_is_due_and_what_was_trained_is_saved() -> None:
    made = make(train=0.01)
    take = made.stream.take

    def take_until_the_bad_row(num: int) -> list[Prompt]:
        if made.stream.cursor.position == 12:
            raise DataError("train.jsonl:13: no answer")
        return take(num)

    made.stream.take = take_until_the_bad_row
    with pytest.raises(DataError, match="no answer"):
        made.run()
    assert len(made.students.trained) == 3
    assert made.saved == [(3, 12)]


class Panic(BaseException):
    """As Rust code raises it: no `Exception`."""


UNFORESEEN = [
    OSError(5, "Input/output error"),
    TypeError("a template's"),
    StopIteration(),
    Panic("unwrap on None"),
    asyncio.CancelledError(),  # that nobody here asked for
    SystemExit(0),
]


@pytest.mark.parametrize("where", ["take", "collect", "stage"])
@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_an_error_of_supply_that_nobody_foresaw_ends_the_run_when_its_step_is_due_and_what_was_trained_is_saved(
    where: str, error: BaseException
) -> None:
    made = make(train=0.01)
    owner = {"take": made.stream, "collect": made.answers, "stage": made.students}[where]
    work = getattr(owner, where)
    calls = 0

    def broken_at_the_fourth(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return work(*arguments)

    setattr(owner, where, broken_at_the_fourth)
    with pytest.raises((type(error), RuntimeError)) as raised:
        made.run()
    assert type(error).__name__ in repr(raised.value)
    assert len(made.students.trained) == 3
    assert made.saved == [(3, 12)]


def test_nothing_is_left_to_train_and_nothing_is_said(recwarn: pytest.WarningsRecorder) -> None:
    gc.collect()  # what earlier tests left is said now
    recwarn.clear()
    made = make()
    made.run(SETTINGS.total_steps)
    gc.collect()  # of a coroutine that was never begun, for example, it is said then
    assert (made.trace.events, made.saved, recwarn.list) == ([], [], [])


def test_the_error_that_ends_a_run_is_told_although_saving_fails_as_well() -> None:
    made = make()

    async def full_disk(trained: Trained) -> bool:
        raise InfrastructureError("the checkpoint could not be written")

    def broken(num: int) -> list[Prompt]:
        if made.stream.position == 8:
            raise TypeError("a template's")
        return take(num)

    take, made.stream.take, made.save = made.stream.take, broken, full_disk
    with pytest.raises(TypeError, match="a template's"):
        made.run()
    assert any("could not be written" in event[1].get("text", "") for event in made.trace.events if event[0] == "note")


def test_rows_that_are_not_read_for_ever_do_not_hinder_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.loop.supply.SETTLE_S", 0.1)

    async def scenario() -> list:
        made = make()
        take = made.stream.take
        made.stream.take = lambda num: take(num) if made.stream.position < 8 else threading.Event().wait()
        asyncio.get_running_loop().call_later(0.3, made.stop.set)
        with pytest.raises(Preempted, match="after step 2"):
            await asyncio.wait_for(made.loops.run(0), 5)
        return made.saved

    started = time.monotonic()
    assert asyncio.run(scenario()) == [(2, 8)]
    assert time.monotonic() - started < 4, "nor does the end of the loop wait for them"


def test_nobody_reads_rows_any_more_when_the_stream_is_moved_after_a_loss() -> None:
    reading: list[bool] = []

    async def scenario() -> None:
        made = make()
        take = made.stream.take

        def slow(num: int) -> list[Prompt]:
            reading.append(True)
            time.sleep(0.2)
            reading.pop()
            return take(num)

        async def lost(step: int) -> StepMetrics:
            await asyncio.sleep(0.05)
            raise StudentsLost("rank 1 died")

        made.stream.take, made.students.step = slow, lost
        with pytest.raises(StudentsLost):
            await made.loops.run(0)
        assert reading == []

    asyncio.run(scenario())


def test_an_error_of_a_later_step_does_not_end_a_checkpoint_that_is_being_written() -> None:
    made = make(replace(SETTINGS, save_every=2))
    written: list[int] = []

    async def slow_save(trained: Trained) -> bool:
        await asyncio.sleep(0.05)
        written.append(trained.step)
        return True

    made.save = slow_save
    made.scorers.fail = lambda unit: UnitRejected("bad unit") if unit.id.startswith("4/") else None
    with pytest.raises(UnitRejected):
        made.run()
    assert written == [2, 3]


def test_a_lost_group_is_not_asked_for_a_checkpoint() -> None:
    made = make()
    stage = made.students.stage

    async def lost_at_three(batches: tuple[RankBatch, ...], blocks: list) -> None:
        if batches[0].step == 3:
            raise StudentsLost("rank 1 died")
        await stage(batches, blocks)

    made.students.stage = lost_at_three  # type: ignore[method-assign]
    with pytest.raises(StudentsLost):
        made.run()
    assert made.saved == []


def test_skipped_steps_are_counted_and_end_the_run_past_the_budget_without_saving() -> None:
    made = make(replace(SETTINGS, save_every=1))
    made.students.skipped = {3, 5}
    with pytest.raises(Diverged, match="2 steps had a non-finite"):
        made.run()
    assert [step for step, _ in made.saved] == [1, 2, 3, 4]
    listed = [e[1]["prompts"] for e in made.trace.events if e[0] == "non_finite_step"]
    assert listed[0] == [f"0:{i}" for i in range(8, 12)]


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("broken", "saved_before", "kept"), [(8, [3, 6], "step 6: training.steps: 6"), (2, [], "no good")]
)
def test_an_evaluation_that_is_not_finite_ends_the_run_before_the_student_is_saved(
    kl: float, broken: int, saved_before: list[int], kept: str
) -> None:
    made = make(replace(SETTINGS, save_every=3, evaluate_every=2))
    original = made.students.evaluate

    async def evaluate(step: int) -> Evaluation:
        return replace(await original(step), forward_kl=kl if step == broken else 1.0)

    made.students.evaluate = evaluate  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=rf"KL after step {broken} is {kl}.*{kept}"):
        made.run()
    assert [step for step, _ in made.saved] == saved_before
    assert ("evaluation", broken, "after" if broken == 8 else "during") in made.trace.events, (
        "it is recorded all the same"
    )


def test_a_run_of_which_no_step_was_finite_has_not_trained() -> None:
    made = make(replace(SETTINGS, total_steps=2, max_non_finite_steps=3))
    made.students.skipped = {1, 2}
    with pytest.raises(Diverged, match="2 steps had a non-finite"):
        made.run()
    assert made.saved == []
    made = make(replace(SETTINGS, total_steps=2, max_non_finite_steps=3))
    made.students.skipped = {2}
    made.run()
    assert [step for step, _ in made.saved] == [2]


def test_a_stop_saves_the_last_trained_step_and_its_cursor() -> None:
    made = make(train=0.005)
    original = made.students.step

    async def step_then_stop(step: int) -> StepMetrics:
        if step == 3:
            made.stop.set()
        return await original(step)

    made.students.step = step_then_stop  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="after step 3"):
        made.run()
    assert made.saved == [(3, 12)]


def test_a_stop_is_not_overtaken_by_the_error_of_a_step_that_is_not_trained_any_more() -> None:
    async def scenario() -> list:
        made = make(train=0.01, score=0.002)
        save = made.save

        async def slow_save(trained: Trained) -> bool:
            await asyncio.sleep(0.05)
            return await save(trained)

        made.save = slow_save
        made.scorers.fail = lambda unit: UnitRejected("bad unit") if unit.id.startswith("4/") else None
        original = made.students.step

        async def step_then_stop(step: int) -> StepMetrics:
            if step == 2:
                made.stop.set()
            return await original(step)

        made.students.step = step_then_stop
        with pytest.raises(Preempted, match="after step 2"):
            await asyncio.wait_for(made.loops.run(0), 5)
        return made.saved

    assert asyncio.run(scenario()) == [(2, 8)]


def test_a_stop_whose_checkpoint_cannot_be_written_does_not_claim_that_it_was() -> None:
    made = make(replace(SETTINGS, save_every=3))
    tried: list[int] = []

    async def full_disk(trained: Trained) -> bool:
        tried.append(trained.step)
        if trained.step == 3:
            made.stop.set()
        return False

    made.save = full_disk
    with pytest.raises(InfrastructureError, match="could not be written"):
        made.run()
    assert tried == [3, 3]
    assert len(made.students.trained) == 3


def test_a_checkpoint_holds_the_skipped_steps_counted_until_then() -> None:
    made = make(replace(SETTINGS, save_every=2, max_non_finite_steps=5))
    made.students.skipped = {1, 4, 7}
    counts: dict[int, int] = {}

    async def save(trained: Trained) -> bool:
        counts[trained.step] = trained.non_finite_steps
        return True

    made.save = save
    made.run()
    assert counts == {2: 1, 4: 2, 6: 2, 8: 3}


def test_an_evaluation_that_a_killed_run_did_not_come_to_is_made_when_it_goes_on() -> None:
    made = make(replace(SETTINGS, evaluate_every=3))
    made.run(3)
    assert [e[1] for e in made.trace.events if e[0] == "evaluation"] == [3, 6, 8]


def test_a_stop_while_the_teacher_is_silent_ends_at_once() -> None:
    async def scenario() -> None:
        made = make(score=60.0)
        asyncio.get_running_loop().call_later(0.05, made.stop.set)
        with pytest.raises(Preempted):
            await asyncio.wait_for(made.loops.run(0), 2)
        assert made.saved == []

    asyncio.run(scenario())


def test_of_a_rank_that_lost_its_labels_those_that_have_none_are_not_made() -> None:
    """A rank cannot tell which of its units' blocks was lost: it names all, those of tasks without labels too."""
    ids = np.zeros(2, np.int32)
    units = [Unit(name, (Sequence(name, ids, ids.astype(bool), "dataset"),)) for name in ("one", "other")]
    asked, staged, trace = [], [], Trace()

    async def score(unit: Unit) -> tuple[str, str]:
        asked.append(unit.id)
        return f"report of {unit.id}", f"block {len(asked)}"

    async def stage() -> None:
        staged.append({name: block for name, (_, block) in scored.items()})
        if len(staged) == 1:
            raise LabelsLost(["one", "without labels"])

    scored: dict = {}
    asyncio.run(score_and_stage("step 1", units, scored, score=score, stage=stage, attempts=2, observer=trace))
    assert asked == ["one", "other", "one"]
    assert staged == [{"one": "block 1", "other": "block 2"}, {"one": "block 3", "other": "block 2"}]
    assert trace.events == [("labels_lost", {"units": ["one", "without labels"], "attempt": 0})]


def test_labels_lost_for_ever_end_with_the_step_named() -> None:
    made = make()

    async def always_lost(batches: tuple[RankBatch, ...], blocks: list) -> None:
        raise LabelsLost([batches[0].units[0].id])

    made.students.stage = always_lost  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match="the labels of step 1 were lost 3 times"):
        made.run()


def test_a_checkpoint_is_saved_by_time_as_well_and_a_failed_one_is_not_tried_again_at_once() -> None:
    made = make(replace(SETTINGS, total_steps=9, save_every=5, save_every_s=30.0))
    made.loops._clock = lambda: 10.0 * len(made.students.trained)  # a step takes ten seconds
    tried: list[int] = []

    async def save(trained: Trained) -> bool:
        assert trained.cursor.position == 4 * trained.step
        tried.append(trained.step)
        return trained.step != 3

    made.save = save
    made.run()
    assert tried == [3, 5, 8, 9]
    assert made.checkpoint.saved_step == 9


def test_a_run_without_held_out_rows_is_never_evaluated() -> None:
    made = make(replace(SETTINGS, has_held_out_rows=False, evaluate_every=2))
    made.run()
    assert [event for event in made.trace.events if event[0] == "evaluation"] == []
    assert made.evaluate.latest is None
    assert len(made.students.trained) == made.saved[-1][0] == SETTINGS.total_steps


class Written(FromDataset):
    """A teacher that says nothing to `silent` prompts of every step; more than `allowed` of all end the run."""

    def __init__(self, *, silent: int, allowed: float = 1.0) -> None:
        self.silent, self.allowed = silent, allowed
        self.judged: list[tuple[int, bool]] = []

    async def collect(self, prompts: list[Prompt]) -> Collected:
        sequences = (await super().collect(prompts)).sequences[self.silent :]
        return Collected(sequences, AnswerCounters(written=len(prompts), empty=self.silent, dropped=self.silent))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        self.judged.append((answers.written, last))
        if answers.dropped > self.allowed * answers.written or answers.written > 28:
            raise DataError(f"{answers.dropped} of {answers.written}")


def writing(answers: Written, **arguments: Any) -> tuple[Made, list[Cursor]]:
    made = make(answers=answers, **arguments)
    saved: list[Cursor] = []

    async def save(trained: Trained) -> bool:
        saved.append(trained.cursor)
        return True

    made.save = save
    return made, saved


def test_answers_are_counted_as_their_steps_are_trained_and_saved_with_the_cursor() -> None:
    answers = Written(silent=1)
    made, saved = writing(answers, settings=replace(SETTINGS, total_steps=7, save_every=3, depth=3))
    made.run()
    assert [(cursor.position, cursor.answers.written, cursor.answers.empty) for cursor in saved] == [
        (12, 12, 3),
        (24, 24, 6),
        (28, 28, 7),
    ]
    assert answers.judged == [(4 * step, step == 7) for step in range(1, 8)]
    told = [e for e in made.trace.events if e[0] == "note"]
    assert [e[1]["text"].split(";")[0] for e in told] == ["step 1 has prompts that were answered with nothing"]

    resumed, again = writing(Written(silent=1), settings=replace(SETTINGS, total_steps=7, save_every=3))
    resumed.stream.position, resumed.stream.answers = 12, saved[0].answers
    resumed.run(3)
    assert again == saved[1:]


def test_too_many_answers_of_no_use_end_the_run_after_what_was_trained_is_saved() -> None:
    made, saved = writing(Written(silent=1))
    with pytest.raises(DataError, match="8 of 32"):  # the eighth step is one too many
        made.run()
    assert len(made.students.trained) == 7
    assert [cursor.position for cursor in saved] == [28]


def test_a_step_without_any_sequence_is_told() -> None:
    made, _ = writing(Written(silent=4), settings=replace(SETTINGS, total_steps=2))
    made.run()
    assert made.students.trained == [[], []]
    assert [e[1] for e in made.trace.events if e[0] == "empty_step"] == [{"at_step": 1}, {"at_step": 2}]


def order_of(made: Made, *kinds: str) -> list[tuple[str, int]]:
    return [(kind, step) for kind, step, *_ in made.trace.events if kind in kinds]


@pytest.mark.parametrize("max_label_bytes", [10**9, 1])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_ids_are_chosen_with_the_weights_of_one_step_before_whatever_the_depth(
    start: int, depth: int, max_label_bytes: int
) -> None:
    settings = replace(SETTINGS, depth=depth, max_label_bytes=max_label_bytes)
    made = make(settings, labels=GivenIds(), train=0.002, score=0.003)
    made.stream.position = 4 * start
    made.run(start)
    first = start + 1
    expected = [("ids", first), *((k, s) for step in range(first, 8) for k, s in (("ids", step + 1), ("step", step)))]
    assert order_of(made, "ids", "step") == [*expected, ("step", 8)]
    assert len(made.students.trained) == 8 - start


def test_at_depth_zero_ids_are_chosen_with_the_last_weights() -> None:
    made = make(replace(SETTINGS, depth=0), labels=GivenIds())
    made.run()
    assert [kind for kind, _ in order_of(made, "ids", "score", "step")] == ["ids", "score", "score", "step"] * 8


def test_a_step_is_scored_while_the_one_before_is_trained() -> None:
    made = make(replace(SETTINGS, depth=1), labels=GivenIds(), train=0.05)
    made.run()
    scored = {event[1].split("/")[0]: place for place, event in enumerate(made.trace.events) if event[0] == "score"}
    for step in range(1, 8):
        assert scored[str(step + 1)] < made.trace.events.index(("step", step))


def test_a_hook_and_a_choice_of_ids_are_never_at_once_and_hooks_come_first() -> None:
    made = make(replace(SETTINGS, evaluate_every=1), labels=GivenIds())
    evaluate = made.students.evaluate

    async def exclusive(step: int) -> Evaluation:
        assert not made.students.busy
        made.students.busy = True
        await asyncio.sleep(0.003)
        made.students.busy = False
        return await evaluate(step)

    made.students.evaluate = exclusive
    made.run()
    assert len(made.students.trained) == 8


def test_labels_that_are_lost_are_scored_again_on_the_same_ids() -> None:
    made = make(labels=GivenIds())
    made.students.lose_once = {3}
    made.run()
    assert [event for event in made.trace.events if event == ("ids", 3)] == [("ids", 3)]
    assert len(made.students.trained) == 8


@pytest.mark.parametrize("where", ["take", "collect", "stage"])
def test_an_error_of_supply_waits_until_its_step_is_due_where_ids_are_chosen_before(where: str) -> None:
    made = make(labels=GivenIds(), train=0.002)
    owner = {"take": made.stream, "collect": made.answers, "stage": made.students}[where]
    work, calls = getattr(owner, where), []

    def broken_at_the_fourth(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise DataError("no answer")
        return work(*arguments)

    setattr(owner, where, broken_at_the_fourth)
    with pytest.raises(DataError, match="no answer"):
        made.run()
    assert len(made.students.trained) == 3
    assert made.saved == [(3, 12)]


def test_a_stop_while_the_next_prompts_are_read_is_heard_and_keeps_what_was_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.loop.supply.SETTLE_S", 0.1)

    async def scenario() -> list:
        made = make(labels=GivenIds())
        take = made.stream.take
        made.stream.take = lambda num: take(num) if made.stream.position < 12 else threading.Event().wait()
        asyncio.get_running_loop().call_later(0.3, made.stop.set)
        with pytest.raises(Preempted, match="after step 2"):
            await asyncio.wait_for(made.loops.run(0), 5)
        return made.saved

    assert asyncio.run(scenario()) == [(2, 8)]


def test_a_group_that_is_lost_while_it_chooses_ends_the_attempt() -> None:
    made = make(labels=GivenIds())
    propose = made.students.propose

    async def lost_at_four(batches: tuple[RankBatch, ...]) -> dict[str, str]:
        if batches[0].step == 4:
            raise StudentsLost("rank 1 died")
        return await propose(batches)

    made.students.propose = lost_at_four
    with pytest.raises(StudentsLost):
        made.run()
    assert len(made.students.trained) == 2
    assert made.saved == []
