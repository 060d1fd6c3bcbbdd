"""What a run may go on from: the same configuration over the same content, wherever it lies, and no shorter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from tiny_models import CHATML
from tiny_runs import chat_row, tiny_run, write_rows

from configs.load import config_hash, dump_run, load_run, run_folder
from launch.check.run import check
from launch.contents import contents_of
from launch.resuming import Standing, new_length, refuse_changes, standing
from launch.train import train
from trainer.errors import ConfigError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.inputs import read_inputs
from trainer.loop.job import total_steps
from trainer.loop.manifest import TrainingState
from trainer.model.optimizer import learning_rate
from trainer.run_folder import RunFolder, write_json
from trainer.types import Cursor

FILES = ("rank_0.pt", "zero/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/mp_rank_00_model_states.pt")


class Place:
    """A run of one rank in a folder, as its command finds it."""

    def __init__(self, folder: Path, changes: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.file = tiny_run(folder, {"student": {"ranks": 1}, "runtime": "in_process", **(changes or {})})

    def look(self, *overrides: str) -> Standing:
        run = load_run(self.file, list(overrides)).run
        return standing(run, RunFolder(run_folder(run)), contents_of(run, read_inputs(run)))

    def stop_at(
        self,
        step: int,
        *,
        total: int = 8,
        epoch: int = 0,
        position: int = 0,
        finished: bool = False,
        tasks: Sequence[str] = (),
    ) -> None:
        """Leave what a run leaves that was stopped, or had finished, at a step."""
        run = load_run(self.file).run
        folder = RunFolder.create(run_folder(run))
        folder.config.write_text(dump_run(run))
        if finished:
            write_json(folder.exit, {"code": 0, "reason": "finished", "time": 1.0})
        checkpoints = Checkpoints(folder.checkpoints, keep=2)
        draft = checkpoints.begin(step)
        (draft / "zero").mkdir()
        for name in FILES:
            (draft / name).write_text("shard")
        state = TrainingState(
            step=step,
            cursor=Cursor(epoch, position, seed=0, tasks={name: Cursor(0, step, seed=0) for name in tasks}),
            config_hash=config_hash(run),
            world=1,
            non_finite_steps=0,
            total_steps=total,
            contents=contents_of(run, read_inputs(run)),
        )
        checkpoints.commit(draft, state)


@pytest.fixture
def stopped(tmp_path: Path) -> Place:
    place = Place(tmp_path / "one")
    place.stop_at(4)
    return place


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file and nothing that `ls` shows of it, if the size stays."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=times)


def scaled(path: Path) -> None:
    """Give a file other weights of the same names, shapes and size."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    size = path.stat().st_size
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert path.stat().st_size == size
    os.utime(path, ns=times)


def last_two_swapped(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:-2], lines[-1], lines[-2]])


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows replaced": (lambda f: write_rows(f / "train.jsonl", [chat_row(i) for i in range(50, 90)]), "prompts"),
    "rows in another order": (lambda f: rewritten(f / "train.jsonl", last_two_swapped), "prompts"),
    "a letter of a row": (lambda f: rewritten(f / "train.jsonl", lambda b: b.replace(b"fox", b"box", 1)), "prompts"),
    "held-out rows": (lambda f: rewritten(f / "held_out.jsonl", last_two_swapped), "data.evaluation"),
    "teacher weights": (lambda f: scaled(f / "teacher/model.safetensors"), "teacher.model/model.safetensors"),
    "teacher config": (
        lambda f: rewritten(f / "teacher/config.json", lambda b: b.replace(b"rms_norm_eps", b"rms_norm_Eps")),
        "teacher.model/config.json",
    ),
    "student config": (
        lambda f: rewritten(f / "student/config.json", lambda b: b + b" "),
        "student.model/config.json",
    ),
    "a file more": (lambda f: (f / "teacher/chat_template.jinja").write_text(CHATML + "{# #}"), "chat_template"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_input_that_changed_at_its_path_is_refused_and_named_or_noted(stopped: Place, name: str) -> None:
    assert stopped.look() == Standing(after=stopped.look().after)
    change, place = CHANGES[name]
    change(stopped.folder)
    with pytest.raises(ConfigError, match=r"holds 4 steps of this run, made from other inputs") as refused:
        stopped.look()
    assert place in str(refused.value)
    assert " bytes, " in str(refused.value) or "was " in str(refused.value)
    assert "training.on_changed_inputs: note" in str(refused.value)
    told = stopped.look("training.on_changed_inputs=note").changed
    assert any(text.startswith("changed since step 4: ") and place in text for text in told)


def test_what_a_library_caches_beside_the_rows_is_no_change_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    Dataset.from_list([chat_row(i) for i in range(8)]).save_to_disk(folder)
    place = Place(tmp_path / "one", {"prompts": {"path": str(folder)}})
    place.stop_at(4)
    load_from_disk(folder).map(lambda row: row, load_from_cache_file=False)
    assert list(folder.glob("cache-*.arrow"))
    assert place.look().changed == ()
    rewritten(next(folder.glob("data-*.arrow")), lambda content: content.replace(b"fox", b"box", 1))
    with pytest.raises(ConfigError, match=r"prompts/data-.*arrow"):
        place.look()


def test_a_template_file_is_told_by_its_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    place = Place(tmp_path / "one", {"teacher": {"chat_template": str(tmp_path / "chat.jinja")}})
    place.stop_at(4)
    shutil.copyfile(tmp_path / "chat.jinja", tmp_path / "moved.jinja")
    assert place.look(f"teacher.chat_template={tmp_path}/moved.jinja").changed == ()
    (tmp_path / "chat.jinja").write_text(CHATML + "{# #}")
    with pytest.raises(ConfigError, match=r"teacher.chat_template \(.*chat.jinja\): "):
        place.look()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.template_arguments={enable_thinking: false}", r"teacher.template_arguments.enable_thinking: "),
        ("teacher.template_arguments={}", r"teacher.template_arguments.effort: "),
        ("prompts.loss_on=last", r'prompts.loss_on: "last", was "all"'),
        ("prompts.system_prompt=be brief", r'prompts.system_prompt: "be brief", was null'),
    ],
)
def test_a_run_goes_on_with_the_same_rendering_alone(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML + "{{ effort }}{{ enable_thinking }}")
    arguments = {"chat_template": str(tmp_path / "chat.jinja"), "template_arguments": {"effort": "low"}}
    place = Place(tmp_path / "one", {"teacher": arguments})
    place.stop_at(4)
    assert place.look().after is not None
    with pytest.raises(ConfigError, match=message):
        place.look(override)


def test_the_students_first_weights_count_under_adapters_alone(tmp_path: Path) -> None:
    for name, lora in (("whole", None), ("adapters", {"rank": 2})):
        place = Place(tmp_path / name, {"student": {"ranks": 1, "lora": lora}})
        place.stop_at(4)
        scaled(place.folder / "student/model.safetensors")
        if lora is not None:
            with pytest.raises(ConfigError, match=r"student.model/model.safetensors"):
                place.look()
            continue
        (told,) = place.look().changed
        assert "student.model/model.safetensors" in told
        assert "of no effect" in told


def test_moved_and_copied_inputs_of_the_same_content_go_on(stopped: Place, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("teacher", "student"):
        shutil.copytree(stopped.folder / name, moved / name, copy_function=shutil.copyfile)
    shutil.move(stopped.folder / "train.jsonl", moved / "renamed.jsonl")
    (moved / "teacher" / "README.md").write_text("a word about it")
    found = stopped.look(
        f"teacher.model.path={moved}/teacher",
        f"student.model.path={moved}/student",
        f"prompts.path={moved}/renamed.jsonl",
    )
    assert found.after is not None
    assert found.changed == ()


def test_a_folder_of_rows_is_told_by_its_files(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for i in range(3):
        write_rows(rows / f"{i}.jsonl", [chat_row(10 * i + j) for j in range(10)])
    place = Place(tmp_path / "one", {"prompts": {"path": str(rows)}})
    place.stop_at(2)
    assert place.look().changed == ()
    (rows / "0.jsonl").rename(rows / "3.jsonl")
    with pytest.raises(ConfigError, match=r"prompts/0.jsonl \(.*rows\): not there, was \d+ bytes"):
        place.look()


def test_check_refuses_what_train_refuses_and_says_where_a_run_goes_on(
    stopped: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(stopped.file, []) == 0
    assert "earlier steps: goes on after step 4\n" in capsys.readouterr().out
    assert check(stopped.file, ["training.steps=3"]) == 2
    rewritten(stopped.folder / "train.jsonl", last_two_swapped)
    assert check(stopped.file, []) == 2
    assert "prompts" in capsys.readouterr().out
    assert check(stopped.file, ["training.on_changed_inputs=note"]) == 0
    assert "warning      earlier steps: changed since step 4: prompts" in capsys.readouterr().out


def test_check_tells_of_a_damaged_checkpoint_from_which_a_run_cannot_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path / "one")
    place.stop_at(4)
    place.stop_at(6)
    assert check(place.file, []) == 0
    said = capsys.readouterr().out
    assert "earlier steps: goes on after step 6\n" in said
    assert "is damaged" not in said
    rewritten(
        place.folder / "run/checkpoints/step_000006/MANIFEST.json", lambda b: b.replace(b'"step": 6', b'"step": 5')
    )
    assert check(place.file, []) == 0
    said = capsys.readouterr().out
    assert "earlier steps: goes on after step 4\n" in said
    assert "warning      earlier steps: checkpoint of step 6 is damaged and skipped: " in said


def test_a_run_becomes_longer_and_never_shorter_than_it_is(stopped: Place) -> None:
    assert stopped.look("training.steps=16").after is not None
    assert stopped.look("training.steps=4").after is not None
    with pytest.raises(ConfigError, match=r"training.steps: 3 is less than the 4 that are trained; write at least 4"):
        stopped.look("training.steps=3")


def test_epochs_below_what_is_trained_are_refused(tmp_path: Path) -> None:
    place = Place(tmp_path / "one", {"training": {"steps": None, "epochs": 3}})
    for epoch, position, least in ((0, 8, 1), (0, 40, 1), (1, 8, 2), (2, 40, 3)):
        place.stop_at(1, epoch=epoch, position=position)
        assert place.look(f"training.epochs={least}").after is not None
        if least > 1:
            with pytest.raises(ConfigError, match=rf"reaches into epoch {least}; write at least {least}"):
                place.look(f"training.epochs={least - 1}")


def test_a_finished_run_is_finished_until_it_is_to_be_longer(tmp_path: Path) -> None:
    place = Place(tmp_path / "one")
    place.stop_at(8, finished=True)
    assert place.look().finished
    assert place.look("training.save_every=1").finished
    longer = place.look("training.steps=12")
    assert (longer.finished, longer.after and longer.after.step) == (False, 8)
    shutil.rmtree(place.folder / "run" / "checkpoints")
    assert place.look().finished
    with pytest.raises(ConfigError, match="finished and has no checkpoint any more"):
        place.look("training.steps=12")
    with pytest.raises(ConfigError, match=r"another configuration:\n  seed: 1, was 0\n"):
        place.look("seed=1")


def test_what_is_not_content_and_not_length_makes_another_run(stopped: Place) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.5, was 0.003\ngive this one another name"):
        stopped.look("training.steps=20", "optimizer.learning_rate=0.5")
    (stopped.folder / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="checkpoint of another configuration"):
        stopped.look("optimizer.learning_rate=0.5")


def test_what_auto_was_made_of_must_stay(stopped: Place) -> None:
    run = load_run(stopped.file).run
    folder = RunFolder(run_folder(run))
    after = Checkpoints(folder.checkpoints, keep=1).peek()
    assert after is not None
    after.contents["student.dtype"] = "bfloat16"
    assert refuse_changes(run, folder, after, {"student.dtype": "bfloat16"}) == []
    with pytest.raises(ConfigError, match=r"student.dtype: float32, was bfloat16"):
        refuse_changes(run, folder, after, {"student.dtype": "float32"})
    assert stopped.look("student.dtype=bfloat16").after is not None, "to write what was used is no other run"


def test_the_learning_rate_of_another_length_is_told_with_its_numbers(stopped: Place) -> None:
    run = load_run(stopped.file, ["training.steps=16"]).run
    after = stopped.look().after
    assert after is not None
    assert new_length(run, after, 8) is None
    assert new_length(run, None, 16) is None
    text = new_length(run, after, 16)
    assert text is not None
    before, now = (learning_rate(s, settings=run.optimizer, total_steps=n) for s, n in ((4, 8), (5, 16)))
    assert f"(step 4 had {before:.3g}, step 5 gets {now:.3g})" in text
    constant = load_run(stopped.file, ["training.steps=16", "optimizer.schedule=constant"]).run
    assert new_length(constant, after, 16) == "the run has 16 steps now, it had 8"


@pytest.mark.parametrize(("epochs", "total"), [(1, 3), (2, 5), (3, 8)])
def test_a_run_of_epochs_has_as_many_steps_wherever_it_goes_on_and_more_after_a_short_one(
    tmp_path: Path, epochs: int, total: int
) -> None:
    file = tiny_run(tmp_path, {"training": {"steps": None, "epochs": epochs, "sequences_per_step": 4}})
    run = load_run(file).run
    assert total_steps(run, rows_per_epoch=10) == total
    for step in range(total):
        cursor = Cursor(epoch=4 * step // 10, position=4 * step % 10, seed=0)
        assert total_steps(run, rows_per_epoch=10, after=TrainingState(step, cursor, "", 1, 0)) == total
    ended = TrainingState(total, Cursor(epoch=epochs - 1, position=10, seed=0), "", 1, 0)
    assert total_steps(run, rows_per_epoch=10, after=ended) == total
    longer = load_run(file, [f"training.epochs={epochs + 1}"]).run
    assert total_steps(longer, rows_per_epoch=10, after=ended) == total + 3


def test_a_manifest_that_knows_nothing_of_contents_is_gone_on_from(stopped: Place) -> None:
    manifest = stopped.folder / "run/checkpoints/step_000004/MANIFEST.json"
    content = json.loads(manifest.read_text())
    assert "prompts" in content["state"]["contents"]
    after = Checkpoints(manifest.parent.parent, keep=1).peek()
    assert after is not None
    after.contents.clear()
    run, now = load_run(stopped.file).run, {"prompts": "40 bytes, aa", "known.later": "1 byte, bb"}
    assert refuse_changes(run, RunFolder(run_folder(run)), after, now) == []
    after.contents["prompts"] = "40 bytes, aa"
    assert refuse_changes(run, RunFolder(run_folder(run)), after, now) == []


def with_tasks(folder: Path) -> Place:
    """A run of two tasks, the second with rows of its own, that was stopped at step 4."""
    rows, held_out = (
        write_rows(folder.parent / f"{name}.jsonl", [chat_row(60 + i) for i in range(10)]) for name in ("more", "own")
    )
    more = {"prompts": {"path": str(rows)}, "evaluation": {"path": str(held_out)}}
    place = Place(folder, {"tasks": {"chat": {"share": 3}, "more": more}})
    place.stop_at(4, tasks=("chat", "more"))
    assert place.look().after is not None
    return place


def test_a_run_goes_on_with_its_own_tasks_only(tmp_path: Path) -> None:
    place = with_tasks(tmp_path / "one")
    for tasks, now in (
        ("{chat: {}}", "the tasks chat"),
        ("{chat: {}, more: {}, third: {}}", "the tasks chat, more, third"),
        ("{more: {}, chat: {}}", "the tasks more, chat"),
    ):
        with pytest.raises(ConfigError) as refused:
            place.look(f"tasks={tasks}")
        assert f"was trained on the tasks chat, more, and this one has {now}: put them back, or " in str(refused.value)
        assert "give this one another name or folder" in str(refused.value)
    with pytest.raises(ConfigError, match=r"on the tasks chat, more, and this one has one task alone"):
        place.look("tasks={}")
    place.stop_at(4)
    with pytest.raises(ConfigError, match=r"on one task alone, and this one has the tasks chat, more"):
        place.look()


def test_other_shares_or_rows_of_a_task_are_refused_and_named(tmp_path: Path) -> None:
    place = with_tasks(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"tasks.chat.share: 2.0, was 3.0\ngive this one another name or folder"):
        place.look("tasks.chat.share=2")
    rewritten(tmp_path / "own.jsonl", last_two_swapped)
    with pytest.raises(ConfigError, match=r"tasks.more.evaluation \(.*own.jsonl\): "):
        place.look()
    rewritten(tmp_path / "own.jsonl", last_two_swapped)
    rewritten(tmp_path / "more.jsonl", last_two_swapped)
    with pytest.raises(ConfigError, match=r"tasks.more.prompts \(.*more.jsonl\): .*\n.*put back what was there; or"):
        place.look()
    told = place.look("training.on_changed_inputs=note").changed
    assert any(text.startswith("changed since step 4: tasks.more.prompts ") for text in told)


@pytest.mark.parametrize(("before", "now"), [(("chat",), ("chat", "more")), (("chat", "more"), ("chat",))])
def test_check_and_train_say_at_its_line_that_a_task_was_added_or_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: tuple[str, ...], now: tuple[str, ...]
) -> None:
    place = Place(tmp_path / "one")
    base = place.file.read_text()

    def use(tasks: tuple[str, ...]) -> None:
        place.file.write_text(base + "tasks:\n" + "".join(f"  {name}: {{share: 1}}\n" for name in tasks))

    use(before)
    place.stop_at(2, tasks=before)
    use(now)
    assert check(place.file, []) == ConfigError.exit_code
    text = capsys.readouterr().out
    line = len(base.splitlines()) + 1
    assert f"problem      earlier steps: {place.file}:{line}: tasks: the run in " in text
    with pytest.raises(ConfigError, match=rf"^{place.file}:{line}: tasks: the run in "):
        train(place.file, [])
    assert f"was trained on the tasks {', '.join(before)}, and this one has the tasks {', '.join(now)}: put" in text
    assert "give this one another name or folder, or remove the folder to start afresh" in text
