"""The cells that benchmarks go through: every divergence of the registry with every encoding that it allows."""

from __future__ import annotations

from typing import Any

import torch

from configs.labels import LABELS, Labels
from configs.losses import LOSSES, Term
from trainer.labels.encoding import Encoding

NEEDED: dict[str, dict[str, Any]] = {"jsd": {"beta": 0.5}}
"""Parameters without a default."""
WITHOUT_DISTRIBUTION = ("token", "none")


def divergences() -> list[Term]:
    """Each row term that looks at labels, whatever the text, with its defaults."""
    classes = [one for one in LOSSES.built_in if "labels" in one.needs and one.form == "row"]
    classes = [one for one in classes if "rollouts" not in one.needs]
    kinds = [LOSSES.kind_of(one) for one in classes if not one.across_tokenizers]
    return [LOSSES.validate({"loss": loss, **NEEDED.get(loss, {})}) for loss in kinds]


def encodings() -> list[Labels]:
    """Each encoding from which divergences can be computed, with its defaults."""
    return [LABELS.validate(kind) for kind in LABELS.kinds() if kind not in WITHOUT_DISTRIBUTION]


def sampled_encodings() -> list[Labels]:
    """Each encoding that judges sampled tokens, with its defaults, but for events that such a token would add."""
    kinds = [kind for kind in LABELS.kinds() if "target" in LABELS.parameters_of(kind).gives]
    changed = {"given_ids": {"add_target": False}}
    return [LABELS.validate({"kind": kind, **changed.get(kind, {})}) for kind in kinds]


def allowed(term: Term, labels: Labels) -> bool:
    return term.exactness_with(labels) != "refused" and term.problem_with(labels) is None


def encode(
    encoding: Encoding, teacher: torch.Tensor, student: torch.Tensor, target_ids: torch.Tensor, *, draw: int = 0
) -> dict[str, torch.Tensor]:
    """Labels of n rows from what the encoding needs of the teacher, [n, V] or [n, H]. Where they are of the student's
    ids the likeliest of its logits [n, V] are given; where they are drawn, `draw` numbers the draws."""
    more = {}
    if encoding.takes_ids:
        more["given_ids"] = _students_ids(encoding, student, target_ids)
    if encoding.needs_row_keys:
        more["row_keys"] = torch.arange(len(target_ids)) + len(target_ids) * draw
    return encoding.encode(teacher, target_ids, **more)


def _students_ids(encoding: Encoding, student: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    ids = student.detach().topk(encoding.k, dim=1).indices
    if encoding.num_given == encoding.k:
        return ids
    target = target_ids[:, None]
    return torch.cat([ids, torch.where((ids == target).any(1, keepdim=True), -1, target)], dim=1)
