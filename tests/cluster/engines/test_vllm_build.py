"""The plug-in refuses in a process whose code is not the controller's; vLLM runs it in every process of an engine."""

from __future__ import annotations

import pytest

from trainer.build import VARIABLE, build_hash
from trainer.errors import ConfigError

pytestmark = pytest.mark.stack


def test_the_plug_in_makes_no_labels_with_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from cluster.engines import vllm_labels

    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    vllm_labels.register()  # no architecture is named: this process scores nothing
    monkeypatch.setenv(vllm_labels.ARCHITECTURE_VARIABLE, "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="another version of Stillhouse"):
        vllm_labels.register()
    monkeypatch.setenv(VARIABLE, build_hash())
    vllm_labels.register()
