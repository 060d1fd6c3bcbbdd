"""Labels, losses and training steps of a process, written to the file named on the command line.

Run once with STILLHOUSE_FAST=1 and once with 0 by tests/trainer/model/fast/test_fast.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from loss_oracles import one_part, realistic_logits, term
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from configs.labels import Dense, Hidden, Token, TopK
from trainer.labels.encoding import load_encoding
from trainer.losses.fused import head_loss
from trainer.losses.objective import Objective
from trainer.model import fast
from trainer.model.head import Head, HeadShape

N, V, PADDED, H = 77, 4099, 4128, 32
ENCODINGS = {"topk": TopK(k=20, temperature=1.5), "hidden": Hidden(), "dense": Dense(dtype="float32"), "token": Token()}


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(".".join(str(function).split(".")[:2]))
        return function(*args, **(kwargs or {}))


def labels_and_losses() -> Iterator[tuple[str, torch.Tensor]]:
    """Columns of every encoding, and the loss over them with its gradients, of a head with padding."""
    g = torch.Generator().manual_seed(0)
    states, teacher_states = torch.randn(N, H, generator=g), torch.randn(N, H, generator=g)
    weight, bias = torch.randn(PADDED, H, generator=g) / 3, torch.randn(PADDED, generator=g)
    teacher = Head(torch.randn(V, H, generator=g) / 3, None, HeadShape(), V)
    ids = torch.randint(V, (N,), generator=g)
    for kind, parameters in ENCODINGS.items():
        encoding = load_encoding(parameters)
        source = teacher_states if encoding.needs == "hidden" else realistic_logits(N, V, seed=5)
        labels = encoding.encode(source, ids)
        yield from ((f"{kind}/{name}", column) for name, column in labels.items())
        if kind == "token":
            continue
        terms = (term("forward_kl"), term("reverse_kl", 0.2), term("jsd", 0.3, 0.4), term("cross_entropy", 0.5))
        leaves = [tensor.clone().requires_grad_() for tensor in (states, weight, bias)]
        objective = Objective.of(terms, encoding, padded=True)
        parts = one_part(labels, encoding, objective, num_rows=N, scale=1 / N, teacher_head=teacher)
        result = head_loss(*leaves, ids, head_shape=HeadShape(), vocabulary_size=V, parts=parts, chunk_rows=32)
        yield f"{kind}/loss", result.loss.detach()
        yield from ((f"{kind}/sum of {name}", value) for name, value in result.sums[0].items())
        gradients = torch.autograd.grad(result.loss, leaves)
        yield from ((f"{kind}/gradient {place}", gradient) for place, gradient in enumerate(gradients))


def training_steps() -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a small model after two steps of plain gradient descent. First: how many layers changed."""
    model = tiny_model("llama", seed=2, tied=False)
    yield "layers", torch.tensor(fast.use_fast_products(model.model, device=torch.device("cpu"), dtype=torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    objective = Objective.of((term("cross_entropy"),), None, padded=True)
    for step in range(2):
        ids = torch.randint(3, 280, (1, 70), generator=torch.Generator().manual_seed(step))
        hidden = model.model(ids).last_hidden_state[0, :-1]
        parts = one_part({}, None, objective, num_rows=69, scale=1 / 69)
        result = head_loss(
            hidden, model.lm_head.weight, None, ids[0, 1:], head_shape=HeadShape(), vocabulary_size=283, parts=parts
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        yield f"step {step}/loss", result.loss.detach()
    yield from ((f"after/{name}", parameter.detach()) for name, parameter in model.named_parameters())


if __name__ == "__main__":
    operators = Operators()
    with operators:
        tensors = dict(labels_and_losses())
        tensors |= dict(training_steps())
    layers = int(tensors.pop("layers"))
    found = {"module": fast.chosen.__name__, "operators": sorted(operators.names), "layers": layers, "tensors": tensors}
    torch.save(found, Path(sys.argv[1]))
