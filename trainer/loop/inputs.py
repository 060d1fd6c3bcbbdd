"""How text becomes tokens in each task of a run: tokenizers, templates, who writes the answers.

Needs no hardware and comes first, since `cluster/placement/resolve.py` asks for what is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from configs.answers import ANSWERS
from configs.models import Teacher
from configs.rules import teacher_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.data.chat import Template
from trainer.data.vocabulary import SharedVocabulary, check_pair, load_tokenizer
from trainer.errors import ConfigError
from trainer.model.generation_settings import end_ids
from trainer.protocols import AnswerSource


@dataclass(frozen=True)
class TaskInputs:
    """How text becomes tokens in one task, and who writes the answers."""

    templates: Mapping[str, Template]
    """By teacher, all with one text; under an empty name where the run has no teacher."""
    answers: AnswerSource
    end_ids: Mapping[str, tuple[int, ...]]
    """The ids that end a text by the generation settings of each teacher; none is padding. Names as in `templates`."""

    @property
    def template(self) -> Template:
        """Of the first teacher."""
        return next(iter(self.templates.values()))

    def stop_ids_of(self, teacher: str) -> tuple[int, ...]:
        """The ids after which a teacher writes nothing more: those of its template and tokenizer, and its `end_ids`.
        Raises `ConfigError` for a template from which no student could learn to stop; where nothing is written nobody
        asks."""
        return tuple(dict.fromkeys([*self.templates[teacher].stop_ids, *self.end_ids[teacher]]))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Of the first teacher."""
        return self.stop_ids_of(next(iter(self.end_ids)))


@dataclass(frozen=True)
class Inputs:
    """The tokenizer that all models share, and the tasks by name."""

    vocabulary: SharedVocabulary
    tokenizer: PreTrainedTokenizerBase
    tasks: Mapping[str, TaskInputs]

    @property
    def first(self) -> TaskInputs:
        """Of the first task: what the exported student's tokenizer is given."""
        return next(iter(self.tasks.values()))


def read_inputs(run: Run) -> Inputs:
    """Tokenizers, templates and who writes the answers. Raises ConfigError where models do not fit together."""
    teachers = run.teachers_by_name()
    sources = {name: teacher.model for name, teacher in teachers.items()} or {"": run.student.model}
    tokenizers = {name: load_tokenizer(source) for name, source in sources.items()}
    vocabularies = [
        check_pair(source, run.student.model, tokenizer=tokenizers[name]) for name, source in sources.items()
    ]
    tasks = {name: _task_inputs(run, task, tokenizers, vocabularies[0]) for name, task in run.resolved_tasks().items()}
    return Inputs(vocabularies[0], next(iter(tokenizers.values())), tasks)


def _task_inputs(
    run: Run, task: ResolvedTask, tokenizers: Mapping[str, PreTrainedTokenizerBase], vocabulary: SharedVocabulary
) -> TaskInputs:
    """Raises ConfigError where the teachers of a route or an ensemble read conversations by different templates."""
    teachers = run.teachers_by_name()
    names = task.teachers or tuple(teachers)[:1]
    if not names:
        templates, models = {"": Template.of(tokenizers[""])}, {"": run.student.model}
    else:
        templates = {name: _template(run, name, teachers[name], tokenizers[name]) for name in names}
        models = {name: teachers[name].model for name in names}
    template = next(iter(templates.values()))
    for name, other in templates.items():
        of_one = "route" if task.ensemble is None else "ensemble"
        differs = "chat_template" if other.saved != template.saved else "template_arguments"
        if (other.saved, other.arguments) != (template.saved, template.arguments):
            raise ConfigError(
                f"the teachers {names[0]} and {name} of one {of_one} have different {differs.replace('_', ' ')}s: give "
                f"them the same teachers.<name>.{differs}, or each a task of its own"
            )
    ends = {name: tuple(i for i in end_ids(model) if i < vocabulary.size) for name, model in models.items()}
    return TaskInputs(templates, ANSWERS.load(task.answers), ends)


def _template(run: Run, name: str, teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Raises ConfigError, at the place of the teacher, for arguments that the template does not read."""
    template = Template.of(tokenizer, teacher.chat_template)
    try:
        return template.given(teacher.template_arguments)
    except ConfigError as error:
        raise ConfigError(f"{teacher_place(run, name)}.{error}") from None
