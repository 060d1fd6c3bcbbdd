"""The tracker of docs/tracking.md, as a user would copy it: one file on the Python path."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from trackers_of import evaluation, followed, step

from configs.trackers import TRACKERS
from launch.check.trackers import reached
from launch.report.metrics import MetricsLog

PAGE = Path(__file__).parents[3] / "docs" / "tracking.md"


def test_the_tracker_of_the_page_tracks_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "my_tracking").mkdir()
    (tmp_path / "my_tracking/csv.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    tracker = {"kind": "my_tracking.csv", "file": str(tmp_path / "curves.csv")}
    told: list[str] = []
    with followed(tmp_path, tracker, told) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        for number in (1, 2, 3):
            log.step(step(number, loss=0.5))
        log.close()
    with followed(tmp_path, tracker, told, goes_on=True) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        log.resume(2)
        log.step(step(3, loss=0.5))
        log.evaluation(evaluation(3))
        log.close()
    rows = [line.split(",") for line in (tmp_path / "curves.csv").read_text().splitlines()]
    assert [row[1] for row in rows if row[2] == "train/loss"] == ["1", "2", "3"]
    assert ["3", "evaluation/forward_kl", "0.5"] in [row[1:] for row in rows]
    assert told == [f"my_tracking.csv: less {tmp_path / 'curves.csv'}"] * 2
    found = TRACKERS.validate({**tracker, "file": str(tmp_path / "nowhere/curves.csv")})
    with pytest.raises(OSError, match="there is no folder"):
        TRACKERS.load(found).reach()


def test_a_tracker_that_leaves_when_it_is_asked_does_not_end_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving").mkdir()
    (tmp_path / "leaving/early.py").write_text(
        "from configs.trackers import TrackerChoice\n\n\nclass Tracker(TrackerChoice):\n"
        "    def reach(self):\n        raise SystemExit(5)\n\n    def begin(self, run):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = reached(SimpleNamespace(trackers=[TRACKERS.validate({"kind": "leaving.early"})]))
    assert finding.status == "warning"
    assert "leaving.early: RuntimeError: it calls sys.exit(5)" in finding.text
