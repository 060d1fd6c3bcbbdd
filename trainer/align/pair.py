"""Teacher and student of an aligned task, put side by side before anything starts."""

from __future__ import annotations

from configs.alignment import ALIGNMENTS, Alignment
from configs.models import ModelSource
from trainer.align.texts import Side, TextAligner
from trainer.align.vocabularies import match_ids
from trainer.data.vocabulary import TeacherVocabulary, fingerprint, model_rows, size_of
from trainer.errors import ConfigError


def align_texts(parameters: Alignment, teacher: Side, student: Side, *, max_length: int) -> TextAligner:
    """The alignment of a task. Raises `ConfigError` for a student that cannot read what the teacher can, or could not
    learn to stop."""
    if teacher.template.text is not None and student.template.text is None:
        raise ConfigError(
            "student.model: its tokenizer has no chat template, by which it would read conversations in its own "
            "tokens: put a chat_template.jinja into its folder"
        )
    roles = _roles(teacher, student)
    if not roles:
        raise ConfigError("student.model: its tokenizer has no eos_token, by which an answer ends; name one in its "
                          "tokenizer_config.json")  # fmt: skip
    table = match_ids(teacher.tokens, student.tokens, roles=roles)
    return TextAligner(ALIGNMENTS.load(parameters), parameters, student, teacher, table, roles, max_length)


def teacher_vocabulary(aligner: TextAligner, source: ModelSource) -> TeacherVocabulary:
    tokenizer = aligner.teacher.template.tokenizer
    size = size_of(tokenizer)
    return TeacherVocabulary(size, fingerprint(tokenizer), model_rows(source, size), aligner.table)


def _roles(teacher: Side, student: Side) -> dict[int, int]:
    """Ids of the student by the teacher's, of the ends of turns and then of texts; each id once."""
    one, other = teacher.template, student.template
    turns = zip(one.end_of_turn_ids, other.end_of_turn_ids, strict=False)
    roles: dict[int, int] = {}
    for mine, theirs in (*turns, (one.tokenizer.eos_token_id, other.tokenizer.eos_token_id)):
        if None not in (mine, theirs) and mine not in roles and theirs not in roles.values():
            roles[mine] = theirs
    return roles
