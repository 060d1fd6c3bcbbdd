"""`python -m benchmarks draft`: how many tokens a student saves its teacher as the draft model of speculative decoding.

The student writes a few tokens, the teacher judges them in one call and keeps those that it would have written itself
(arXiv 2211.17192): the text is the teacher's own. Sides, one engine after the other, on the same prompts, greedily:
the teacher alone, with the student as it was before training where that is known, and with the student.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.draft_worker import Drafted, DraftSetup, Prompts
from benchmarks.worker import Worker
from cluster.placement.hardware import Hardware
from cluster.runtime import CPU, GENERATOR, GPU, environment
from configs.load import load_run
from configs.models import ModelSource
from trainer.data.chat import Template
from trainer.data.vocabulary import load_tokenizer, tokenizer_difference
from trainer.errors import ConfigError
from trainer.records import read_lines
from trainer.run_folder import RunFolder

ALONE, BEFORE, STUDENT = "teacher alone", "student before training", "student"


@dataclass(frozen=True, slots=True)
class DraftPlan:
    student: Path  # a run folder, or a model folder
    teacher: Path
    prompts: Path  # JSON lines with `prompt`, a text or messages
    num_prompts: int
    num_draft_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class DraftResult:
    sides: Mapping[str, Drafted]
    num_prompts: int
    num_draft_tokens: int

    def same_text(self, side: str) -> int:
        """Prompts whose answer is that of the teacher alone, token by token."""
        return sum(a == b for a, b in zip(self.sides[side].answers, self.sides[ALONE].answers, strict=True))

    def to_json(self) -> dict[str, Any]:
        sides = {}
        for name, side in self.sides.items():
            numbers = asdict(side) | {"acceptance": acceptance(side), "tokens_per_call": tokens_per_call(side)}
            del numbers["answers"]
            sides[name] = numbers | {"tokens": num_tokens(side), "same_text": self.same_text(name)}
        return {"num_prompts": self.num_prompts, "num_draft_tokens": self.num_draft_tokens, "sides": sides}

    def table(self) -> Table:
        table = Table(title=f"{self.num_prompts} prompts answered greedily, drafts of {self.num_draft_tokens} tokens")
        table.add_column("who drafts")
        columns = ("accepted", "by place in the draft", "tokens per teacher call", "same text", "CPU-ms per token")
        for column in columns:
            table.add_column(column, justify="right")
        for name, side in self.sides.items():
            places = " ".join(f"{count / side.calls:.0%}" for count in side.accepted_at) if side.calls else ""
            table.add_row(
                "nobody" if name == ALONE else name,
                f"{acceptance(side):.1%}" if side.drafted else "",
                places,
                f"{tokens_per_call(side):.2f}",
                f"{self.same_text(name)} of {self.num_prompts}",
                f"{1000 * side.cpu.total_s / num_tokens(side):.1f}",
            )
        return table


def num_tokens(side: Drafted) -> int:
    return sum(map(len, side.answers))


def acceptance(side: Drafted) -> float:
    """Accepted tokens of those drafted; a token after a refused one counts as refused."""
    return side.accepted / side.drafted if side.drafted else 0.0


def tokens_per_call(side: Drafted) -> float:
    """What is accepted, and the one that the teacher's call itself gives."""
    return 1 + side.accepted / side.calls if side.calls else 1.0


def draft(plan: DraftPlan, work: Path, *, note: Callable[[str], None]) -> DraftResult:
    """Measure; `work` is an empty folder, and `note` is told what goes on. Raises ConfigError where the folders cannot
    speak to each other."""
    students = students_of(plan.student)
    tokenizer = load_tokenizer(ModelSource(path=str(plan.teacher)))
    for name, folder in students.items():
        difference = tokenizer_difference(tokenizer, load_tokenizer(ModelSource(path=str(folder))))
        if difference is not None:
            raise ConfigError(f"{name}: the tokenizer of {folder} is not that of {plan.teacher}: {difference}")
    question = _question(plan, tokenizer)
    return asyncio.run(_measure(plan, students, question, work, note))


def students_of(place: Path) -> dict[str, Path]:
    """Model folders by side: of a run folder its student, and what that was before training where it is a folder."""
    folder = RunFolder(place)
    if not folder.config.is_file():
        return {STUDENT: place}
    if not (folder.student / "config.json").is_file():
        adapter = (folder.student / "adapter_config.json").is_file()
        hint = f"stillhouse export {place} my-student --merge-adapter, and name my-student" if adapter else "let it end"
        raise ConfigError(f"{place} holds no whole student: {hint}")
    before = Path(load_run(folder.config).run.student.model.path).expanduser()
    return ({BEFORE: before} if before.is_dir() else {}) | {STUDENT: folder.student}


def _question(plan: DraftPlan, tokenizer: Any) -> Prompts:
    rows = read_lines(plan.prompts)[: plan.num_prompts]
    prompts = [row.get("prompt") for row in rows if isinstance(row, dict)]
    if not prompts or not all(prompts):
        raise ConfigError(f"{plan.prompts}: each line must be an object with a prompt, a text or messages")
    ids = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        ids.append(tuple(encoded["input_ids"]))
    return Prompts(tuple(ids), plan.max_new_tokens, tuple(Template.of(tokenizer).stop_ids))


async def _measure(
    plan: DraftPlan, students: Mapping[str, Path], question: Prompts, work: Path, note: Callable[[str], None]
) -> DraftResult:
    accelerator = GPU if Hardware.local().num_gpus else CPU
    longest = max(map(len, question.token_ids)) + plan.max_new_tokens + plan.num_draft_tokens + 1
    sides: dict[str, Drafted] = {}
    for name, student in {ALONE: None, **students}.items():
        note(f"starting vLLM: {name}")
        setup = DraftSetup(plan.teacher, student, plan.num_draft_tokens, longest, on_cpu=accelerator == CPU)
        log = work / f"{name.replace(' ', '-')}.log"
        settings = environment(GENERATOR, accelerator, offline=True)
        worker = await Worker.start("benchmarks.draft_worker", setup, environment=settings, log=log)
        try:
            sides[name] = await worker.ask(question)
        finally:
            await worker.close()
        side = sides[name]
        note(f"{name}: {num_tokens(side)} tokens, {side.accepted} of {side.drafted} drafted ones accepted")
    return DraftResult(sides, len(question.token_ids), plan.num_draft_tokens)
