"""What labels must say, from transformers' own logits in float64, and how far an engine's columns are from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from configs.labels import Labels
from trainer.labels.encoding import ABSENT, load_encoding, row_keys
from trainer.labels.ragged import padded
from trainer.model.head import Head, HeadShape
from trainer.types import RowIds, Sequence, Unit, tokens_to_read

VOCABULARY = 283  # of tests/support/tiny_models.py; its models are padded to 320


def random_unit(unit_id: str, *lengths_and_spans: tuple[int, list[tuple[int, int]]], seed: int = 0) -> Unit:
    """A unit of random tokens: length and loss spans of each sequence."""
    rng = np.random.default_rng(seed)
    sequences = []
    for i, (length, spans) in enumerate(lengths_and_spans):
        mask = np.zeros(length, dtype=bool)
        for start, end in spans:
            mask[start:end] = True
        token_ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        sequences.append(Sequence(f"{unit_id}/{i}", token_ids, mask, "dataset"))
    return Unit(unit_id, tuple(sequences))


def random_given_ids(unit: Unit, num_given: int, *, seed: int = 1) -> RowIds:
    """Different random ids for every row of a unit, the target id first; every third row has half of them."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(VOCABULARY)[:num_given] for _ in range(unit.num_rows)]).astype(np.int32)
    targets = np.concatenate([s.token_ids[np.flatnonzero(s.loss_mask) + 1] for s in unit.sequences])
    for row, target in zip(ids, targets, strict=True):
        row[row == target] = row[0]
        row[0] = target
    ids[::3, (num_given + 1) // 2 :] = -1
    return RowIds(unit.tokens_hash(), ids)


def oracle_of(folder: Path, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, V] log-probabilities of all loss rows of a unit, and int64 [N] target ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows, following = [], []
    for sequence in unit.sequences:
        token_ids = torch.from_numpy(sequence.token_ids).long()
        with torch.no_grad():
            logits = model(input_ids=token_ids[None]).logits[0, :, :VOCABULARY].double()
        at = np.flatnonzero(sequence.loss_mask)
        rows.append(logits.log_softmax(-1).numpy()[at])
        following.append(sequence.token_ids[at + 1])
    return np.concatenate(rows), np.concatenate(following).astype(np.int64)


def assert_states_match(layers: tuple[int, ...], unit: Unit, folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    """The states after these layers equal transformers' `hidden_states`; and the same comparison fails, by a lot, for
    rows moved by one and for layers moved by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    for sequence in unit.sequences:
        with torch.no_grad():
            ids = torch.from_numpy(sequence.token_ids).long()[None]
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        rows.append(torch.cat(states)[:, sequence.loss_mask].transpose(0, 1).numpy())
    exact = np.concatenate(rows)  # [N, all layers, H]
    found = columns["states"].reshape(len(exact), len(layers), -1)
    scale = np.abs(exact).max((0, 2), keepdims=True)[:, list(layers)]

    def error(truth: np.ndarray) -> float:
        return float((np.abs(found - truth[:, list(layers)]) / scale).max((0, 2)).max())

    assert error(exact) < 1e-4, (layers, error(exact))
    for control in (np.roll(exact, 1, axis=0), np.roll(exact, 1, axis=1)):
        wrong = (np.abs(found - control[:, list(layers)]) / scale).max((0, 2))
        assert wrong.min() > 0.1, (layers, wrong)


def teacher_head_of(folder: Path) -> Head:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = model.get_output_embeddings()
    return Head(head.weight.detach(), head.bias, HeadShape.of_config(model.config), VOCABULARY)


def label_errors(
    spec: Labels,
    unit: Unit,
    columns: Mapping[str, np.ndarray],
    oracle: np.ndarray,
    target_ids: np.ndarray,
    head: Head,
) -> dict[str, float]:
    """Largest difference to the oracle of each thing that labels of this kind say; `logprobs_f16` is rounded."""
    kind, rows = spec.kind, np.arange(len(oracle))[:, None]
    if kind == "dense":
        return {"logprobs": float(np.abs(columns["logprobs"] - oracle).max())}
    if kind == "hidden":
        logits = head.logits(torch.from_numpy(columns["hidden"]))
        return {"logprobs": float(np.abs(logits.double().log_softmax(-1).numpy() - oracle).max())}
    if kind == "token":
        return {"logprob": float(np.abs(columns["logprob"] - oracle[rows, target_ids[:, None]]).max())}
    if kind == "nucleus":
        return _nucleus_errors(spec, columns, oracle, target_ids)
    if kind == "sampled":
        return _sampled_errors(spec, unit, columns, oracle, target_ids)
    ids = columns["ids"].astype(np.int64)
    k = ids.shape[1]
    rest = oracle.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    absent = columns["logprobs"] == ABSENT
    best = oracle[rows, ids] if kind == "given_ids" else -np.sort(-oracle, axis=1)[:, :k]
    wrong = np.where(absent, 0.0, columns["logprobs"].astype(np.float64) - oracle[rows, ids])
    return {
        "ids": float(np.abs(oracle[rows, ids] - best).max()),
        "logprobs_f16": float(np.abs(wrong).max()),
        "tail": float(np.abs(columns["tail"][:, 0] - np.log(np.exp(rest).sum(1))).max()),
        "target": float(np.abs(columns["target"] - oracle[rows, target_ids[:, None]]).max()),
    }


def _nucleus_errors(
    spec: Labels, columns: Mapping[str, np.ndarray], oracle: np.ndarray, target_ids: np.ndarray
) -> dict[str, float]:
    """What a flat block says of each row; no id may be likelier than one that was kept, control ids apart."""
    counts = columns["num_ids"][:, 0].astype(np.int64)
    rows, ids = np.repeat(np.arange(len(oracle)), counts), columns["ids"].astype(np.int64)
    rest = oracle.copy()
    rest[rows, ids] = -np.inf
    at = np.arange(len(oracle))
    chosen = ~np.isin(ids, spec.control_ids)
    return {
        "ids": float((rest.max(1)[rows] - oracle[rows, ids])[chosen].max(initial=0.0)),
        "logprobs_f16": float(np.abs(columns["logprobs"].astype(np.float64) - oracle[rows, ids]).max()),
        "tail": float(np.abs(columns["tail"][:, 0] - np.log(np.exp(rest).sum(1))).max()),
        "target": float(np.abs(columns["target"][:, 0] - oracle[at, target_ids]).max()),
    }


def _sampled_errors(
    spec: Labels, unit: Unit, columns: Mapping[str, np.ndarray], oracle: np.ndarray, target_ids: np.ndarray
) -> dict[str, float]:
    """Against the draws from the oracle with the same random numbers; rounding moves few of them."""
    texts = [(torch.from_numpy(tokens_to_read(s)), s.loss_mask) for s in unit.sequences if s.num_loss_tokens]
    keys = torch.cat([row_keys(text, torch.from_numpy(np.flatnonzero(mask))) for text, mask in texts])
    encoding, targets = load_encoding(spec), torch.from_numpy(target_ids)
    again = encoding.estimate(encoding.encode(torch.from_numpy(oracle), targets, keys), oracle.shape[1])
    counts = columns["num_ids"]
    given = {name: torch.from_numpy(columns[name]) for name in ("tail", "target", "entropy", "control", "num_ids")}
    given |= {name: torch.from_numpy(padded(columns[name], counts)) for name in ("ids", "draws")}
    control = list(spec.control_ids)
    return {
        "draws_moved_f16": float((encoding.estimate(given, oracle.shape[1]) - again).abs().sum(1).mean()) / 2,
        "control": float(np.abs(columns["control"] - oracle[:, control]).max()),
        "target": float(np.abs(columns["target"][:, 0] - oracle[np.arange(len(oracle)), target_ids]).max()),
    }


def assert_labels_match(
    spec: Labels,
    unit: Unit,
    columns: Mapping[str, np.ndarray],
    oracle: np.ndarray,
    target_ids: np.ndarray,
    head: Head,
) -> None:
    """Equal to transformers; and the same comparison fails, by a lot, for rows shifted by one."""
    for name, error in label_errors(spec, unit, columns, oracle, target_ids, head).items():
        assert error < (1e-2 if name.endswith("f16") else 1e-4), (spec, name, error)
    shifted = {name: np.roll(column, 1, axis=0) for name, column in columns.items()}
    wrong = label_errors(spec, unit, shifted, oracle, target_ids, head)
    assert max(wrong.values()) > 1.0, (spec, wrong)
