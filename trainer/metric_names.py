"""The numbers of a run: every name in metrics.jsonl, its unit and its meaning.

This is the contract. Trackers and Prometheus have the same names, docs/metrics.md is made of them, and a test holds
whole runs against them, in both directions. A name is `{area}/{name}`, with the unit at its end where it has one
(`_s`, `_bytes`, `_tokens`); parts in `<...>` are words of the configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from configs.losses import LOSSES, TOKEN_WEIGHTS
from configs.stations import DOTTED_NAME

TERM = rf"(?:{'|'.join(LOSSES.kinds())}|{DOTTED_NAME.pattern})(?:_\d+)?"
OWN = rf"(?:t|hard_share|ratio|truncated|weight_(?:{'|'.join(TOKEN_WEIGHTS.kinds())}|[A-Za-z_]\w*)|difficulty_keep)"
PARTS = {"<task>": r"[^/]+", "<teacher>": r"[^/]+", "<term>": TERM, "<own>": OWN}


@dataclass(frozen=True, slots=True)
class Metric:
    """A number, or a family of them."""

    name: str
    unit: str
    meaning: str
    kind: Literal["step", "evaluation"] = "step"
    summed: bool = False  # whether the sum over steps means something

    def matches(self, name: str) -> bool:
        """Whether `name` is one of this family."""
        return re.fullmatch("".join(PARTS.get(part) or re.escape(part) for part in self.parts), name) is not None

    @property
    def parts(self) -> list[str]:
        return re.split(r"(<\w+>)", self.name)


def _of_evaluation(name: str, unit: str, meaning: str) -> Metric:
    return Metric(f"evaluation/{name}", unit, meaning, kind="evaluation")


EVALUATION = (
    _of_evaluation("num_rows", "rows", "rows that were evaluated: tokens of answers, each with its prediction"),
    _of_evaluation("forward_kl", "nats per row", "KL(teacher, student) over the whole vocabulary, whatever is trained"),
    _of_evaluation("agreement", "share", "rows where the likeliest id is the same for student and teacher"),
    _of_evaluation("perplexity", "", "of the student on the target ids: exp of its mean cross-entropy"),
    _of_evaluation("teacher_perplexity", "", "of the teacher on the same ids"),
    _of_evaluation(
        "aligned_rows",
        "rows",
        "those that KL and agreement are of, where the teacher has another tokenizer: over the "
        "tokens that both have, and one event of all others",
    ),
    _of_evaluation("student_entropy", "nats per row", "of the student's probabilities over the whole vocabulary"),
    _of_evaluation(
        "teacher_entropy", "nats per row", "of the teacher's, whatever is trained: what the student's comes near to"
    ),
    _of_evaluation("padding_mass", "share", "mean probability that the student gives to ids that do not exist"),
)
"""Of the held-out rows; what needs a teacher is absent where none scored them."""

METRICS = (
    Metric("train/loss", "nats", "what is minimised: the weighted terms of all tasks over the loss tokens of the step"),
    Metric("train/<term>", "nats", "a term of the objective, unweighted, over its loss tokens or groups; a second one "
           "of its kind ends in `_2`. NaN in a step that has nothing of it"),
    Metric("train/<term>_<own>", "", "what a term tells beside its value: `taid_t`, the teacher's weight; "
           "`atkd_hard_share`, the share of hard rows; `policy_gradient_ratio`, the importance ratio of sampled "
           "tokens before it is truncated, and `_truncated`, the share that is; `forward_kl_weight_entropy`, the mean "
           "weight of its tokens; `forward_kl_difficulty_keep`, the share of rows that such a weight keeps"),
    Metric("train/<term>/<teacher>", "nats", "a term of one of several teachers (`ensemble.how: per_teacher`), over "
           "the loss tokens that it judged"),
    Metric("train/padding", "nats", "-log of the probability that the student leaves for ids that exist"),
    Metric("train/grad_norm", "", "L2 norm of the gradient, before it is clipped to `optimizer.max_grad_norm`"),
    Metric("train/learning_rate", "", "of this step"),
    Metric("train/tokens", "tokens", "prompts and answers of all ranks", summed=True),
    Metric("train/loss_tokens", "tokens", "those that the loss is about", summed=True),
    Metric("train/skipped", "0 or 1", "1: loss or gradient was not finite, and nothing was learnt", summed=True),
    Metric("train/micro_batches", "", "forward passes of each rank", summed=True),
    Metric("step/seconds", "s", "`student/wait_s`, `student/ids_s` and `student/step_s`"),
    Metric("step/sequences", "", "prompts with their answers that were trained on", summed=True),
    Metric("student/wait_s", "s", "until the labels of the step were there", summed=True),
    Metric("student/ids_s", "s", "in which the student chose the ids of a later step, with `given_ids` labels",
           summed=True),
    Metric("student/step_s", "s", "the step itself, on all ranks", summed=True),
    Metric("student/compute_s", "s", "of it forward and backward passes, on the slowest rank", summed=True),
    Metric("student/optimizer_s", "s", "of it the optimizer and its communication, on the slowest rank", summed=True),
    Metric("student/peak_bytes", "bytes", "the most memory of the fullest rank so far: of tensors on its GPU, or of "
           "the whole process without one"),
    Metric("scorer/score_s", "s", "engine time that the labels of the step took, all replicas together", summed=True),
    Metric("labels/rows", "rows", "labels: one for each loss token that a teacher judged", summed=True),
    Metric("labels/bytes", "bytes", "of them", summed=True),
    Metric("labels/store_hits", "", "sequences whose labels were in the label store", summed=True),
    Metric("labels/store_misses", "", "sequences whose labels a teacher had to make, beside a store", summed=True),
    Metric("labels/store_bytes", "bytes", "of labels that were read from the store", summed=True),
    Metric("labels/mass", "share", "of the teacher's probability that they hold: 1 for `hidden` and `dense`"),
    Metric("labels/entropy", "nats per row", "of the labels at their temperature, all ids that they do not keep as one "
           "event: a lower bound of the teacher's. Of `sampled` labels the teacher's own; absent for `hidden`, `dense` "
           "and `token`, which do not tell it"),
    Metric("throughput/tokens_per_s", "tokens/s", "`train/tokens` over the time from one step to the next"),
    Metric("wait/student_share", "share", "time of the last ten steps in which the student did not train"),
    Metric("wait/teacher_share", "share", "time of the last ten steps in which a teacher had nothing to do, mean over "
           "replicas"),
    Metric("run/left_s", "s", "until the end, by the median of the last steps, evaluations and checkpoints; from the "
           "fourth step of a start on"),
    Metric("run/device_hours", "hours", "that GPUs were held, or without any cores used, over all starts of the run"),
    Metric("run/device_hours_expected", "hours", "of them at the end, where it goes on like this"),
    Metric("answers/written", "", "answers that a teacher or the student wrote for the step", summed=True),
    Metric("answers/empty", "", "of them without a token but the end", summed=True),
    Metric("answers/cut_off", "", "of them as long as `answers.max_new_tokens`, and not at an end", summed=True),
    Metric("answers/dropped", "", "of them not trained on", summed=True),
    Metric("answers/stale", "", "of them dropped: written by weights of the student that are too old", summed=True),
    Metric("rollout/tokens", "tokens", "that the student wrote for the step", summed=True),
    Metric("rollout/write_s", "s", "from the first request to the last answer", summed=True),
    Metric("rollout/tokens_per_s", "tokens/s", "of the engines that hold the student, while they write"),
    Metric("rollout/staleness_mean", "steps", "optimizer steps between the weights that wrote an answer and those that "
           "it trains, mean over answers"),
    Metric("rollout/staleness_max", "steps", "of the oldest answer: at most `training.depth` + "
           "`rollouts.sync_every` - 1"),
    Metric("rollout/truncated", "share", "answers that the student did not end: cut at `max_new_tokens`"),
    Metric("rollout/logprob", "nats per token", "mean log-probability with which the student's tokens were drawn"),
    Metric("sync/seconds", "s", "transfer of the student's weights to its engines before the step, with the probe",
           summed=True),
    Metric("sync/probe_s", "s", "of it scoring the probe, by the student and by every engine", summed=True),
    Metric("sync/wait_s", "s", "before it, until nothing was to be written any more by older weights", summed=True),
    Metric("sync/bytes", "bytes", "of weights that travelled", summed=True),
    Metric("sync/probe_gap", "nats per token", "mean difference of log-probabilities on the probe between the student "
           "and the engine that differs most"),
    Metric("align/byte_ratio", "share", "bytes of answers that labels of a teacher with another tokenizer say "
           "something of, of all tasks that are aligned"),
    Metric("align/digit_ratio", "share", "the same of the digits among them; absent where there is none"),
    Metric("align/row_ratio", "share", "loss tokens that such labels reach"),
    Metric("task/<task>/<term>", "nats", "as `train/<term>`, of one task among several"),
    Metric("task/<task>/<term>_<own>", "", "as `train/<term>_<own>`, of one task among several"),
    Metric("task/<task>/<term>/<teacher>", "nats", "as `train/<term>/<teacher>`, of one task"),
    Metric("task/<task>/padding", "nats", "as `train/padding`, of one task"),
    Metric("task/<task>/sequences", "", "as `step/sequences`, of one task", summed=True),
    Metric("task/<task>/loss_tokens", "tokens", "as `train/loss_tokens`, of one task", summed=True),
    Metric("task/<task>/mass", "share", "as `labels/mass`, of one task"),
    Metric("task/<task>/entropy", "nats per row", "as `labels/entropy`, of one task"),
    Metric("teacher/<teacher>/tokens", "tokens", "of the sequences that it was asked about", summed=True),
    Metric("teacher/<teacher>/token_share", "share", "of the tokens that any teacher was asked about"),
    Metric("teacher/<teacher>/weight", "share", "its mean weight over the loss tokens of ensembles that name it; with "
           "`how: min_ce` the share of tokens in sequences for which it was picked"),
    Metric("teacher/<teacher>/lost_rows", "rows", "loss tokens of ensembles that it did not judge, being lost",
           summed=True),
    *EVALUATION,
    Metric("evaluation/teacher/<teacher>/forward_kl", "nats per row", "KL(teacher, student) of one of several teachers "
           "on the same rows, whose `evaluation/forward_kl` is that of what they become together", kind="evaluation"),
    Metric("evaluation/task/<task>/teacher/<teacher>/forward_kl", "nats per row", "as "
           "`evaluation/teacher/<teacher>/forward_kl`, of one task", kind="evaluation"),
    *(
        Metric(one.name.replace("/", "/task/<task>/"), one.unit, f"as `{one.name}`, of one task", kind="evaluation")
        for one in EVALUATION
    ),
)  # fmt: skip


def metric_of(name: str) -> Metric | None:
    """The entry of a name; None for one that the contract lacks."""
    return next((metric for metric in METRICS if metric.matches(name)), None)
