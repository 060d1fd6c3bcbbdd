"""How text becomes tokens in each task of a run: tokenizers, templates, who writes the answers.

Needs no hardware and comes first, since `cluster/placement/resolve.py` asks for what is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from configs.answers import ANSWERS
from configs.models import Teacher
from configs.rules import teacher_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.align.pair import align_texts, teacher_vocabulary
from trainer.align.texts import Side, TextAligner
from trainer.data.chat import Template
from trainer.data.vocabulary import SharedVocabulary, check_pair, fingerprint, load_tokenizer, model_rows, size_of
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
    aligners: Mapping[str, TextAligner] = field(default_factory=dict)
    """Where the task is aligned, by teacher: how its texts and the student's belong together."""

    @property
    def aligner(self) -> TextAligner | None:
        """Of the first teacher; the student's side of all is the same."""
        return next(iter(self.aligners.values()), None)

    def aligner_of(self, teacher: str) -> TextAligner | None:
        """Of a teacher; without a name of the only one."""
        return self.aligners.get(teacher, self.aligner)

    @property
    def template(self) -> Template:
        """By which the student reads: of the first teacher, or in an aligned task its own."""
        return next(iter(self.templates.values())) if self.aligner is None else self.aligner.student.template

    def stop_ids_of(self, teacher: str) -> tuple[int, ...]:
        """The ids after which a teacher writes nothing more: those of its template and tokenizer, and its `end_ids`.
        Raises `ConfigError` for a template from which no student could learn to stop; where nothing is written nobody
        asks."""
        return tuple(dict.fromkeys([*self.templates[teacher].stop_ids, *self.end_ids[teacher]]))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Those of the student: of the first teacher, or in an aligned task its own."""
        if self.aligner is not None:
            return tuple(dict.fromkeys([*self.template.stop_ids, *sorted(self.aligner.student.ends)]))
        return self.stop_ids_of(next(iter(self.end_ids)))


@dataclass(frozen=True)
class Inputs:
    """The tokenizer of the student, which teachers share that are not aligned, and the tasks by name."""

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
    tasks = run.resolved_tasks().values()
    aligned = {name for task in tasks if task.align is not None for name in task.teachers}
    shared = {name for task in tasks if task.align is None for name in task.teachers} | (sources.keys() - aligned)
    vocabularies = [
        check_pair(source, run.student.model, tokenizer=tokenizers[name])
        for name, source in sources.items()
        if name in shared
    ]
    if not aligned:
        made = {task.name: _task_inputs(run, task, tokenizers, vocabularies[0]) for task in tasks}
        return Inputs(vocabularies[0], next(iter(tokenizers.values())), made)
    own = load_tokenizer(run.student.model)
    vocabulary = vocabularies[0] if vocabularies else _of_student(run, own)
    made = {task.name: _aligned(run, task, _task_inputs(run, task, tokenizers, vocabulary), own) for task in tasks}
    others = {
        name: teacher_vocabulary(aligner, sources[name])
        for one in made.values()
        for name, aligner in one.aligners.items()
    }
    return Inputs(replace(vocabulary, others=others), own, made)


def _of_student(run: Run, tokenizer: PreTrainedTokenizerBase) -> SharedVocabulary:
    """Where no teacher has its tokenizer."""
    size = size_of(tokenizer)
    rows = model_rows(run.student.model, size)
    return SharedVocabulary(size, fingerprint(tokenizer), teacher_rows=rows, student_rows=rows)


def _aligned(run: Run, task: ResolvedTask, made: TaskInputs, student: PreTrainedTokenizerBase) -> TaskInputs:
    """With its alignment to each teacher, where the task has one."""
    if task.align is None or not task.teachers:
        return made
    own, aligners = run.student.model, {}
    reads = Side.of(Template.of(student), end_ids(own), name=f"student.model: the tokenizer of {own.path}")
    for name in task.teachers:
        path = run.teachers_by_name()[name].model.path
        where = f"{teacher_place(run, name)}.model: the tokenizer of {path}"
        teacher = Side.of(made.templates[name], made.end_ids[name], name=where)
        aligners[name] = align_texts(task.align, teacher, reads, max_length=run.data.max_length)
    return replace(made, aligners=aligners)


def _task_inputs(
    run: Run, task: ResolvedTask, tokenizers: Mapping[str, PreTrainedTokenizerBase], vocabulary: SharedVocabulary
) -> TaskInputs:
    """Raises ConfigError where the teachers of a route or an ensemble read conversations by different templates, unless
    each is aligned."""
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
        same = (other.saved, other.arguments) == (template.saved, template.arguments)
        if not same and task.align is None:
            raise ConfigError(
                f"the teachers {names[0]} and {name} of one {of_one} have different {differs.replace('_', ' ')}s: give "
                f"them the same teachers.<name>.{differs}, or each a task of its own"
            )
    sizes = {name: vocabulary.size if task.align is None else size_of(tokenizers[name]) for name in models}
    ends = {name: tuple(i for i in end_ids(model) if i < sizes[name]) for name, model in models.items()}
    return TaskInputs(templates, ANSWERS.load(task.answers), ends)


def _template(run: Run, name: str, teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Raises ConfigError, at the place of the teacher, for arguments that the template does not read."""
    template = Template.of(tokenizer, teacher.chat_template)
    try:
        return template.given(teacher.template_arguments)
    except ConfigError as error:
        raise ConfigError(f"{teacher_place(run, name)}.{error}") from None
