"""What a rank imports, and what it need not."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from trainer.imports import absent, uncollected


def test_an_absent_module_cannot_be_imported_inside_and_can_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with absent("colorsys"), pytest.raises(ModuleNotFoundError):
        import colorsys
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
    with absent("colorsys"):
        import colorsys as again

        assert again is colorsys, "what was imported before stays"


def test_deepspeed_does_not_bring_mlflow_into_a_rank() -> None:
    code = (
        "import sys; from trainer.imports import absent\n"
        "with absent('mlflow'): import trainer.model.student\n"
        "print('mlflow' in sys.modules, 'deepspeed' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split()[-2:] == ["False", "True"], result.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_inside_and_is_afterwards_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_an_actor_imports_torch_with_the_collector_at_rest_and_not_before() -> None:
    """Ray imports the modules of its classes by itself, with the collector at work."""
    code = "import sys, cluster.teachers.actor, cluster.students.group; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
