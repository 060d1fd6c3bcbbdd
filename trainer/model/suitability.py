"""Whether a model can be a student, beyond its attention (`attention_choice.py`): asked of its modules, which the
meta device has too. A file because `check` must refuse what `train` refuses, before a weight is read.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from configs.models import Student
from trainer.errors import ConfigError
from trainer.model.weights import is_quantised


def refuse_unsuitable(model: PreTrainedModel, student: Student) -> None:
    """Raises `ConfigError` where `model` cannot be trained as `student` says."""
    refuse_untrainable(model)
    if student.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(f"student.activation_checkpointing: {type(model).__name__} does not offer it; write false")


def refuse_untrainable(model: PreTrainedModel) -> None:
    """Raises `ConfigError` for weights that are no numbers to change, and for a model whose logits are more than a head
    on its last hidden states, which is all that the loss computes."""
    name = type(model).__name__
    if is_quantised(model.config):
        settings = model.config.quantization_config
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", "")
        raise ConfigError(
            f"student.model: its weights are quantised ({method}), and training changes them in small steps; use the "
            "folder that they were made from"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"student.model: {name} names no head to compute logits with. Choose another student")
    known = {id(p) for part in (model.base_model, head) for p in part.parameters()}
    between = [n for n, p in model.named_parameters() if id(p) not in known]
    if between:
        raise ConfigError(
            f"student.model: {name} has weights between its last hidden state and its head ({between[0]}), which the "
            "loss does not pass through. Choose another student"
        )
