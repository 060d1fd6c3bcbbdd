"""What ranks send of their weights: run in processes of real DeepSpeed (`rank_processes.run_cases`)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from rank_processes import Place
from student_world import build, make_run, train

from trainer.model.student import StudentRank
from trainer.types import WeightForm

FORM = WeightForm("float32", bucket_bytes=20_000, stored_names=True)
TEXT = np.arange(3, 40, dtype=np.int32)


def case_buckets(place: Place) -> dict[Any, Any]:
    """At each stage, after two steps: what came of every bucket, where the export lies, what the probe said."""
    found = {}
    for name, student in {
        1: {"zero_stage": 1},
        2: {"zero_stage": 2},
        3: {"zero_stage": 3},
        "adapted": {"zero_stage": 3, "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}},
    }.items():
        run = make_run(place.folder.parent, student=student)
        rank = build(run, place)
        train(rank, run, place, last=2)
        before = _digest(rank)
        folder = place.folder / "exports" / str(name)
        rank.export(folder, merge_adapter="lora" in student)
        found[name] = (_sent(rank), folder, rank.probe(TEXT), before == _digest(rank))
        rank.close()
    return found


def _sent(rank: StudentRank) -> list[tuple[int, dict[str, np.ndarray] | None]]:
    sent, index, count = [], 0, 1
    while index < count:
        header, bucket = rank.weights(2, index, FORM)
        sent.append((header.num_bytes, None if bucket is None else dict(bucket.weights)))
        index, count = index + 1, header.count
    return sent


def _digest(rank: StudentRank) -> str:
    """Of this rank's own share of the weights."""
    digest = hashlib.blake2b()
    for parameter in rank._module.parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        digest.update(held.detach().numpy().tobytes())
    return digest.hexdigest()
