"""A smaller student by keeping some decoder layers of a model: `prune`.

A file because it writes model folders key by key. Which entries of a config count layers is in
`trainer/model/pruned_config.py`; what is known wrongly there, or not, `trainer/model/pruned_logits.py` finds.

Layer-dropped initialisation for distillation: DistilBERT (arXiv 1910.01108, section 3) and Minitron's depth pruning
(arXiv 2407.14679); which layers to keep is the caller's choice, measured or by rule.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from configs.models import ModelSource
from trainer.errors import ConfigError, foreign_errors
from trainer.model.pruned_config import index_rules, keep_config
from trainer.model.weights import is_quantised, read_table, refuse_other_tensors, shard_names
from trainer.run_folder import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RECORD = "pruned.json"
INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
_SETTINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")  # of the model and its tokenizer


def prune(source: Path, target: Path, keep_layers: Sequence[int]) -> Path:
    """Write the model of folder `source` with only the decoder layers `keep_layers` (indices from 0) to `target`.

    Layers keep their weights bit for bit and are renumbered in the order given, which must ascend. Everything else
    (embeddings, norms, head, tokenizer, chat template, licence files) is copied. Memory is the pruned model, or one
    shard where that is more. `target` appears whole or not at all. A `target` that holds exactly this pruning of this
    source is left as it is; any other existing folder is an error.

    What is written is loaded once and compared with the source whose other layers are skipped: some architectures
    decide by a layer's index, or by the number of layers, what a layer computes.

    Raises `ConfigError` for a wrong list of layers, a folder without safetensors or with others than its architecture
    needs, a target that exists or is the source, and layers that would compute something else at their new places.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise ConfigError(f"prune: source and target are the same folder {source}: name another target")
    layers = _checked_layers(keep_layers)
    files = _weight_files(source)
    record = _record(source, files, layers)
    if _is_made_from(target, record):
        return target
    if target.exists():
        raise ConfigError(f"prune: {target} exists and holds something else: name another target, or remove it first")
    from trainer.model.pruned_logits import refuse_difference  # here: a pruning that is made should not wait for it

    shards = {file: list(read_table(file, role="prune")) for file in files}
    config = _read_config(source, files, layers)
    prefix = _layer_prefix(shards, config.num_hidden_layers, source)
    with new_folder(target) as working:
        _copy_others(source, working)
        _write_weights(shards, working, prefix, layers)
        refusal = _refusal(config, source, layers)
        _write_config(config, working, layers, refusal=refusal)
        refuse_difference(config, working, layers, refusal=refusal)
        (working / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
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


def _write_config(config: PreTrainedConfig, target: Path, layers: Sequence[int], *, refusal: str) -> None:
    with foreign_errors(f"{refusal}: its configuration cannot describe them"):
        kept = copy.deepcopy(config)
        keep_config(kept, layers)
        kept.save_pretrained(target)


def _refusal(config: PreTrainedConfig, source: Path, layers: Sequence[int]) -> str:
    rules = index_rules(config)
    may = f"; {', '.join(rules[:4])} may be why" if rules else ""
    shown = f"{layers[0]} to {layers[-1]}" if len(layers) > 8 else ", ".join(map(str, layers))
    return (
        f"prune: layers {shown} of {source} would not compute at their new places what they do now, and "
        f"{config.model_type} cannot be pruned like this{may}"
    )


def _read_config(source: Path, files: Sequence[Path], layers: Sequence[int]) -> PreTrainedConfig:
    """The configuration of `source`, whose weights are those it describes and which has all of `layers`."""
    from trainer.model.load import build_on_meta, load_config  # here: a pruning that is made should not wait for them

    model = ModelSource(path=str(source))
    config = load_config(model, role="prune")
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ConfigError(f"prune: {source}: the config of {config.model_type!r} names no num_hidden_layers")
    if is_quantised(config):
        raise ConfigError(f"prune: the weights of {source} are quantised; prune the folder that they were made from")
    if layers[-1] >= config.num_hidden_layers:
        outside = [i for i in layers if i >= config.num_hidden_layers]
        raise ConfigError(
            f"prune: layers {outside} do not exist: {source} has layers 0 to {config.num_hidden_layers - 1}"
        )
    shapes = {name: shape for file in files for name, shape in read_table(file, role="prune").items()}
    on_meta = build_on_meta(model, copy.deepcopy(config), role="prune")
    refuse_other_tensors(on_meta, shapes, role="prune", place=str(source))
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
        files = [source / name for name in shard_names(source / INDEX, role="prune")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"prune: {source} lacks {missing}, which its index names: the folder is incomplete")
    if not files:
        raise ConfigError(f"prune: {source} has no *.safetensors: save the model with save_pretrained first")
    return files


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
        with foreign_errors(f"prune: cannot read {shard}"), safe_open(shard, framework="pt") as tensors:
            for old, new in _kept_names(shards[shard], prefix, layers):
                kept[new] = tensors.get_tensor(old)
        if kept:
            with foreign_errors(f"prune: cannot write {target / shard.name}"):
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
    for file in _others(source):
        if file.name != "config.json":
            shutil.copyfile(file, target / file.name)


def _others(source: Path) -> list[Path]:
    return [
        file
        for file in sorted(source.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in _WEIGHT_SUFFIXES
        and not file.name.endswith(".index.json")
        and file.name not in (RECORD, "prepared.json")
    ]


def _record(source: Path, files: Sequence[Path], layers: Sequence[int]) -> dict[str, object]:
    """What the pruned folder was made from; equal records mean equal folders."""
    return {
        "source": source.name,
        "source_files": {file.name: _fingerprint(file) for file in files},
        "source_settings": {file.name: _fingerprint(file) for file in _others(source) if file.suffix in _SETTINGS},
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
    if isinstance(found, dict) and "source_settings" not in found:  # of a version that did not look at them
        record = {name: value for name, value in record.items() if name != "source_settings"}
    return found == record and (target / "config.json").is_file() and any(target.glob("*.safetensors"))
