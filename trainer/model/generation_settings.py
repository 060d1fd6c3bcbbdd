"""What a model folder says about generating: where a teacher's answer ends, what a generator does not apply, and how an
exported student generates where nobody says otherwise."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from configs.models import ModelSource
from trainer.errors import ConfigError, foreign_errors
from trainer.model.load import load_config

SAMPLING = ("temperature", "top_p", "min_p", "top_k", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

_FILE = "generation_config.json"

_OF_THE_RUN = {"do_sample", "temperature", "top_p", "max_length", "max_new_tokens"}
"""Settings that `answers` of a run decides."""

# fmt: off
_WITHOUT_EFFECT = {
    "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "bos_token_id", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "is_assistant", "low_memory", "max_cache_len", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "pad_token_id", "prefill_chunk_size", "renormalize_logits", "return_dict_in_generate", "speculation_type",
    "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
}
"""Settings that change neither what a decoder-only model writes nor where it ends."""

_OFF = {
    "num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1.0, "min_length": 0, "min_new_tokens": 0,
    "no_repeat_ngram_size": 0, "guidance_scale": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "top_k": 0, "min_p": 0.0, "diversity_penalty": 0.0,
}
"""Values with which a setting does nothing; so do none, false and an empty list."""
# fmt: on

_OF_BEAMS = {"early_stopping", "length_penalty"}


def consistent(settings: GenerationConfig) -> GenerationConfig:
    """Without settings of sampling where sampling is off: they do nothing, and transformers refuses to write them."""
    if not settings.do_sample:
        for name in SAMPLING:
            setattr(settings, name, None)
    return settings


def end_ids(source: ModelSource) -> tuple[int, ...]:
    """The ids after which transformers' `generate` ends a text of this model: `eos_token_id` of its
    generation_config.json, a number or a list, and where there is no such file that of its config.json.

    Raises `ConfigError` for a file that cannot be read and for ids that are no numbers.
    """
    eos = _settings(source).eos_token_id
    ids = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    for one in ids:
        if not isinstance(one, numbers.Integral) or isinstance(one, bool) or one < 0:
            raise ConfigError(
                f"eos_token_id of {source.path} is {eos!r}, which is no token id; write a number or a list of numbers "
                f"into its {_FILE}"
            )
    return tuple(dict.fromkeys(int(one) for one in ids))


def unused_settings(source: ModelSource, *, temperature: float, decided: Collection[str] = ()) -> Mapping[str, Any]:
    """What a teacher's generation_config.json says and a generator does not do, by name: whatever changes the text
    beside the end ids, which a generator follows, and beside what `answers` always decides, or does by a setting that
    is named in `decided`. Settings of sampling count where `temperature` is not 0. Those that transformers itself does
    not know are among them."""
    settings = _settings(source)
    ignored = _OF_THE_RUN | _WITHOUT_EFFECT | {"eos_token_id", *decided}
    ignored |= set(SAMPLING) if temperature == 0 else set()
    ignored |= _OF_BEAMS if settings.num_beams in (None, 1) else set()
    return {
        name: value
        for name, value in sorted(settings.to_dict().items())
        if name not in ignored and value not in (None, False, [], {}, _OFF.get(name))
    }


def _settings(source: ModelSource) -> GenerationConfig:
    """As transformers has them when it loads the model."""
    place = str(Path(source.path).expanduser())
    file = cached_file(
        place if Path(place).is_dir() else source.path,
        _FILE,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        config = load_config(source, role="teacher.model")
        with foreign_errors(f"cannot read how {source.path} generates from its config.json"):
            return GenerationConfig.from_model_config(config)
    with foreign_errors(f"cannot read {file}", hint="remove it, or write one that transformers loads"):
        return GenerationConfig.from_pretrained(str(Path(file).parent))
