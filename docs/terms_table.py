"""docs/objectives.md, made from the registry of terms: `python docs/terms_table.py > docs/objectives.md`."""

from __future__ import annotations

from configs.labels import LABELS, Labels, NoLabels
from configs.losses import LOSSES, Term

HEAD = """# Terms of an objective

Made from `configs/losses.py` by `python docs/terms_table.py`. An objective is a list of terms, each with a `weight`:
`objective: [{loss: forward_kl}, {loss: cross_entropy, weight: 0.2}]`. What a cell says of a term with these `labels`:
**exact**, the value over the whole vocabulary; **lower bound** of it; **unbiased**, **biased** estimates of it;
**refused** by `check`, which says what to use instead; **-**, the labels are not looked at. How large a bias is stands
in [exactness.md](exactness.md).

`dpo` is trained on rows with `prompt`, `chosen` and `rejected`. Its reference is the teacher that the task names,
mostly the student before training: `teacher: {model: {path: models/student}}`, `labels: token`.

`loss: package.module` takes a term of yours, a file with its parameters and its function:

```python
import torch

from configs.losses import Divergence
from trainer.losses.terms import computes
from trainer.types import PairedLogProbs


class Term(Divergence):
    alpha: float = 0.5


@computes(Term)
def total_variation(pair: PairedLogProbs, *, alpha: float) -> torch.Tensor:  # log-probabilities [N, E] -> [N]
    return alpha * (pair.teacher.exp() - pair.student.exp()).abs().sum(-1)
```
"""


def terms_table() -> str:
    """The page."""
    labels = [one for one in LABELS.built_in if one is not NoLabels]
    kinds = [LABELS.kind_of(one) for one in labels]
    lines = [HEAD, f"| loss | form | needs | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    lines += [_row(term, labels) for term in LOSSES.built_in]
    lines += [
        "",
        *(f"- `{LOSSES.kind_of(term)}`: {' '.join((term.__doc__ or '').split())}" for term in LOSSES.built_in),
    ]
    return "\n".join(lines) + "\n"


def _row(term: type[Term], labels: list[type[Labels]]) -> str:
    needs = ", ".join(sorted(need.replace("_", " ") for need in term.needs)) or "nothing"
    cells = [(term.exactness_with(one) or "refused").replace("_", " ") for one in labels]
    cells = cells if term.looks_at_labels() else ["-"] * len(labels)
    return f"| `{LOSSES.kind_of(term)}` | {term.form} | {needs} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(terms_table(), end="")
