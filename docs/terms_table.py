"""docs/objectives.md, made from the registry of terms: `python docs/terms_table.py > docs/objectives.md`."""

from __future__ import annotations

from configs.labels import LABELS, Labels, NoLabels
from configs.losses import LOSSES, TOKEN_WEIGHTS, Term, TokenWeight
from configs.section import Section
from configs.stations import Station

HEAD = """# Terms of an objective

Made from `configs/losses.py` by `python docs/terms_table.py`. An objective is a list of terms, each with a `weight`:
`objective: [{loss: forward_kl}, {loss: cross_entropy, weight: 0.2}]`. What a cell says of a term with these `labels`:
**exact**, the value over the whole vocabulary; **lower bound** of it; **unbiased**, **biased** estimates of it;
**refused** by `check`, which says what to use instead; **-**, the labels are not looked at. How large a bias is stands
in [exactness.md](exactness.md), which labels and which loss to take in [choosing.md](choosing.md).

`dpo` is trained on rows with `prompt`, `chosen` and `rejected`. Its reference is the teacher that the task names,
mostly the student before training: `teacher: {model: {path: models/student}}`, `labels: token`.

`listwise_kl` is trained on rows with `candidates`, of which the teacher's `labels: token` say how likely each is;
`scored_listwise_kl` on rows with `candidates` and `scores` (of a reranker, say), with `labels: none`. Answers that are
compared meet in one micro-batch: `training.micro_batch_tokens` is at least twice `data.max_length`, and holds all
answers to a prompt.

`features` compare states inside the models, and may stand beside any divergence, since the labels hold the last hidden
state too:

```yaml
labels: {kind: hidden, layers: [8, 16]}  # of the teacher; 2 H bytes a loss token each, or 4 H in float32
objective:
  - {loss: forward_kl}
  - {loss: features, student_layer: 4, teacher_layer: 8, projector: linear, weight: 0.1}
  - {loss: features, student_layer: 8, teacher_layer: 16, distance: cosine, projector: linear, weight: 0.1}
```

Layers are counted as transformers' `hidden_states` are: 0 is what the first layer reads (the embeddings, with whatever
scale the model gives them), i what layer i leaves, before any norm; only the last one is after the final norm, and so
the last hidden state. Only loss tokens are compared. A projector is a matrix of the student's states, trained with the
student's learning rate and weight decay; it is in every checkpoint, and not in the exported student. The teacher's
states go through none, since a learnt map of both sides could make them equal by forgetting them. `mmd` compares at
most 512 rows of a micro-batch with each other, so that its value, unlike all others, depends on how sequences are
packed.
Engine `hf` gives the layers of every model; `vllm` of those that it lets speculative decoding (EAGLE-3) look into, in
shards too, and `check` says where it does not.

`policy_gradient`, `minillm` and `k2` learn reverse KL from the tokens that the student drew, each of which is one
sample: they need `answers: student`. Every divergence may be learnt from the student's text too; it is computed from
all that the labels say, whoever wrote the text, and needs neither samples nor importance ratios. Start with
`reverse_kl` and `labels: hidden`, or `jsd`; take `policy_gradient` where labels must be small (`token`: 4 bytes a
token), where a token should answer for what follows it (`discount`), or where a verifier's reward is raised beside it,
as in `objective: [{loss: policy_gradient, reward_weight: 0.5, baseline: group, whiten: reward}]`.

A verifier's reward is a class `Reward` of your file, `reward: package.module` at the top level or in a task, with its
parameters as fields (`reward: {kind: package.module, tolerance: 0.1}`); `reward: {kind: pattern, pattern: "boxed"}` is
built in, 1 where a regular expression is found. It is called with all answers of a step, before the teacher judges
them; an exception, a number that is not finite or too few of them end the run with the row:

```python
from collections.abc import Sequence

from configs.rewards import Reward as Parameters
from trainer.feedback.reward import Answer


class Reward(Parameters):
    tolerance: float = 0.0

    def score(self, answers: Sequence[Answer]) -> list[float]:  # one.row: as the dataset has it
        return [float(one.text.strip() == str(one.row["gold"])) for one in answers]
```

Each row of theirs is an unbiased estimate: with `closed_form`, what labels know of all tokens is taken over the whole
distribution (that is `reverse_kl`), and the sampled token adds what a lumped tail hides, so that `topk` or `nucleus`
lose nothing on average. `given_ids` need `add_target: false` for that, since events that the sampled token adds move
with it. `lsm`, `reverse_kl` with `given_ids` and all other divergences stay what the table says.

k1 and k3, the other two of Schulman's estimators (joschu.net/blog/kl-approx.html), are refused as losses: on the
student's own text k1 has a gradient of zero on average, k3 that of *forward* KL. k1 is the reward of
`policy_gradient`.

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


WEIGHTS = """
## Weights of tokens

A term may weight the tokens that it is about: `{loss: forward_kl, token_weights: [{kind: entropy, at: 0.8},
confidence]}`. Several weights are multiplied; none has a gradient. They lie between 0 and 1, so that the term gets
smaller by their mean, which `train/<term>_weight_<kind>` shows beside the value without them; that of `difficulty` has
the mean 1. Where labels lump ids, weights by the whole distribution make a term biased.

`[{loss: reverse_kl}, {loss: forward_kl, token_weights: [{kind: entropy, at: 1.0, width: 0}]}]` is entropy-aware
distillation: forward_kl is added where the teacher is unsure.
"""


def terms_table() -> str:
    """The page."""
    labels = [one for one in LABELS.built_in if one is not NoLabels]
    kinds = [LABELS.kind_of(one) for one in labels]
    lines = [HEAD, f"| loss | form | needs | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    lines += [_row(term, labels) for term in LOSSES.built_in]
    lines += ["", *(_described(LOSSES, term, Term) for term in LOSSES.built_in), WEIGHTS]
    lines += [_described(TOKEN_WEIGHTS, weight, TokenWeight) for weight in TOKEN_WEIGHTS.built_in]
    return "\n".join(lines) + "\n"


def _described(station: Station, one: type[Section], base: type[Section]) -> str:
    """A kind with its parameters."""
    fields = {name: field for name, field in one.model_fields.items() if name not in base.model_fields}
    defaults = {
        name: "required" if field.is_required() else f"default {_plain(field.default)}"
        for name, field in fields.items()
    }
    told = [f"  - `{name}` ({defaults[name]}): {field.description}" for name, field in fields.items()]
    return "\n".join([f"- `{station.kind_of(one)}`: {' '.join((one.__doc__ or '').split())}", *told])


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _row(term: type[Term], labels: list[type[Labels]]) -> str:
    needs = ", ".join(sorted(need.replace("_", " ") for need in term.needs)) or "nothing"
    cells = [(term.exactness_with(one) or "refused").replace("_", " ") for one in labels]
    cells = cells if term.looks_at_labels() else ["-"] * len(labels)
    return f"| `{LOSSES.kind_of(term)}` | {term.form} | {needs} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(terms_table(), end="")
