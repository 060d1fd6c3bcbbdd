"""The memory of one rank of the student: what is kept all the time, and the most of three moments of a step.

head        activations of the body + the loss's chunk + gradients of the head     (nothing of the body's yet)
backward    the body's pass, gradients that add up, the head's gradient where it is the embedding's too
optimizer   gradients once more, as one vector
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.placement.memory.parts import Part, RoleMemory
from cluster.placement.memory.processes import STUDENT_BASE, device_base
from cluster.placement.memory.zero import FLOAT32, ZeroShare, zero_share
from cluster.runtime import GPU, STUDENT, Accelerator
from trainer.model.sizes import ModelSizes, PassMemory


@dataclass(frozen=True, slots=True)
class StudentLoad:
    """What a rank has to hold, as far as memory is concerned."""

    ranks: int
    accelerator: Accelerator
    width: int  # bytes of a weight
    deepspeed: Mapping[str, Any]  # of `deepspeed_config`
    chunk_rows: int  # of the loss
    rows: int  # of the loss in the largest micro-batch, at most
    micro_batches: int  # of a rank's step, at most
    teacher_heads: int = 0  # bytes of the heads of teachers whose hidden states come here; on a host in their files
    num_heads: int = 1  # of them
    compared_teachers: int = 0  # in training: so many teachers' products of hidden states stand beside the student's
    states: int = 0  # bytes of the states inside the models that terms compare
    labels: int = 0  # bytes that wait in a rank
    batch_labels: int = 0  # bytes of those of a micro-batch, beside the model


def student_memory(sizes: ModelSizes, body: PassMemory, load: StudentLoad) -> RoleMemory:
    """Of every rank."""
    share = zero_share(sizes, load.deepspeed, width=load.width, ranks=load.ranks, micro_batches=load.micro_batches)
    chunk, head = loss_bytes(sizes, load)
    moments = {
        "head": (body.saved + load.states, chunk + head, 0),
        "backward": (body.peak + load.states, _held_head(sizes, load), share.gradients),
        "optimizer": (0, 0, share.step),
    }
    activations, loss, gradients = max(moments.values(), key=sum)
    kept = [
        Part("weights", share.weights, certain=True),
        Part("optimizer", share.optimizer, certain=True),
        Part("gathered weights", share.gathered),
        Part("gradients", gradients),
        Part("activations", activations),
        Part("loss", loss),
    ]
    heads = Part(_of_heads(load), load.teacher_heads, certain=True)
    base, waiting = STUDENT_BASE[load.accelerator], Part("labels", load.labels)
    offloaded = _offloaded(share)
    if load.accelerator == GPU:
        device = (*kept, heads, Part("labels", load.batch_labels), Part("CUDA", device_base(STUDENT)))
        host = (*offloaded, waiting, Part("process", base))
        return RoleMemory(STUDENT, load.ranks, _some(device), _some(host), place=STUDENT)
    host = _some((*kept, *offloaded, waiting, Part("process", base)))
    return RoleMemory(STUDENT, load.ranks, host=host, shared=_some((heads,)), place=STUDENT)


def _of_heads(load: StudentLoad) -> str:
    return "teacher's head" if load.num_heads == 1 else f"heads of {load.num_heads} teachers"


def fallback_pass(sizes: ModelSizes, tokens: int, width: int, *, checkpointing: bool) -> PassMemory:
    """Where the body cannot be run without numbers: of a pre-norm transformer with a gated inner layer, 9 rows of the
    model's width and 4.5 of the inner one for each token and layer (counted on a Llama in float32)."""
    layer = int(tokens * (9 * sizes.hidden_size + 4.5 * sizes.ffn_width) * width)
    if not checkpointing:
        return PassMemory(tokens, layer * sizes.num_layers, layer * sizes.num_layers)
    inputs = tokens * sizes.hidden_size * width * sizes.num_layers
    return PassMemory(tokens, inputs, inputs + layer)


def loss_bytes(sizes: ModelSizes, load: StudentLoad) -> tuple[int, int]:
    """(of a chunk of rows over the vocabulary, of the head's gradient while it grows); see `trainer/losses/fused.py`.

    On a processor a chunk's products become its gradient in place, block by block in the cache. An accelerator works on
    the whole chunk: beside the products float32 logits, both log-softmaxes, and the gradient.
    """
    logits = min(load.chunk_rows, load.rows) * sizes.head_rows
    copies = load.width + (4 * FLOAT32 if load.accelerator == GPU else 0)
    copies += load.compared_teachers * (load.width + (3 * FLOAT32 if load.accelerator == GPU else 0))
    # The sum in float32, and what it becomes in the weight's dtype.
    gradient = sizes.head * (FLOAT32 + load.width % FLOAT32) if sizes.head_trained else 0
    return logits * copies, gradient


def _held_head(sizes: ModelSizes, load: StudentLoad) -> int:
    """Of a tied head, whose gradient waits for that of the embedding, and is added to it at the end."""
    return 2 * sizes.head * load.width if sizes.head_trained and sizes.tied else 0


def _offloaded(share: ZeroShare) -> tuple[Part, ...]:
    return (
        Part("offloaded optimizer", share.host_optimizer, certain=True),
        Part("offloaded weights", share.host_weights, certain=True),
    )


def _some(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.num_bytes)
