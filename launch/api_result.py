"""What a run has made, for Python: numbers as tables, answers, the student."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.load import load_run
from configs.schema import Run
from launch.report.artifacts import Generations, read_generations
from launch.report.metrics import Records, evaluation_values, read_metrics
from trainer.errors import ConfigError
from trainer.run_folder import Ending, RunFolder

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, str]]
"""What a user says, or a conversation as `[{"role": "user", "content": ...}, ...]`."""


class RunResult:
    """A run folder, read. What a run is still writing is read anew at each call; the student is loaded once.

    What is missing or cannot be read is a `UserWarning` that names it, and is left out.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        trained = folder.exit.exists() or folder.student.exists() or any(folder.checkpoints.glob("*"))
        if trained and not folder.metrics.exists():
            _warn(
                f"{folder.path} has no {folder.metrics.name}: its steps and evaluations are empty; was it copied whole?"
            )

    @property
    def folder(self) -> Path:
        return self._folder.path

    @property
    def config(self) -> Run:
        """With all defaults. Raises `ConfigError` where it was edited to something else."""
        return load_run(self._folder.config).run

    @property
    def ending(self) -> Ending | None:
        """Exit code and reason; None where the run has not ended."""
        return self._folder.ending()

    @property
    def steps(self) -> pandas.DataFrame:
        """A row for each optimizer step, by its number; columns as docs/metrics.md names them, `train/loss`."""
        return _table({record.step: record.values for record in self._metrics().steps})

    @property
    def evaluations(self) -> pandas.DataFrame:
        """A row for each evaluation, by its step; columns as in docs/metrics.md without `evaluation/`: `forward_kl`."""
        return _table(
            {record.step: evaluation_values(record) for record in read_metrics(self._folder, tell=_warn).evaluations}
        )

    @property
    def generations(self) -> Generations:
        """Held-out `prompts`, and lists of the answers to them: `before`, `after`, `teacher`, `reference`."""
        return read_generations(self._folder, tell=_warn)

    @property
    def report(self) -> Path:
        """The page of the run, for a browser; written if it is not there."""
        from launch.report.page import write_report

        return self._folder.report if self._folder.report.exists() else write_report(self._folder)

    @property
    def student_folder(self) -> Path:
        """A model folder, or that of a LoRA adapter. Raises `ConfigError` where the run has made none yet."""
        if not any(self._folder.student.glob("*.safetensors")):
            raise ConfigError(f"{self.folder} holds no student yet; let the run come to its end")
        return self._folder.student

    def student(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, ready to answer, in the dtype it was trained in; with an adapter on its base model."""
        return self._student

    @cached_property
    def _student(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from launch.export_check import load_exported

        return load_exported(self.student_folder, self.config)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 128, **sampling: Any) -> list[str]:
        """The student's answers, one after the other in this process; greedy, or as `sampling` says: `do_sample=True`,
        `temperature` and what else transformers' `generate` takes.

        A text is what a user says where the model has a chat template, and the beginning of a text where it has none.
        """
        import torch

        model, tokenizer = self.student()
        if isinstance(prompts, str):
            raise TypeError("prompts is a list: write generate([prompt])")
        options = {"do_sample": False, **sampling, "max_new_tokens": max_new_tokens}
        answers = []
        for prompt in prompts:
            ids = _encode(tokenizer, prompt)
            with torch.inference_mode():
                written = model.generate(**ids, pad_token_id=_padding(tokenizer), **options)
            answers.append(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        return answers

    def export(
        self,
        target: str | Path,
        *,
        merge_adapter: bool = False,
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    ) -> Path:
        """The student as a folder with its model card, as `stillhouse export` writes it; returns the folder."""
        from launch.export import export

        export(self.folder, Path(target), merge_adapter=merge_adapter, dtype=dtype)
        return Path(target)

    def _metrics(self) -> Records:
        return read_metrics(self._folder, tell=_warn)

    def __repr__(self) -> str:
        found = self._metrics()
        last = found.steps[-1].step if found.steps else 0
        parts = [f"{last:,} steps"]
        if found.evaluations and found.evaluations[-1].forward_kl is not None:
            first, now = found.evaluations[0].forward_kl, found.evaluations[-1].forward_kl
            parts.append(f"held-out KL {first:.3f} -> {now:.3f} nats per {found.evaluations[-1].kl_unit}")
        return f"RunResult({str(self.folder)!r}: {', '.join(parts)})"

    def _repr_html_(self) -> str:
        """The report, in a frame of its own: its styles and its script touch nothing of the notebook."""
        from launch.report.page import render

        page = escape(render(self._folder))
        return (
            f'<p><code>{escape(repr(self))}</code></p><iframe title="report" sandbox="allow-scripts" srcdoc="{page}" '
            'style="width:100%;height:640px;border:1px solid #8884"></iframe>'
        )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _table(rows: Mapping[int, Mapping[str, float]]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("step")


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Any:
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
