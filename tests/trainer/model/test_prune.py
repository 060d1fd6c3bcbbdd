"""Pruning layers: the pruned folder computes what the kept layers compute, and mistakes leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from every_architecture import ARCHITECTURES, LAYERS, save_architecture
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.errors import ConfigError
from trainer.model.prune import parse_layers, prune
from trainer.model.pruned_logits import refuse_difference

TOKENS = torch.tensor([[1, 17, 40, 5, 99, 123, 200, 7, 31]])


def saved(folder: Path, family: str = "llama", *, shard_size: str = "5GB", **options: object) -> torch.nn.Module:
    model = tiny_model(family, seed=3, **{"num_hidden_layers": 4, **options})
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return model


def by_hand(model: torch.nn.Module, keep: list[int]) -> torch.nn.Module:
    """The oracle: the same modules, the others taken out of the list."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = [model.config.layer_types[i] for i in keep]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(keep)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    # Weights mapped from a file lie where they lie in it, and some processors' products round by alignment.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_pruned_logits_equal_a_model_built_by_hand_from_the_kept_layers(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = saved(tmp_path / "whole", family, tied=tied)
    prune(tmp_path / "whole", tmp_path / "small", [0, 3])
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert pruned.config.num_hidden_layers == 2
    whole = logits(model)
    assert torch.equal(logits(pruned), logits(by_hand(model, [0, 3])))
    assert not torch.allclose(logits(pruned), whole, atol=1e-2)


def test_other_layers_would_give_other_logits(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    prune(tmp_path / "whole", tmp_path / "a", [0, 3])
    prune(tmp_path / "whole", tmp_path / "b", [0, 2])
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert not torch.allclose(logits(a), logits(b), atol=1e-2)


def test_keeping_all_layers_changes_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole")
    prune(tmp_path / "whole", tmp_path / "same", range(4))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "same")), logits(model))


def test_per_layer_lists_of_the_config_follow_the_layers(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", "gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    prune(tmp_path / "whole", tmp_path / "small", [1, 3])
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "full_attention"]


def test_a_sharded_folder_is_pruned_shard_by_shard_with_a_new_index(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", shard_size="200KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    prune(tmp_path / "whole", tmp_path / "small", [1, 2])
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert {file.name for file in (tmp_path / "small").glob("*.safetensors")} == set(index["weight_map"].values())
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in pruned.parameters())
    assert torch.equal(logits(pruned), logits(by_hand(model, [1, 2])))


def test_dtype_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", dtype=torch.bfloat16)
    (tmp_path / "whole" / "LICENCE_NOTE.md").write_text("apache-2.0")
    prune(tmp_path / "whole", tmp_path / "small", [2])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == model.dtype == torch.bfloat16
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("small", "whole"))
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert (tmp_path / "small" / "LICENCE_NOTE.md").read_text() == "apache-2.0"


def test_pruning_again_does_nothing_and_pruning_otherwise_refuses(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    target = prune(tmp_path / "whole", tmp_path / "small", [0, 1])
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert prune(tmp_path / "whole", target, [0, 1]) == target
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="exists and holds something else"):
        prune(tmp_path / "whole", target, [0, 2])
    tiny_model(seed=4, num_hidden_layers=4).save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="exists and holds something else"):
        prune(tmp_path / "whole", target, [0, 1])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_source_whose_settings_changed_is_not_taken_for_the_one_that_was_pruned(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    target = prune(tmp_path / "whole", tmp_path / "small", [0, 1])
    record = json.loads((target / "pruned.json").read_text())
    (tmp_path / "whole" / "README.md").write_text("of no effect")
    file = tmp_path / "whole" / name
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match="exists and holds something else"):
        prune(tmp_path / "whole", target, [0, 1])
    del record["source_settings"]  # as an earlier version wrote it
    (target / "pruned.json").write_text(json.dumps(record))
    assert prune(tmp_path / "whole", target, [0, 1]) == target


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([], "no layer to keep"),
        ([0, 4], r"layers \[4\] do not exist.*0 to 3"),
        ([-1, 0], "must ascend"),
        ([1, 1], "name each layer once"),
        ([2, 0], "must ascend"),
    ],
)
def test_a_wrong_list_of_layers_is_refused_and_nothing_is_written(layers: list[int], says: str, tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    with pytest.raises(ConfigError, match=says):
        prune(tmp_path / "whole", tmp_path / "small", layers)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_source_and_target_must_differ_and_the_source_must_be_a_model(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    with pytest.raises(ConfigError, match="same folder"):
        prune(tmp_path / "whole", tmp_path / "whole", [0])
    with pytest.raises(ConfigError, match=r"no config\.json"):
        prune(tmp_path / "nowhere", tmp_path / "small", [0])
    (tmp_path / "whole" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        prune(tmp_path / "whole", tmp_path / "small", [0])


def test_damaged_weights_are_an_error_that_names_the_file_and_leaves_no_target(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"model\.safetensors (is no safetensors file|has 7 bytes of)"):
        prune(tmp_path / "whole", tmp_path / "small", [0])
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def skipping(model: torch.nn.Module, keep: list[int]) -> torch.nn.Module:
    """The oracle for any architecture: the source as transformers loads it; its other layers hand on what they get."""
    lists = [m for _, m in sorted(model.named_modules(), key=lambda item: item[0].count("."))]
    layers = next(m for m in lists if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    answer = logits_and_answer(model, layers[0])[1]
    others = None if isinstance(answer, torch.Tensor) else [None] * (len(answer) - 1)
    for index, layer in enumerate(layers):
        if index not in keep:
            layer.forward = lambda hidden, *args, **kwargs: hidden if others is None else (hidden, *others)
    return model


def logits_and_answer(model: torch.nn.Module, layer: torch.nn.Module) -> tuple[torch.Tensor, object]:
    answers = []
    with layer.register_forward_hook(lambda module, given, answer: answers.append(answer)):
        return logits(model), answers[0]


def assert_pruned_rightly_or_refused(name: str, tmp_path: Path) -> str | None:
    """Each list of layers gives a folder that computes what the source does without the others, or one message."""
    if save_architecture(tmp_path / "whole", name) is None:
        pytest.skip("does not build this small")
    said = None
    for keep in ([0, 3], [1, 2]):
        target = tmp_path / f"small-{keep[0]}"
        try:
            prune(tmp_path / "whole", target, keep)
        except ConfigError as error:
            said = str(error)
            assert said.startswith("prune: ")
            assert not target.exists()
            continue
        pruned, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        expected = logits(skipping(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), keep))
        assert torch.equal(logits(pruned), expected), keep
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    return said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("glm4_moe", None),  # dense layers first, then experts: said of each layer
        ("afmoe", None),  # said by a number, which is counted anew
        ("qwen2_moe", None),
        ("minicpm3", "scale_depth"),  # scales residuals by the square root of the number of layers
        ("jamba", "expert_layer_period"),
        ("gemma4_text", "per_layer"),
        ("mamba", None),
        ("bloom", None),  # its layers answer with a tuple
        ("nemotron_h", None),
    ],
)
def test_rules_that_depend_on_a_layers_place_are_kept_or_refused(name: str, says: str | None, tmp_path: Path) -> None:
    said = assert_pruned_rightly_or_refused(name, tmp_path)
    assert said is None if says is None else says in said


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_pruned_rightly_or_refused(name: str, tmp_path: Path) -> None:
    assert_pruned_rightly_or_refused(name, tmp_path)


def test_the_comparison_finds_other_layers_and_other_windows(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "gemma2")
    target = prune(tmp_path / "whole", tmp_path / "small", [0, 2])
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    refuse_difference(config, target, [0, 2], refusal="prune")
    with pytest.raises(ConfigError, match=r"prune: their kinds are"):  # of both sorts, and the folder has one
        refuse_difference(config, target, [0, 3], refusal="prune")
    config.query_pre_attn_scalar = 17
    with pytest.raises(ConfigError, match=r"prune: scaling of layer 0 is"):
        refuse_difference(config, target, [0, 2], refusal="prune")
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    config.final_logit_softcapping = 4.0
    with pytest.raises(ConfigError, match=r"prune: logits differ by"):
        refuse_difference(config, target, [0, 2], refusal="prune")


def test_a_source_that_lacks_a_tensor_is_not_copied(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "whole/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"prune: .* lacks model\.norm\.weight"):
        prune(tmp_path / "whole", tmp_path / "small", [0, 1])
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_config_of_absurd_depth_is_refused_at_once(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    (tmp_path / "whole/config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    with pytest.raises(ConfigError, match=r"config\.json says num_hidden_layers: 1000000000000"):
        prune(tmp_path / "whole", tmp_path / "small", [0, 1])


def test_layer_texts_read_as_ranges_with_both_ends() -> None:
    assert parse_layers("0-2,5, 7 - 8") == [0, 1, 2, 5, 7, 8]
    for wrong in ("", "a", "3-1", "0--2", "1,,2"):
        with pytest.raises(ConfigError, match="layers"):
            parse_layers(wrong)
