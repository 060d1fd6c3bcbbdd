"""What an unknown key was meant to be: a misspelt one, one of another section, or the word of another trainer.

A file of its own because advice that is wrong is worse than none: every word here is held by a test that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.document import KeyPath, dotted
from configs.refusal import did_you_mean

OTHER_WORDS = {
    "batch_size": "sequences_per_step",
    "cutoff_len": "max_length",
    "eval_dataset": "evaluation",
    "eval_every": "evaluate_every",
    "eval_steps": "evaluate_every",
    "gradient_checkpointing": "activation_checkpointing",
    "license": "licence",
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "max_model_len": "max_length",
    "model_name_or_path": "path",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "folder",
    "num_gpus": "ranks",
    "r": "rank",
    "student.replicas": "ranks",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "top_k": "k",
    "train_batch_size": "sequences_per_step",
    "train_dataset": "prompts",
    "tp": "tensor_parallel_size",
}
"""Words of other trainers, by key or by whole path, and what is nearest to them here."""

NOT_NEEDED = {
    "gradient_accumulation_steps": "micro-batches follow from training.micro_batch_tokens and sequences_per_step",
    "optimizer.kind": "the optimizer is AdamW",
    "optimizer.name": "the optimizer is AdamW",
    "optimizer.type": "the optimizer is AdamW",
    "wandb": "metrics go to metrics.jsonl, and to TensorBoard with report.tensorboard: true",
}
"""What is no setting here, by key or by whole path, and why."""

NEW_SPELLING = {
    "elicitation": "answers, at the top level, and its kinds are dataset (was feature) and teacher (was labeling)",
    "data.train": "prompts, at the top level, with what stood below train",
    "teacher.writer": "generator",
}
"""Keys of older versions, by whole path, and what to write now."""

MANY_MEANINGS = frozenset({"name", "path", "kind", "model", "format", "revision", "split"})
"""Keys that mean something else in every section: one of another section is meant only where it lies below."""


def meant(path: KeyPath, here: Sequence[str], keys: Mapping[KeyPath, Sequence[str]]) -> str:
    """The end of a message about the unknown key at `path`. `here` are the keys of its section; `keys` holds all keys
    there are, those of plug-ins with the kinds that have them, without the kind that is chosen."""
    key, above = str(path[-1]), path[:-1]
    if dotted(path) in NEW_SPELLING:
        return f"; it is now written {NEW_SPELLING[dotted(path)]}"
    reason = NOT_NEEDED.get(dotted(path), NOT_NEEDED.get(key))
    if reason is not None:
        return f"; remove it: {reason}"
    word = OTHER_WORDS.get(dotted(path), OTHER_WORDS.get(key, key))
    if word in here:
        return f"; did you mean '{word}'?"
    places = [place for place in keys if place[-1] == word]
    below = [place for place in places if place[: len(above)] == above]
    beside = [place for place in places if place[0] == path[0]]
    near = below if word in MANY_MEANINGS else below or beside or places
    if near:
        return f"; it belongs in {' or '.join(_written(place, keys[place]) for place in near)}"
    return did_you_mean(key, here) or f" (known here: {', '.join(here) or 'none'})"


def _written(place: KeyPath, kinds: Sequence[str]) -> str:
    top = ", at the top level" if len(place) == 1 else ""
    return dotted(place) + top + (f" (of kind {' or '.join(kinds)})" if kinds else "")
