"""Control tokens of sparse labels, named in the configuration, as ids of the teacher's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from configs.labels import Sparse
from configs.refusal import did_you_mean
from configs.rules import station_place
from configs.schema import Run
from configs.section import MAIN
from configs.tasks import ResolvedTask
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.loop.inputs import Inputs


def with_control_ids(run: Run, inputs: Inputs) -> Run:
    """The run with ids in the place of every control token that labels name, the same run where there are none.

    Raises `ConfigError` for a name that is no token, an id outside the vocabulary, and more of them than are kept.
    """
    tasks = {name: task for name, task in run.resolved_tasks().items() if _named(task)}
    if not tasks:
        return run
    labels = {name: _with_ids(run, task, inputs) for name, task in tasks.items()}
    if not run.tasks:
        return run.model_copy(update={"labels": labels[MAIN]})
    changed = {name: run.tasks[name].model_copy(update={"labels": made}) for name, made in labels.items()}
    return run.model_copy(update={"tasks": run.tasks | changed})


def control_tokens(run: Run, inputs: Inputs) -> Mapping[str, tuple[str, ...]]:
    """By place, the control tokens of a run that `with_control_ids` made: `<|im_end|> (2)`."""
    return {
        f"{station_place(run, task, 'labels')}.control_ids": tuple(
            f"{_tokenizer(task, inputs).convert_ids_to_tokens(i)} ({i})" for i in task.labels.control_ids
        )
        for task in run.resolved_tasks().values()
        if _named(task)
    }


def _named(task: ResolvedTask) -> bool:
    return isinstance(task.labels, Sparse) and bool(task.labels.control_ids)


def _with_ids(run: Run, task: ResolvedTask, inputs: Inputs) -> Sparse:
    labels, place = task.labels, f"{station_place(run, task, 'labels')}.control_ids"
    if labels.control_ids == "auto":
        templates = inputs.tasks[task.name]
        ids = [i for name in task.teachers for i in templates.stop_ids_of(name)]
    else:
        size = inputs.vocabulary.of_teacher(task.teachers[0]).size
        ids = [_id(given, _tokenizer(task, inputs), size, place) for given in labels.control_ids]
    ids = list(dict.fromkeys(ids))
    if labels.most and len(ids) > getattr(labels, labels.most):
        kept = f"{labels.most}: {getattr(labels, labels.most)}"
        raise ConfigError(f"{place}: {len(ids)} ids do not fit into {kept}; write {labels.most}: {len(ids)} or more")
    made = labels.model_copy(update={"control_ids": tuple(ids)})
    for term in task.objective:
        if problem := term.problem_with(made):
            raise ConfigError(f"{station_place(run, task, 'objective')}: {problem}")
    return made


def _tokenizer(task: ResolvedTask, inputs: Inputs) -> PreTrainedTokenizerBase:
    """By which the task's teacher reads."""
    if task.align is None:
        return inputs.tokenizer
    return inputs.tasks[task.name].templates[task.teachers[0]].tokenizer


def _id(given: int | str, tokenizer: PreTrainedTokenizerBase, size: int, place: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if isinstance(given, int):
        if given >= size:
            raise ConfigError(f"{place}: id {given} is outside the vocabulary of {size}; write one of 0 to {size - 1}")
        return given
    if given in vocabulary:
        return vocabulary[given]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(given, add_special_tokens=False)["input_ids"])
    special = sorted(tokenizer.get_added_vocab())
    shown = f"; special tokens are {', '.join(special[:12])}" if special else ""
    raise ConfigError(
        f"{place}: '{given}' is no single token of the teacher's tokenizer, which reads {len(pieces)} "
        f"({' '.join(pieces[:6])}){did_you_mean(given, special)}; write a token as it stands in the vocabulary, or its "
        f"id{shown}"
    )
