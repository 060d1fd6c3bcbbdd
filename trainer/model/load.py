"""Models from disk or hub: the student as the module that is trained, and of the teacher nothing but its head.

transformers decides what a folder means; this file decides what is allowed, and how the student is opened up so that
its logits never exist whole (`StudentModule`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from configs.models import EVERYTHING, ModelSource, Trained
from trainer.errors import ConfigError, foreign_errors
from trainer.model.attention import IMPLEMENTATIONS, ONE_A_ROW, Borders, told
from trainer.model.config_bounds import refuse_absurd_sizes
from trainer.model.head import Head, HeadShape
from trainer.model.suitability import refuse_untrainable
from trainer.model.trained import choose_trained
from trainer.model.weights import read_table, refuse_missing, weight_files

HeadCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, ...]]
"""What to compute from hidden states [n, H] and the head's weight [>= V, H] and bias. A tuple, because ZeRO-3 looks for
the tensors of a module's output only in tuples, lists and dicts."""


@dataclass(frozen=True, slots=True)
class StatesCall:
    """What to compute from states inside the model: `call` of states [n, H] by layer gives a tuple as a `HeadCall`
    does. Layers as in transformers' `hidden_states`."""

    layers: frozenset[int]
    call: Callable[[Mapping[int, torch.Tensor]], tuple[torch.Tensor, ...]]


class StudentModule(torch.nn.Module):
    """A causal LM whose forward stops at the hidden states and hands chosen rows to a function inside its head.

    The function runs in the head's own forward, because that is where ZeRO-3 has gathered the weight; a loss written
    as one function of hidden states and weight then needs no logits outside of it.
    """

    def __init__(self, causal: torch.nn.Module, *, adapter: peft.PeftModel | None = None) -> None:
        super().__init__()
        self.causal = causal
        self.projectors = torch.nn.ModuleList()  # of terms on features: trained and saved, and part of no export
        self.head_shape = HeadShape.of_config(causal.config)
        self._adapter = (adapter,)  # in a tuple: not a submodule, the same weights are in `causal`
        _open_head(causal.get_output_embeddings())
        self.register_state_dict_post_hook(_forget_frozen_tied_head)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.causal.config

    @property
    def adapter(self) -> peft.PeftModel | None:
        """The peft wrapper around `causal`, which knows how to name and save its adapters."""
        return self._adapter[0]

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        rows: torch.Tensor,
        head_call: HeadCall | None,
        *,
        states_call: StatesCall | None = None,
        borders: Borders = ONE_A_ROW,
        **arguments: Any,
    ) -> tuple[torch.Tensor, ...]:
        """`head_call` on the hidden states of `rows` [n], indices into the flattened token_ids [B, T], and then what
        `states_call` gives, if there is one.

        `arguments` go to the base model: those of `border_arguments` that are not `borders`, or a KV cache
        (`past_key_values`). Without a `head_call` the answer is transformers' own logits [n, >= V] of one sequence: for
        comparison.
        """
        arguments |= {"position_ids": position_ids, "use_cache": "past_key_values" in arguments}
        with told(borders):
            if head_call is None:
                return (self.causal(input_ids=token_ids, logits_to_keep=rows, **arguments).logits.flatten(0, 1),)
            if states_call is not None:
                arguments["output_hidden_states"] = True
            found = self.causal.base_model(input_ids=token_ids, **arguments)

        def chosen(states: torch.Tensor) -> torch.Tensor:
            return states.flatten(0, 1).index_select(0, rows)

        made = self.causal.get_output_embeddings()(chosen(found.last_hidden_state), head_call)
        if states_call is None:
            return made
        return *made, *states_call.call({layer: chosen(found.hidden_states[layer]) for layer in states_call.layers})


def _forget_frozen_tied_head(module: StudentModule, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A frozen weight belongs in no checkpoint, but DeepSpeed, told to leave frozen ones out, knows a tied one by the
    name of the embedding only."""
    head, embedding = module.causal.get_output_embeddings(), module.causal.get_input_embeddings()
    if head.weight is embedding.weight and not head.weight.requires_grad:
        name = next(name for name, inner in module.named_modules() if inner is head)
        state.pop(f"{prefix}{name}.weight", None)


def _open_head(head: torch.nn.Module) -> None:
    """Give the head's forward an optional second argument, the function to run instead of the product."""
    plain = head.forward

    def forward(hidden: torch.Tensor, call: HeadCall | None = None) -> Any:
        return plain(hidden) if call is None else call(hidden, head.weight, head.bias)

    head.forward = forward


_LOADING = threading.RLock()
"""Held while transformers builds or loads a model: meanwhile it switches the tying of weights off for the whole
process, and a model that another thread builds just then would have its head apart from its embedding."""


def load_config(source: ModelSource, *, role: str) -> Any:
    """The transformers configuration of a model. Raises `ConfigError` naming `role` (such as "student.model")."""
    refuse_absurd_sizes(source, role=role)
    with foreign_errors(f"{role}: cannot read the configuration of {source.path}"):
        return AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )


def build_on_meta(source: ModelSource, config: Any, *, role: str, **options: Any) -> PreTrainedModel:
    """The model that a configuration describes, of tensors with a shape and no memory. Raises `ConfigError` for what
    is no causal language model or cannot be built; `options` are those of transformers' `from_config`."""
    doing = f"{role}: {source.path} is no causal language model for transformers"
    with _LOADING, foreign_errors(doing), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code, **options)


def load_causal(source: ModelSource, *, role: str, **options: Any) -> PreTrainedModel:
    """A model with the weights of its files, all of them its own. `options` are those of `from_pretrained`.

    Raises `ConfigError` naming `role` for a folder that lacks a tensor, which transformers would fill with random
    numbers, and whatever transformers raises: the border is the caller's.
    """
    with _LOADING:
        causal, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,  # other formats are pickles, which run code when they are read
            output_loading_info=True,
            **options,
        )
    refuse_missing(info["missing_keys"], causal, role=role, place=source.path)
    return causal


def load_student(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    attention: str,
    vocabulary_size: int,
    trained: Trained = EVERYTHING,
    activation_checkpointing: bool = False,
    sharded: AbstractContextManager[None],
) -> StudentModule:
    """The student in host memory, or inside `sharded` already split over the ranks, ready for `ZeroModel`.

    Adapters get the model's dtype: DeepSpeed keeps float32 master weights of everything that is trained. Seed torch
    before: adapters start at random. Raises `ConfigError` for a folder that transformers cannot read or that lacks
    weights, and for a model whose attention does not take packed sequences.
    """
    with sharded:
        implementation = IMPLEMENTATIONS[attention]
        with foreign_errors(f"student.model: transformers cannot load {source.path}"):
            causal = load_causal(source, role="student.model", dtype=dtype, attn_implementation=implementation)
        refuse_untrainable(causal)
        rows = causal.config.get_text_config().vocab_size
        if rows < vocabulary_size:
            raise ConfigError(
                f"student.model: {source.path} has {rows} token embeddings, the tokenizer {vocabulary_size} tokens. "
                "Use a student with the teacher's tokenizer"
            )
        adapter = choose_trained(causal, trained, revision=source.revision)
    if activation_checkpointing:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    return StudentModule(causal, adapter=adapter)


def load_teacher_head(source: ModelSource, *, vocabulary_size: int, dtype: torch.dtype, device: torch.device) -> Head:
    """The teacher's head for its true vocabulary, read out of its safetensors without the rest of the model.

    For labels that are final hidden states. In host memory the weight is the file's own pages, which all processes of a
    machine share, in the dtype that it is stored in; products are computed in `dtype` everywhere.

    Raises `ConfigError` where the folder has no safetensors or no head.
    """
    config = load_config(source, role="teacher.model")
    weight_names, bias_names = _head_names(build_on_meta(source, config, role="teacher.model"))
    files = {
        name: file
        for file in weight_files(source, role="teacher.model")
        for name in read_table(file, role="teacher.model")
    }
    weight = _read_rows(source, files, weight_names, vocabulary_size)
    bias = _read_rows(source, files, bias_names, vocabulary_size) if bias_names else None
    return Head(
        weight=weight if device.type == "cpu" and weight.dtype in _CAST_BY_PARTS else weight.to(device, dtype),
        bias=None if bias is None else bias.to(device, dtype),
        shape=HeadShape.of_config(config),
        vocabulary_size=vocabulary_size,
        dtype=dtype,
    )


_CAST_BY_PARTS = (torch.float32, torch.bfloat16, torch.float16)
"""Of a weight in these dtypes a product casts some rows at a time (`Head.product`)."""


def _head_names(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names under which a checkpoint of this architecture may hold the head; a tied one is stored as the embedding."""
    head = model.get_output_embeddings()
    prefix = model.base_model_prefix + "."
    found = []
    for wanted in (head.weight, getattr(head, "bias", None)):
        names = [] if wanted is None else _names_of(model, wanted)
        # Some are stored under a name of before: GPT-NeoX's lm_head is embed_out in its checkpoints.
        names += [name for name in revert_weight_conversion(model, dict.fromkeys(names, wanted)) if name not in names]
        # Checkpoints of a bare base model lack its prefix.
        found.append(names + [name.removeprefix(prefix) for name in names if name.startswith(prefix)])
    return found[0], found[1]


def _names_of(model: torch.nn.Module, wanted: torch.nn.Parameter) -> list[str]:
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is wanted]


def _read_rows(source: ModelSource, files: Mapping[str, Path], names: list[str], num_rows: int) -> torch.Tensor:
    for name in [*names, *_with_another_prefix(files, names)]:
        if name not in files:
            continue
        reading = foreign_errors(f"teacher.model: cannot read {name} of {files[name]}")
        with reading, safetensors.safe_open(files[name], framework="pt") as tensors:
            rows = tensors.get_slice(name)[:num_rows]
        if len(rows) < num_rows:
            raise ConfigError(f"teacher.model: {name} of {source.path} has {len(rows)} rows for {num_rows} tokens")
        return rows
    raise ConfigError(f"teacher.model: {source.path} has no tensor named {' or '.join(names)}")


def _with_another_prefix(files: Mapping[str, Path], names: list[str]) -> list[str]:
    """Checkpoints of models that also see or hear keep the text model under a prefix that transformers renames. A name
    that ends as one of `names` does is taken where it is the only one."""
    endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    found = [[name for name in files if f".{name}".endswith(f".{ending}")] for ending in endings]
    return [matches[0] for matches in found if len(matches) == 1]
