"""What DeepSpeed's files may hold: tensors, plain values and its own few classes, and nothing that runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer.errors import ConfigError

pytestmark = pytest.mark.stack  # importing DeepSpeed takes seconds


class Code:
    """Unpickled by the usual loader, this makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.place),))


def test_code_in_a_checkpoint_is_refused_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from trainer.model.zero import TensorsOnly

    file, reader = tmp_path / "shard.pt", TensorsOnly()
    torch.save({"weights": torch.ones(3), "code": Code(tmp_path / "ran")}, file)
    with pytest.raises(ConfigError, match=r"shard.pt holds more than tensors"):
        reader.load(str(file))
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the negative control: without the reader the code runs"


def test_what_deepspeed_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    from trainer.model.zero import TensorsOnly

    torch.save({"weights": torch.ones(3), "loss_scaler": LossScaler(scale=1.0)}, tmp_path / "shard.pt")
    assert TensorsOnly().load(str(tmp_path / "shard.pt"))["weights"].tolist() == [1.0, 1.0, 1.0]
