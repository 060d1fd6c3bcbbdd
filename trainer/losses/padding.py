"""What a student loses to ids that do not exist: the rows of its head beyond the vocabulary.

Models have more rows than their tokenizer has tokens, and whoever samples from one samples over all of them.
Divergences compare student and teacher over the vocabulary alone, so nothing in them would keep such a row from
growing. With m the mass of those rows under the student's softmax over all its rows, this term is -log(1 - m): the
teacher's mass there counts as 0. For forward_kl and cross_entropy at T = 1 the sum of both is exactly the loss over all
rows (chain rule of the KL divergence: Cover and Thomas, Elements of Information Theory, theorem 2.5.3); for the others
it stands in for a divergence that would be infinite.
"""

from __future__ import annotations

import torch

from trainer.model.fast import log_sum_exp


def padding_nats(logits: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """-log(1 - m) [n] of logits [n, V] and those of the padding [n, P], at T = 1; gradient by a padding logit its
    probability, by another one -m times its probability inside the vocabulary. Exact also where m is tiny."""
    return torch.nn.functional.softplus(padding.logsumexp(1) - log_sum_exp(logits))
