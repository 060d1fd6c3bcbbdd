"""The weights of a student that training changes, in buckets for the engines that write with them.

    parameters, sharded or not --whole, a bucket at a time, on all ranks--> rank 0: WeightBucket in the engines' dtype

No rank ever holds more of the model beside its own share than a bucket, or one weight that is larger than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.core_model_loading import revert_weight_conversion

from trainer.model.export import Entry, whole_model
from trainer.model.load import StudentModule
from trainer.model.trained import is_linear
from trainer.model.zero import num_elements, whole
from trainer.types import BucketHeader, WeightBucket, WeightForm


class WeightBuckets:
    """Of one rank; all ranks cut the same buckets."""

    def __init__(self, module: StudentModule, form: WeightForm) -> None:
        self._causal = module.causal
        self._form = form
        self._dtype = getattr(torch, form.dtype)
        self._buckets = list(_cut(travelling(module), form.bucket_bytes // self._dtype.itemsize))

    @torch.no_grad()
    def bucket(self, version: int, index: int, *, keep: bool) -> tuple[BucketHeader, WeightBucket | None]:
        """Collective. The bucket itself only where `keep`, in memory of its own."""
        entries = self._buckets[index]
        needed = {id(parameter): parameter for _, parameters, _ in entries for parameter in parameters}
        with whole(needed.values()):
            held = {name: value().detach().to("cpu", self._dtype, copy=True) for name, _, value in entries if keep}
        if self._form.stored_names and held:
            held = {name: value.contiguous() for name, value in revert_weight_conversion(self._causal, held).items()}
        num_bytes = sum(value.nbytes for value in held.values())
        header = BucketHeader(version, index, len(self._buckets), num_bytes)
        bits = {name: (v.view(torch.uint16) if v.dtype is torch.bfloat16 else v).numpy() for name, v in held.items()}
        return header, WeightBucket(header, self._form.dtype, bits) if keep else None


def travelling(module: StudentModule) -> list[Entry]:
    """What may differ from the files that an engine has read: the weights that are trained, with adapters merged, and
    buffers. What is frozen stays behind, but for weights beside a trained one that engines hold in one matrix with it:
    the linear layers of one block, the parameters of one module."""
    entries, together = list(whole_model(module)), _Together(module)
    moving = {together.key(name) for name, needed, _ in entries if _moves(needed)}
    return [entry for entry in entries if together.key(entry[0]) in moving]


def _moves(needed: list[torch.nn.Parameter]) -> bool:
    return not needed or any(parameter.requires_grad for parameter in needed)


class _Together:
    """Which weights engines may hold in one matrix."""

    def __init__(self, module: StudentModule) -> None:
        self._modules = dict(module.causal.named_modules())
        self._head = module.causal.get_output_embeddings()

    def key(self, name: str) -> str:
        """Equal for weights that may lie in one."""
        owner = name.rpartition(".")[0]
        found = self._modules.get(owner)
        linear = found is not None and found is not self._head and is_linear(getattr(found, "base_layer", found))
        return owner.rpartition(".")[0] + ".*" if linear else owner


def _cut(entries: list[Entry], num: int) -> Iterator[list[Entry]]:
    """Groups of at most `num` numbers, or of one entry."""
    group: list[Entry] = []
    size = 0
    for entry in entries:
        own = max((num_elements(parameter) for parameter in entry[1]), default=0)
        if group and size + own > num:
            yield group
            group, size = [], 0
        group.append(entry)
        size += own
    if group:
        yield group
