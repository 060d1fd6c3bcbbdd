"""How an exported student generates where nobody says otherwise."""

from __future__ import annotations

from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "min_p", "top_k", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def consistent(settings: GenerationConfig) -> GenerationConfig:
    """Without settings of sampling where sampling is off: they do nothing, and transformers refuses to write them."""
    if not settings.do_sample:
        for name in SAMPLING:
            setattr(settings, name, None)
    return settings
