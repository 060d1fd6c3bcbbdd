"""README.md of an exported student: what it is, who taught it on what, how well, under which licences, how to load it.

It says only what the run knows. A licence that is not stated is "not stated", a local folder appears by its name alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from configs.held_out import held_out_sets
from configs.losses import Term
from configs.prompts import Dataset
from configs.rules import held_out_by_place, prompts_by_place, teachers_by_place
from configs.schema import Run
from configs.stations import Choice
from configs.tasks import ResolvedTask
from launch import templates
from launch.report.exactness import exactness_of
from launch.report.metrics import NOTICEABLE_PADDING, Records
from launch.report.numbers import fixed, share
from trainer.types import Evaluation

NOT_STATED = "not stated"

_HUB_LICENCES = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause "
    "bsd-3-clause cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 "
    "gemma gpl-2.0 gpl-3.0 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 mit mpl-2.0 odc-by openrail "
    "openrail++ osl-3.0 unlicense wtfpl"
)
"""Identifiers that the hub's metadata knows; any other name is written as `license: other` with its name."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the quality table; texts."""

    name: str
    before: str
    after: str
    teacher: str


def model_card(
    run: Run,
    *,
    manifest: Mapping[str, Any],
    records: Records,
    adapter: bool = False,
    stored_dtype: str = "",
    licences: Mapping[str, str | None] | None = None,
) -> str:
    """Markdown with YAML front matter. `adapter`: the folder holds a LoRA adapter alone.

    `licences` holds what is known beyond the configuration, for the keys `student` (its base) and `teacher`.
    """
    teachers = teachers_by_place(run)
    tasks = run.resolved_tasks()
    own = {place: teacher.model.licence for place, teacher in teachers.items()}
    known = {"student": run.student.model.licence, **own, **(licences or {})}
    return templates.render(
        Path(__file__).with_name("model_card.jinja"),
        {"cell": _cell},
        front=_front_matter(run, known["student"], records, adapter=adapter),
        run=run,
        adapter=adapter,
        base=public_name(run.student.model.path),
        base_licence=known["student"] or NOT_STATED,
        teacher=", ".join(public_name(one.model.path) for one in teachers.values()) or "none: hard labels",
        teachers=[
            (f"teacher {one.name}" if run.teachers else "teacher", one.model, known[place] or NOT_STATED)
            for place, one in teachers.items()
        ],
        datasets=_datasets(run),
        public_name=public_name,
        public_names=public_names,
        quality=_quality(records),
        compared=[name for name, task in tasks.items() if task.has_reference],
        only_compared=all(task.has_reference for task in tasks.values()),
        evaluated=records.evaluations[-1] if records.evaluations else None,
        settings=_settings(run, manifest, records, stored_dtype=stored_dtype),
        versions=manifest.get("versions") or {},
        NOT_STATED=NOT_STATED,
    )


def _datasets(run: Run) -> list[tuple[str, Dataset]]:
    """(what for, dataset)."""
    training = (("training", dataset) for dataset in prompts_by_place(run).values())
    return [*training, *(("held out", dataset) for dataset in held_out_by_place(run).values())]


def public_names(dataset: Dataset) -> str:
    """Of all paths of a dataset, or what fraction of the training rows it is."""
    return ", ".join(public_name(path) for path in dataset.paths) or dataset.name


def public_name(path: str) -> str:
    """A hub name as it is; of a local folder, a file or a URL its own name, since its location is private."""
    return path if is_hub_name(path) else Path(path).name


def is_hub_name(path: str) -> bool:
    """`owner/name` that is not also something on this disk."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None and not Path(path).expanduser().exists()


def _front_matter(run: Run, licence: str | None, records: Records, *, adapter: bool) -> str:
    """The hub's metadata, as YAML; held-out numbers of the exported student are evaluation results."""
    card = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "knowledge-distillation", "stillhouse", *(["lora"] if adapter else [])],
        model_name=run.name,
        eval_results=_results(run, records),
    )
    if is_hub_name(run.student.model.path):
        card.base_model, card.base_model_relation = run.student.model.path, "adapter" if adapter else "finetune"
    if licence is not None:
        known = licence.lower() in _HUB_LICENCES.split()
        card.license, card.license_name = (licence.lower(), None) if known else ("other", licence)
    datasets = [path for _, dataset in _datasets(run) for path in dataset.paths if is_hub_name(path)]
    card.datasets = list(dict.fromkeys(datasets)) or None
    return card.to_yaml()


def _results(run: Run, records: Records) -> list[EvalResult] | None:
    """Of each set of held-out rows."""
    sets = held_out_sets(run)
    if not records.evaluations or not sets:
        return None
    last = records.evaluations[-1]
    measured = dict.fromkeys(sets, last) if len(sets) == 1 else last.tasks
    results = []
    for name, one in measured.items():
        if name in sets:
            dataset = public_names(sets[name].rows)
            config = None if len(sets) == 1 else name
            values = {"forward_kl": one.forward_kl, "agreement": one.agreement, "perplexity": one.perplexity}
            results += [
                EvalResult("text-generation", dataset, dataset, metric, round(value, 6), dataset_config=config)
                for metric, value in values.items()
                if value is not None and math.isfinite(value)
            ]
    return results or None


def _quality(records: Records) -> list[Row]:
    """In sum, then of each task."""
    if not records.evaluations:
        return []
    first, last = records.evaluations[0], records.evaluations[-1]
    of_tasks = (
        row
        for name, one in last.tasks.items()
        if name in first.tasks
        for row in _measured(first.tasks[name], one, name)
    )
    return [*_measured(first, last, "all tasks" if last.tasks else ""), *of_tasks]


def _measured(first: Evaluation, last: Evaluation, task: str) -> list[Row]:
    """Without what no teacher scored."""
    of = f"{task}: " if task else ""
    rows = []
    if first.forward_kl is not None and last.forward_kl is not None:
        kl = (fixed(one, 3) for one in (first.forward_kl, last.forward_kl))
        rows.append(Row(f"{of}KL(teacher, student), nats per {last.kl_unit}", *kl, "0"))
    if first.agreement is not None and last.agreement is not None:
        rows.append(Row(f"{of}agreement of first choices", share(first.agreement), share(last.agreement), "100%"))
    teacher = "" if last.teacher_perplexity is None else fixed(last.teacher_perplexity, 2)
    rows.append(Row(f"{of}perplexity", fixed(first.perplexity, 2), fixed(last.perplexity, 2), teacher))
    if max(first.padding_mass, last.padding_mass) >= NOTICEABLE_PADDING:
        padding = (f"{one.padding_mass:.2%}" for one in (first, last))
        rows.append(Row(f"{of}probability on ids that do not exist", *padding, ""))
    return rows


def _stations(run: Run, task: ResolvedTask) -> list[tuple[str, str]]:
    rows = [
        ("objective", " + ".join(_term(term) for term in task.objective)),
        ("soft labels", _choice(task.labels)),
        ("answers written by", _choice(task.answers)),
    ]
    if not run.tasks:
        return rows
    rows += [("weight, share", f"{task.weight:g}, {task.share:g}"), ("teachers", ", ".join(task.teachers))]
    return [(f"{task.name}: {name}", text) for name, text in rows]


def _settings(run: Run, manifest: Mapping[str, Any], records: Records, *, stored_dtype: str) -> list[tuple[str, str]]:
    counters = manifest.get("counters") or {}
    training, optimizer, lora = run.training, run.optimizer, run.student.lora
    rows = [
        *(row for task in run.resolved_tasks().values() for row in _stations(run, task)),
        ("training loss is", "; ".join(f"{name}: {found}" for name, found in exactness_of(run).items())),
        ("answers of the teacher", _answers(counters)),
        ("optimizer steps", f"{records.steps[-1].step:,}" if records.steps else ""),
        ("sequences per step", f"{training.sequences_per_step:,}"),
        ("tokens trained", _count(counters, "trained_tokens")),
        ("tokens in the loss", _count(counters, "trained_loss_tokens")),
        ("maximal length", f"{run.data.max_length:,} tokens"),
        ("variables of the chat template", _template_arguments(run)),
        (
            "optimizer",
            f"AdamW, peak learning rate {optimizer.learning_rate:g}, {optimizer.schedule} schedule, "
            f"{optimizer.warmup_steps} warm-up steps, weight decay {optimizer.weight_decay:g}, "
            f"gradient norm clipped at {optimizer.max_grad_norm:g}",
        ),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}" if lora else ""),
        ("frozen", ", ".join(run.student.freeze)),
        ("precision", _precision(run, manifest)),
        ("weights stored in", stored_dtype),
        ("sharding", f"DeepSpeed ZeRO-{run.student.zero_stage}, {run.student.ranks} rank(s)"),
        ("seed", str(run.seed)),
    ]
    return [(name, value) for name, value in rows if value]


def _template_arguments(run: Run) -> str:
    """Whoever asks the student gives its template the same."""
    given = {place: teacher.template_arguments for place, teacher in teachers_by_place(run).items()}
    texts = {place: ", ".join(f"{k}={json.dumps(v)}" for k, v in one.items()) for place, one in given.items() if one}
    return "; ".join(texts.values() if len(given) == 1 else (f"{place}: {text}" for place, text in texts.items()))


def _precision(run: Run, manifest: Mapping[str, Any]) -> str:
    """What was used; "auto" alone says nothing."""
    used = ((manifest.get("roles") or {}).get("student") or {}).get("dtype") or run.student.dtype
    return "" if used == "auto" else str(used)


def _term(term: Term) -> str:
    said = {name: value for name, value in term if name not in Term.model_fields}
    said = {name: value for name, value in said.items() if value is not False and value is not None}
    texts = {name: value if isinstance(value, str) else f"{value:g}" for name, value in said.items()}
    chosen = ", ".join(name if said[name] is True else f"{name} {text}" for name, text in texts.items())
    name = f"{term.loss} ({chosen})" if chosen else term.loss
    return name if term.weight == 1 else f"{term.weight:g} x {name}"


def _choice(choice: Choice) -> str:
    chosen = ", ".join(f"{name}: {value}" for name, value in choice.flat().items() if name != "kind")
    return f"{choice.kind} ({chosen})" if chosen else choice.kind


def _answers(counters: Mapping[str, Any]) -> str:
    if "answers_written" not in counters:
        return ""
    names = ("written", "empty", "cut_off", "dropped")
    return ", ".join(f"{counters[f'answers_{name}']:,} {name.replace('_', ' ')}" for name in names)


def _count(counters: Mapping[str, Any], name: str) -> str:
    return f"{counters[name]:,}" if name in counters else ""


def _cell(value: object) -> str:
    """Untrusted text as one escaped line of Markdown."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", line)
