"""A smaller student by keeping some decoder layers of a model: `prune`.

A file because it reads and writes model folders key by key, never a whole model, and knows the one thing no library
does: which config entries count layers.

Layer-dropped initialisation for distillation: DistilBERT (arXiv 1910.01108, section 3) and Minitron's depth pruning
(arXiv 2407.14679); which layers to keep is the caller's choice, measured or by rule.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RECORD = "pruned.json"
INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")

# One entry per layer, where the config gives a list of as many entries as layers.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_configs",
    "no_rope_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "activation_sparsity_pattern",
)
# Lists of layer indices.
_LAYER_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attention_idxs")
# Rules that compute something from a layer's index, with the value that means "no such rule": not preserved by pruning.
_INDEX_RULES: Mapping[str, tuple[object, ...]] = {
    "first_k_dense_replace": (None, 0),
    "decoder_sparse_step": (None, 1),
    "moe_layer_freq": (None, 1),
    "interleave_moe_layer_step": (None, 1),
    "num_kv_shared_layers": (None, 0),
    "attn_layer_period": (None, 1),
    "expert_layer_period": (None, 1),
    "cross_attention_layers": (None, []),
    "scale_attn_by_inverse_layer_idx": (None, False),
}


def prune(source: Path, target: Path, keep_layers: Sequence[int]) -> Path:
    """Write the model of folder `source` with only the decoder layers `keep_layers` (indices from 0) to `target`.

    Layers keep their weights bit for bit and are renumbered in the order given, which must ascend. Everything else
    (embeddings, norms, head, tokenizer, chat template, licence files) is copied. Works shard by shard: memory is one
    shard. `target` appears whole or not at all. A `target` that holds exactly this pruning of this source is left
    as it is; any other existing folder is an error.

    Raises `ConfigError` for a wrong list of layers, a folder without safetensors, a target that exists or is the
    source, and architectures whose layers depend on their index by a rule that pruning would break.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise ConfigError(f"prune: source and target are the same folder {source}: name another target")
    layers = _checked_layers(keep_layers)
    files = _weight_files(source)
    record = _record(source, files, layers)
    if target.exists():
        if _is_made_from(target, record):
            return target
        raise ConfigError(f"prune: {target} exists and holds something else: name another target, or remove it first")
    config = _read_config(source)
    if layers[-1] >= config.num_hidden_layers:
        outside = [i for i in layers if i >= config.num_hidden_layers]
        raise ConfigError(
            f"prune: layers {outside} do not exist: {source} has layers 0 to {config.num_hidden_layers - 1}"
        )
    shards = {file: _tensor_names(file) for file in files}
    prefix = _layer_prefix(shards, config.num_hidden_layers, source)
    keep_config(config, layers)

    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _copy_others(source, working)
        config.save_pretrained(working)
        _write_weights(shards, working, prefix, layers)
        (working / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        working.chmod(0o755)
        working.rename(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return target


def parse_layers(text: str) -> list[int]:
    """Layer indices from text such as `0-9,20-29` or `0,2,4`; ranges include both ends. Raises `ConfigError`."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ConfigError(f"layers {text!r}: {part!r} is no index and no range; write for example 0-9,20-29")
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if last < first:
            raise ConfigError(f"layers {text!r}: the range {part!r} runs backwards; write {last}-{first}")
        layers.extend(range(first, last + 1))
    return layers


def keep_config(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Change `config` in place to describe only `layers`. Raises `ConfigError` for rules that depend on the index."""
    before = config.num_hidden_layers
    if len(layers) < before:
        for name, harmless in _INDEX_RULES.items():
            value = getattr(config, name, None)
            if value not in harmless:
                raise ConfigError(
                    f"prune: {config.model_type} sets {name}: {value!r}, which decides by a layer's index what"
                    " the layer is; dropping layers would change those that stay. Such models cannot be pruned by depth"
                )
    changes: dict[str, object] = {"num_hidden_layers": len(layers)}
    for name in _PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == before:
            changes[name] = [value[i] for i in layers]
    for name in _LAYER_INDICES:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            changes[name] = [new for new, old in enumerate(layers) if old in value]
    for name, value in changes.items():
        setattr(config, name, value)


def _read_config(source: Path) -> PreTrainedConfig:
    from transformers import AutoConfig  # here: a pruning that is already made should not wait for this import

    config = AutoConfig.from_pretrained(source)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ConfigError(f"prune: {source}: the config of {config.model_type!r} names no num_hidden_layers")
    return config


def _checked_layers(keep_layers: Sequence[int]) -> list[int]:
    layers = list(keep_layers)
    if not layers:
        raise ConfigError("prune: no layer to keep: give at least one index, for example --keep-layers 0-9")
    if layers[0] < 0 or sorted(set(layers)) != layers:
        raise ConfigError(
            f"prune: layers {layers} must ascend from 0 on and name each layer once,"
            f" for example {sorted({i for i in layers if i >= 0})}"
        )
    return layers


def _weight_files(source: Path) -> list[Path]:
    if not (source / "config.json").is_file():
        raise ConfigError(f"prune: {source} has no config.json: give a model folder in Hugging Face format")
    files = sorted(source.glob("*.safetensors"))
    if (source / INDEX).is_file():
        names = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [source / name for name in sorted(set(names))]
        if outside := [file for file in files if file.parent != source]:
            raise ConfigError(f"prune: {source / INDEX} names a file outside of its folder: {outside[0]}")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"prune: {source} lacks {missing}, which its index names: the folder is incomplete")
    if not files:
        raise ConfigError(f"prune: {source} has no *.safetensors: save the model with save_pretrained first")
    return files


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ConfigError(f"prune: {file} cannot be read ({error}): it is damaged or no safetensors file") from error


def _layer_prefix(shards: Mapping[Path, list[str]], num_layers: int, source: Path) -> str:
    """The name before the layer index, such as `model.layers`: the first number in a key counts decoder layers."""
    indices: dict[str, set[int]] = {}
    for keys in shards.values():
        for key in keys:
            match = re.match(r"(.+?)\.(\d+)\.", key)
            if match:
                indices.setdefault(match[1], set()).add(int(match[2]))
    fitting = [prefix for prefix, found in indices.items() if found == set(range(num_layers))]
    if len(fitting) != 1:
        raise ConfigError(
            f"prune: {source}: expected one list of {num_layers} layers among the weights, found"
            f" { {prefix: len(found) for prefix, found in indices.items()} or 'no numbered weights' }"
        )
    return fitting[0]


def _write_weights(shards: Mapping[Path, list[str]], target: Path, prefix: str, layers: Sequence[int]) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in shards:
        kept = {}
        with safe_open(shard, framework="pt") as tensors:
            for old, new in _kept_names(shards[shard], prefix, layers):
                kept[new] = tensors.get_tensor(old)
        if kept:
            save_file(kept, target / shard.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(kept, shard.name)
            total_bytes += sum(tensor.nbytes for tensor in kept.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _kept_names(keys: Sequence[str], prefix: str, layers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Old and new name of every tensor that stays."""
    renumbered = {old: new for new, old in enumerate(layers)}
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.(.+)")
    for key in keys:
        match = pattern.fullmatch(key)
        if match is None:
            yield key, key
        elif int(match[1]) in renumbered:
            yield key, f"{prefix}.{renumbered[int(match[1])]}.{match[2]}"


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, template, generation config, licence files: all but weights, their index, the config and records."""
    skipped = {"config.json", RECORD, "prepared.json"}
    for file in sorted(source.iterdir()):
        weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in skipped and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _record(source: Path, files: Sequence[Path], layers: Sequence[int]) -> dict[str, object]:
    """What the pruned folder was made from; equal records mean equal folders."""
    return {
        "source": source.name,
        "source_files": {file.name: _fingerprint(file) for file in files},
        "kept_layers": list(layers),
    }


def _fingerprint(file: Path) -> str:
    """sha256 of the size and of the first and last MiB: other weights differ there, and terabytes need not be read."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(2**20))
        stream.seek(max(0, size - 2**20))
        digest.update(stream.read(2**20))
    return digest.hexdigest()


def _is_made_from(target: Path, record: Mapping[str, object]) -> bool:
    try:
        found = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == record and (target / "config.json").is_file() and any(target.glob("*.safetensors"))
