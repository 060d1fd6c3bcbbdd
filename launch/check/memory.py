"""What `check`, `doctor` and `submit` say of memory: what each role needs, what is offered, and what to change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import psutil
import torch

from cluster.model_files import ModelFiles, find_folder
from cluster.placement.choices import DtypeRule
from cluster.placement.hardware import Hardware
from cluster.placement.memory import verdict
from cluster.placement.memory.needs import Body, KnownSizes, memory_needs, pass_tokens
from cluster.placement.memory.parts import MARGIN, Part, RoleMemory, certain
from cluster.placement.memory.verdict import Offer
from cluster.preflight.finding import Finding, ok, problem, warning
from cluster.preflight.machine import size_text
from cluster.runtime import CPU, GPU
from configs.losses import Features
from configs.models import ModelSource, Trained
from configs.rules import teacher_place
from configs.schema import Run
from launch.model_folder import ModelFacts
from trainer.errors import ConfigError
from trainer.model.load import build_on_meta, load_config
from trainer.model.memory_probe import pass_memory
from trainer.model.sizes import ModelSizes, PassMemory, sizes_of
from trainer.model.trained import choose_trained
from trainer.model.weights import is_quantised

SUBJECT = "memory"
_SHOWN_BYTES = 10**7
MAX_ADVICE = 3
_UNKNOWN = {
    "auto": DtypeRule(GPU, True, ""),
    "gpu": DtypeRule(GPU, True, ""),
    "cpu": DtypeRule(CPU, False, ""),
}
"""By what a run asks for, where its machines are not known: current GPUs, processors of today's laptops."""


def examine_memory(
    run: Run, facts: Mapping[str, ModelFacts], *, label_bytes: int = 0, offer: Offer | None
) -> Iterator[Finding]:
    """Findings about a run on what is offered; None where that is not known here."""
    known = known_sizes(run, facts, label_bytes=label_bytes)
    if known is None:
        yield Finding("not checked", SUBJECT, "it needs all models")
        return
    rule = offer.rule(run) if offer is not None else _UNKNOWN[run.accelerator]
    try:
        roles = memory_needs(run, known, rule)
    except ConfigError as error:  # a dtype that the GPUs do not have
        yield problem(SUBJECT, str(error))
        return
    yield from rows(roles)
    if offer is not None and (rule.accelerator == CPU or offer.gpus):
        yield from beside(run, known, rule, roles, offer)
    else:
        needed = f"{verdict.num_devices(roles)} GPUs, and " if rule.accelerator == GPU else ""
        yield ok(SUBJECT, f"needed: {needed}{size_text(verdict.host_bytes(roles))} of host memory together")


def offer_here(run: Run) -> Offer | None:
    """This machine, where it is the one that the run will use."""
    if run.runtime == "ray" and os.environ.get("RAY_ADDRESS"):
        return None
    offer = Offer.of(Hardware.local(), "this machine", swap_bytes=psutil.swap_memory().total)
    return replace(offer, is_here=True)


# --- what was read of the models --------------------------------------------------------------------------------------


def known_sizes(run: Run, facts: Mapping[str, ModelFacts], *, label_bytes: int) -> KnownSizes | None:
    """None where a model could not be read."""
    places = {name: teacher_place(run, name) for name in run.teachers_by_name()}
    if not {"student", *places.values()} <= facts.keys():
        return None
    quantised, stored = {}, {}
    for name, teacher in run.teachers_by_name().items():
        size, elements = _file_bytes(teacher.model), facts[places[name]].sizes.all
        if size:
            stored[name] = 2 if size < 3 * elements else 4
        if size is not None and is_quantised(load_config(teacher.model, role=f"{places[name]}.model")):
            quantised[name] = size
    return KnownSizes(
        student=_student_sizes(run, facts["student"]),
        body=_body(run),
        teachers={name: facts[place].sizes for name, place in places.items()},
        quantised=quantised,
        label_bytes=label_bytes,
        student_file_bytes=_file_bytes(run.student.model),
        stored=stored,
    )


def _file_bytes(source: ModelSource) -> int | None:
    """Of the weights, where they are on this machine."""
    folder = find_folder(source.path, source.revision)
    return None if folder is None else ModelFiles.of(folder).weight_bytes


def _student_sizes(run: Run, facts: ModelFacts) -> Callable[[Run], ModelSizes]:
    source, own = run.student.model, run.student.trained

    @cache
    def sizes(trained: Trained) -> ModelSizes:
        if trained == own:
            return facts.sizes
        model = build_on_meta(source, load_config(source, role="student.model"), role="student.model")
        with torch.device("meta"):
            choose_trained(model, trained, revision=None)
        return sizes_of(model)

    return lambda changed: sizes(changed.student.trained)


def _body(run: Run) -> Body:
    source, config = run.student.model, load_config(run.student.model, role="student.model")

    @cache
    def measured(
        tokens: int, longest: int, dtype: str, trained: Trained, checkpointing: bool, states: bool
    ) -> PassMemory | None:
        return pass_memory(
            source,
            config,
            tokens=tokens,
            longest=longest,
            dtype=getattr(torch, dtype),
            trained=trained,
            activation_checkpointing=checkpointing,
            keeps_states=states,
        )

    def body(changed: Run, dtype: str) -> PassMemory | None:
        student, tokens = changed.student, pass_tokens(changed)
        longest = min(changed.data.max_length, tokens)
        states = any(isinstance(term, Features) for task in run.resolved_tasks().values() for term in task.objective)
        return measured(tokens, longest, dtype, student.trained, student.activation_checkpointing, states)

    return body


# --- in words ---------------------------------------------------------------------------------------------------------


def rows(roles: Sequence[RoleMemory]) -> Iterator[Finding]:
    """A line a role."""
    width = max(len(role.role) for role in roles)
    for role in roles:
        texts = []
        if role.device:
            texts.append(f"{size_text(role.device_bytes):>8} on each GPU ({described(role.device)})")
        if role.host:
            texts.append(f"{size_text(role.host_bytes):>8} of host memory ({described(role.host)})")
        if role.shared:
            texts.append(f"and once on a machine {described(role.shared)}")
        yield ok(SUBJECT, f"{role.processes:>3} x {role.role:<{width}} {', '.join(texts)}")


def described(parts: Sequence[Part]) -> str:
    """`weights 0.4 GB, optimizer 0.6 GB`: the largest first, what is below 10 MB left out."""
    shown = sorted((part for part in parts if part.num_bytes >= _SHOWN_BYTES), key=lambda part: -part.num_bytes)
    return ", ".join(f"{part.name} {size_text(part.num_bytes)}" for part in shown) or "little"


def beside(
    run: Run, known: KnownSizes, rule: DtypeRule, roles: Sequence[RoleMemory], offer: Offer
) -> Iterator[Finding]:
    """What is needed, beside what is offered."""
    if rule.accelerator == GPU:
        needed, there = verdict.num_devices(roles), len(offer.gpus)
        text = f"{needed} GPUs needed, {offer.where} has {there}"
        advice = "lower ranks, replicas or tensor_parallel_size, or take more"
        short = warning if offer.is_here else problem  # a run that is looked at here may be meant for elsewhere
        yield ok(SUBJECT, text) if needed <= there else short(SUBJECT, text, advice)
        if offer.gpu_bytes is not None:
            for role in roles:
                if role.device:
                    yield from _device(run, known, rule, role, offer)
    if offer.host_bytes is not None:
        yield _host(run, known, rule, roles, offer)


def _device(run: Run, known: KnownSizes, rule: DtypeRule, role: RoleMemory, offer: Offer) -> Iterator[Finding]:
    limit = int(offer.gpu_bytes * role.share)
    share = "" if role.share == 1 else f" (gpu_memory_utilization {role.share:g} of {size_text(offer.gpu_bytes)})"
    offered = f"{size_text(limit)} of a GPU of {offer.where}{share}"
    found = verdict.device_fit(role, offer.gpu_bytes)
    advice = _advice(run, known, rule, role.role, limit) if found != "fits" else ""
    sure = certain(role.device)
    finding = _judged(found, f"{role.place}: on each GPU", role.device_bytes, sure, offered, advice)
    if finding is not None:
        yield finding


def _host(run: Run, known: KnownSizes, rule: DtypeRule, roles: Sequence[RoleMemory], offer: Offer) -> Finding:
    needed = verdict.host_bytes(roles, machines=offer.machines)
    sure = verdict.sure_host_bytes(roles, machines=offer.machines)
    found = verdict.host_fit(roles, offer.host_bytes, machines=offer.machines)
    offered = f"{size_text(offer.host_bytes)} of {offer.where}"
    advice = _advice(run, known, rule, None, offer.host_bytes) if found != "fits" and rule.accelerator == CPU else ""
    finding = _judged(found, "all processes together:", needed, sure, offered, advice)
    return finding or ok(SUBJECT, f"all processes together: {size_text(needed)}, beside {offered}")


def _judged(found: verdict.Fit, who: str, needed: int, sure: int, offered: str, advice: str) -> Finding | None:
    if found == "cannot":
        text = f"{who} weights, optimizer and what else is counted exactly take {size_text(sure)}, and there are"
        return problem(SUBJECT, f"{text} {offered}", advice)
    if found == "over":
        text = f"{who} {size_text(needed)} by the estimate (which may be off by {MARGIN:.0%}), beside {offered}"
        return warning(SUBJECT, text, advice)
    if found == "close":
        text = f"{who} {size_text(needed)}, beside {offered}: close, since the estimate may be off by {MARGIN:.0%}"
        return warning(SUBJECT, text, advice)
    return None


def _advice(run: Run, known: KnownSizes, rule: DtypeRule, role: str | None, limit: int) -> str:
    """The cheapest settings that fit, with what they then need; where none does, the one that needs least."""
    found = list(verdict.savings(run, known, rule, role))
    fitting = [(text, needed) for text, needed in found if needed <= limit][:MAX_ADVICE]
    if fitting:
        return "write " + ", or ".join(f"{text} ({size_text(needed)})" for text, needed in fitting)
    if not found:
        return "no setting lowers it enough: a smaller model, or a device with more memory"
    text, needed = min(found, key=lambda one: one[1])
    return f"the least is {size_text(needed)}, with {text}: a smaller model, or a device with more memory"
