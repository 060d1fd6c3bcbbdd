"""Which teachers vLLM can run, known from its source: held against vLLM's own registry."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from cluster.engines.vllm_registry import (
    check_architecture,
    check_layers,
    known_architectures,
    known_quantisations,
    unknown_quantisation,
)
from trainer.errors import ConfigError


def config(*architectures: str, **fields: object) -> SimpleNamespace:
    return SimpleNamespace(architectures=list(architectures), **fields)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForConditionalGeneration"])
def test_models_of_vllm_are_known(name: str) -> None:
    assert name in known_architectures()
    check_architecture(config(name), place="teacher.model.path: x")


def test_a_model_of_transformers_that_fits_vllms_backend_passes() -> None:
    assert "BioGptForCausalLM" not in known_architectures()
    check_architecture(config("BioGptForCausalLM"), place="x")


@pytest.mark.parametrize(
    ("architectures", "match"),
    [
        (
            ("CodeGenForCausalLM",),
            r"no model for CodeGenForCausalLM, and transformers' own does not fit.*engine: \{kind: hf\}",
        ),
        (("FooForCausalLM",), r"no model for FooForCausalLM, and transformers does not know it either"),
        ((), "names no architecture; add"),
    ],
)
def test_what_vllm_cannot_run_is_refused(architectures: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_architecture(config(*architectures), place="teacher.model.path: x")


def test_code_that_comes_with_a_model_is_left_to_the_engine() -> None:
    check_architecture(config("FooForCausalLM", auto_map={"AutoModelForCausalLM": "m.Foo"}), place="x")


def test_quantisations_that_vllm_does_not_name_are_found() -> None:
    assert {"fp8", "awq", "compressed-tensors"} <= known_quantisations()
    assert unknown_quantisation(config("X")) is None
    assert unknown_quantisation(config("X", quantization_config={"quant_method": "compressed_tensors"})) is None
    assert unknown_quantisation(config("X", quantization_config={"quant_method": "nope"})) == "nope"


def layered(architecture: str) -> SimpleNamespace:
    """Of a model with three layers."""
    return config(architecture, get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))


def test_states_between_layers_are_asked_of_models_that_give_them() -> None:
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"):  # by a base, of another file too
        check_layers(layered(name), (0, 1, 3), place="labels.layers")
    check_layers(layered("Gemma2ForCausalLM"), (3,), place="labels.layers")  # the last one is the last hidden state
    with pytest.raises(ConfigError, match=r"labels.layers: vLLM .* between its layers of Gemma2.*engine: {kind: hf}"):
        check_layers(layered("Gemma2ForCausalLM"), (1, 3), place="labels.layers")
    check_layers(layered("BioGptForCausalLM"), (1, 2), place="labels.layers")  # through the backend
    with pytest.raises(ConfigError, match=r"the state that its first layer reads of BioGpt.*or leave out layer 0"):
        check_layers(layered("BioGptForCausalLM"), (0, 2), place="labels.layers")


@pytest.mark.stack
def test_what_is_read_from_the_source_is_what_vllm_says_itself() -> None:
    code = "from vllm import ModelRegistry as r; print('ARCHS', *r.get_supported_archs())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
    own = set(next(line for line in said.splitlines() if line.startswith("ARCHS")).split()[1:])
    assert known_architectures() <= own
    speculative = ("Eagle", "Peagle", "Medusa", "DFlash")
    missing = {name for name in own if name.endswith("ForCausalLM")} - known_architectures()
    assert not [
        name for name in missing if "MTP" not in name and "Eagle" not in name and not name.startswith(speculative)
    ]
