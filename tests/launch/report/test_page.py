"""The report: one file that loads nothing, escapes everything, and exists for any state of a run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.labels import LABELS
from launch.report.metrics import TOKENS_PER_S, MetricsLog, Timeline
from launch.report.numbers import axis_texts, compact, fixed, percent, share
from launch.report.page import BEFORE_START, sample_records, write_report
from launch.report.plots import MAX_POINTS, WIDTH, Series, line_chart, thin, ticks
from launch.report.trained import MEANINGS, trained_records
from launch.report.viewer import ViewedSequence, token_texts
from launch.report.worst import worst_records
from trainer.checks.shown import First, LabelRows, TrainedTokens, Worst, WorstText, WorstToken
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder, write_json
from trainer.types import Evaluation, SampleTokens, StepMetrics

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


class Page(HTMLParser):
    """Everything a browser would see as tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def trained_tokens(**changes: Any) -> TrainedTokens:
    """Two rows: one with three kept ids, one that no row of the teacher belongs to."""
    label = LabelRows(
        ids=np.array([[5, 9, 2], [-1, -1, -1]]),
        teacher=np.log(np.array([[0.6, 0.2, 0.1], [1, 1, 1]], np.float32)),
        student=np.log(np.array([[0.3, np.nan, 0.2], [1, 1, 1]], np.float32)),
        control=np.array([[False, False, True], [False] * 3]),
        num_kept=np.array([3, 0]),
        tail=np.array([0.1, np.nan], np.float32),
        student_tail=np.array([0.5, np.nan], np.float32),
        entropy=np.array([1.25, np.nan], np.float32),
        student_entropy=np.array([2.5, 2.0], np.float32),
        target=np.array([-3.0, np.nan], np.float32),
        student_target=np.array([-4.0, -1.0], np.float32),
        kl=np.array([0.75, np.nan], np.float32),
    )
    fields = {"id": "1:4", "step": 8, "task": "main", "teacher": "", "labels": "topk", "how": "overlap"}
    arrays = {"token_ids": np.array([5, 6, 7, 8], np.int32), "rows": np.array([1, 2]), "label": label}
    aligned = {"groups": np.array([0, -1]), "beside": (np.array([3, 4], np.int32), np.empty(0, np.int32))}
    return TrainedTokens(**fields | arrays | aligned | changes)


def write_trained(folder: RunFolder, text: str, **changes: Any) -> None:
    decode = lambda ids: "".join(f"<{token}>{text}" for token in ids)  # noqa: E731
    write_json(folder.trained, trained_records([trained_tokens(**changes)], decode, lambda task, teacher: decode))


def write_worst(folder: RunFolder, text: str) -> None:
    ids = np.array([5, 6, 7, 8], np.int32)
    sample = SampleTokens(text, ids, np.array([1]), *(np.array([v], np.float32) for v in (-1.0, -0.5, 4.5)))
    first = First(9, -0.105)
    far = WorstToken(text, 4.5, ids[:2], ids[2:3], ids[3:], -3.0, None, first, First(-1, -0.2))
    decode = lambda ids: "".join(f"<{token}>{text}" for token in ids)  # noqa: E731
    write_json(folder.worst, worst_records(Worst((far,), (WorstText(3.25, 7, sample),)), 8, decode))


def write_run(path: Path, *, text: str = "a plain text", steps: int = 8, finished: bool = True) -> RunFolder:
    folder = RunFolder.create(path)
    folder.config.write_text(
        f"name: {json.dumps(text)}\nstudent: {{model: {{path: /secret/place/small}}}}\n"
        "teacher: {model: {path: owner/Large}}\ntraining: {steps: 8}\n"
    )
    log, timeline = MetricsLog(folder), Timeline(folder)
    log.evaluation(Evaluation(0, 100, 6.31, 0.06, 900.0, 8.0))
    for step in range(1, steps + 1):
        timeline.span("student", "wait", step * 10, step * 10 + 1)
        timeline.span("student", "train", step * 10 + 1, step * 10 + 10, text)
        timeline.span(f"scorer-{text}", "score", step * 10, step * 10 + 5)
        log.step(StepMetrics(step, {"train/loss": 5.0 / step, TOKENS_PER_S: 100.0}))
    log.event("redispatch", what=text)
    log.evaluation(Evaluation(8, 100, 1.05, 0.56, 12.0, 8.0))
    sample = SampleTokens(
        id=text,
        token_ids=np.array([5, 6, 7, 8], np.int32),
        rows=np.array([1, 2]),
        student_logprob=np.array([-1.0, -np.inf], np.float32),
        teacher_logprob=np.array([-0.5, -0.25], np.float32),
        kl=np.array([0.125, 2.0], np.float32),
    )
    records = sample_records([sample], lambda ids: "".join(f"<{token}>{text}" for token in ids))
    write_json(folder.samples, {"before": records} | ({"after": records} if finished else {}))
    write_trained(folder, text, id=text, task=text, teacher=text, labels=text, how=text)
    write_worst(folder, text)
    answers = {"prompts": [text], "before": [text]} | ({"after": [text], "reference": [text]} if finished else {})
    write_json(folder.generations, answers)
    write_json(folder.manifest, {"versions": {text: text}, "warnings": [text], "self_tests": [{"name": text}]})
    if finished:
        write_json(folder.exit, {"code": 0, "reason": text})
    return folder


def test_a_run_of_several_tasks_has_tables_by_task_and_teacher_and_one_of_one_has_none(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "several")
    teachers = "teachers: {big: {model: {path: owner/Large}}, code: {model: {path: /secret/coder}}}"
    folder.config.write_text(f"name: a\nstudent: {{model: {{path: small}}}}\n{teachers}\n")
    log = MetricsLog(folder)
    alone = {"sft": Evaluation(0, 20, None, None, 30.0, None)}
    log.evaluation(
        Evaluation(0, 120, 6.0, 0.1, 50.0, 8.0, tasks={"chat": Evaluation(0, 100, 6.0, 0.1, 60.0, 8.0), **alone})
    )
    for step in (1, 2):
        of_tasks = {"task/chat/sequences": 6.0, "task/sft/sequences": 2.0, "task/chat/loss_tokens": 90.0}
        terms = {"task/chat/forward_kl": 6.0 / step, "task/sft/cross_entropy": 3.0}
        asked = {"task/sft/loss_tokens": 10.0, "teacher/big/tokens": 400.0}
        log.step(StepMetrics(step, {"train/loss": 5.0 / step, **of_tasks, **terms, **asked}))
    log.evaluation(
        Evaluation(2, 120, 2.0, 0.5, 20.0, 8.0, tasks={"chat": Evaluation(2, 100, 2.0, 0.5, 18.0, 8.0), **alone})
    )
    cells = ['<th scope="row">chat</th><td>12</td><td>75 %</td><td>180</td><td>90 %</td><td>forward kl 6 → 3</td>']
    cells += ['<th scope="row">sft</th><td>4</td><td>25 %</td><td>20</td><td>10 %</td><td>cross entropy 3</td>']
    cells += ['<th scope="row">big</th><td>800</td><td>100 %</td>']
    cells += ['<th scope="row">chat</th><td>100</td><td>6 → 2</td><td>10 % → 50 %</td><td>60 → 18</td><td>8</td>']
    cells += ['<th scope="row">sft</th><td>20</td><td>-</td><td>-</td><td>30</td><td>-</td>']
    cells += ['<th scope="row">all</th><td>120</td><td>6 → 2</td>']
    page = write_report(folder).read_text()
    assert [cell for cell in cells if cell not in page] == []
    assert "small learns from owner/Large and coder" in page
    assert "By task and teacher" not in write_report(write_run(tmp_path / "one")).read_text()


def test_the_loss_chart_has_the_terms_of_every_kind_and_task_and_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    terms = {"task/pairs/dpo": 0.7, "task/plain/cross_entropy": 2.0, "task/plain/jsd_2": 0.1}
    others = {"task/pairs/loss_tokens": 5.0, "train/jsd_of_mine": 1.0, "train/dpos": 1.0}
    MetricsLog(folder).step(StepMetrics(9, {"train/loss": 3.0} | terms | others))
    legend = {text.strip() for text in Page(write_report(folder).read_text()).text}
    assert {"total", "pairs/dpo", "plain/cross entropy", "plain/jsd 2"} <= legend
    assert not legend & {"pairs/loss tokens", "jsd of mine", "dpos"}


def test_a_loss_of_whole_answers_is_not_called_one_per_token(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "Training loss (nats per token)" in write_report(folder).read_text()
    MetricsLog(folder).step(StepMetrics(9, {"train/loss": 0.7, "train/dpo_2": 0.7}))
    assert "Training loss (nats)" in write_report(folder).read_text()


def test_probability_on_ids_that_do_not_exist_is_a_tile_where_there_is_some(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "On ids that do not exist" not in write_report(folder).read_text()
    log = MetricsLog(folder)
    log.resume(8)
    log.evaluation(Evaluation(9, 100, 1.05, 0.56, 12.0, 8.0, padding_mass=0.054))
    log.close()
    page = "".join(Page(write_report(folder).read_text()).text)
    assert "On ids that do not exist" in page
    assert "5.4" in page


def test_what_a_label_store_held_is_a_tile_where_there_is_one(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.config.write_text("name: a\n")
    log = MetricsLog(folder)
    log.step(StepMetrics(1, {"labels/store_hits": 1.0, "labels/store_misses": 7.0, "labels/store_bytes": 2e6}))
    log.step(StepMetrics(2, {"labels/store_hits": 8.0, "labels/store_misses": 0.0, "labels/store_bytes": 3e6}))
    page = write_report(folder).read_text()
    assert "From the label store" in page
    assert "56 %" in page
    assert "of the sequences, 5 MB" in page
    assert "From the label store" not in write_report(write_run(tmp_path / "one")).read_text()


def test_the_report_loads_nothing_from_outside(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run")).read_text()
    page = Page(html)
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "background"}
    assert not [(tag, a) for tag, a in page.tags if loading & a.keys()]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    policy = next(m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_only_script_is_the_one_the_policy_names(tmp_path: Path) -> None:
    import base64
    import hashlib

    html = write_report(write_run(tmp_path / "run", text=HOSTILE)).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_hostile_text_stays_text_wherever_it_comes_from(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", text=HOSTILE)).read_text())
    assert len(page.named("script")) == 1
    assert not page.named("img")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "".join(page.text).count("alert(2)") >= 12  # title, config, manifest, warnings, events, tokens, answers ...
    assert "".join(page.text).count("{{ 7*7 }}") >= 12  # and no template language is run on it
    harmless = Page(write_report(write_run(tmp_path / "other")).read_text())
    assert [tag for tag, _ in harmless.tags] == [tag for tag, _ in page.tags]


def test_the_headline_says_what_was_reached(tmp_path: Path) -> None:
    text = " ".join(" ".join(Page(write_report(write_run(tmp_path / "run")).read_text()).text).split())
    for expected in ("6.31 → 1.05", "6.0 times lower", "6.0 % → 56 %", "900 → 12", "finished, step 8 of 8"):
        assert expected in text
    assert "Student waited 10 %" in text
    assert "Teacher waited 50 %" in text
    assert "small learns from owner/Large" in text


def test_a_prompt_is_shown_by_its_turns_and_the_answers_stand_beside_each_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]
    answers = {"prompts": [turns], "before": ["me"], "after": ["you"], "teacher": ["they"], "reference": ["we"]}
    write_json(folder.generations, answers)
    text = " ".join(" ".join(Page(write_report(folder).read_text()).text).split())
    assert "system be brief user who? Student before me Student after you Teacher they Dataset we" in text
    assert "where a run has a generator" not in text
    write_json(folder.generations, {name: answers[name] for name in ("prompts", "before", "reference")})
    text = " ".join(" ".join(Page(write_report(folder).read_text()).text).split())
    assert "user who? Student before me Dataset we" in text
    assert "The teacher's own answers are shown where a run has a generator or its teacher is small" in text


def test_a_token_shows_the_row_that_predicted_it(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run")).read_text())
    judged = [a for a in page.named("b") if "data-i" in a]
    assert [a["data-i"] for a in judged] == ["2", "3"]  # rows 1 and 2 predict tokens 2 and 3; tokens 0 and 1 are prompt
    assert [a["data-a"] for a in judged] == ["-1.0000,-0.5000,0.1250", ",-0.2500,2.0000"]
    assert (
        sum(tag == "s" for tag, _ in page.tags) == 2 + 2 + 3
    )  # those of what was trained on and of the worst text too


def test_a_trained_token_shows_its_label_and_says_what_is_not_known(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_trained(folder, "a")
    page = Page(write_report(folder).read_text())
    first, second = (json.loads(a["data-label"] or "") for a in page.named("b") if "data-label" in a)
    assert first["ids"] == [
        ["<5>a", 5, -0.5108, -1.204, 0],
        ["<9>a", 9, -1.6094, None, 0],
        ["<2>a", 2, -2.3026, -1.6094, 1],
    ]
    assert (first["kept"], first["tail"], first["student_tail"], first["kl"]) == (3, 0.1, 0.5, 0.75)
    assert first["beside"] == ["<3>a", "<4>a"]
    assert second == dict.fromkeys(second) | {"ids": [], "token": 8, "kept": 0, "beside": []} | {
        "student_entropy": 2.0,
        "student_target": -1.0,
    }
    assert "bare" in [a.get("class") for a in page.named("b")]
    text = " ".join(" ".join(page.text).split())
    assert "training row 5, epoch 2 labels: topk, align: overlap; 90 % kept, entropy of the label 1.25" in text
    assert "2 tokens, 1 of them without a label" in text


def test_the_furthest_tokens_stand_in_their_text_with_what_both_models_say(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_worst(folder, "a")
    page = Page(write_report(folder).read_text())
    text = " ".join("".join(page.text).split())
    assert "in the evaluation after step 8" in text
    assert (
        "a<5>a<6>a<7>a<8>a 4.5 a token that the student has not 82 %this token not known <9>a 90 %this token 5.0 %"
        in text
    )
    assert "mean KL 3.25 nats over 7 tokens" in text
    assert "The beginning of it." in text
    assert page.named("mark")
    record = json.loads(folder.worst.read_text())
    record["texts"][0]["shown"]["kl"] = []
    write_json(folder.worst, {**record, "tokens": [{"id": "x"}]})
    page = write_report(folder).read_text()
    assert "the lists of one differ in length" in page
    assert "Where the student is furthest" not in page


@pytest.mark.parametrize("kind", [one.model_fields["kind"].default for one in LABELS.built_in])
def test_every_kind_of_labels_has_a_sentence_that_says_what_it_holds(kind: str) -> None:
    assert kind in MEANINGS or kind == "none"


def test_a_damaged_record_of_what_was_trained_costs_itself_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    record = json.loads(folder.trained.read_text())
    (sequence,) = record["sequences"]
    beyond = {**sequence, "id": "beyond", "rows": [{**sequence["rows"][0], "row": 9}]}
    write_json(folder.trained, {**record, "sequences": [{**sequence, "rows": [{"row": 1}]}, beyond, sequence]})
    page = write_report(folder).read_text()
    assert page.count("data-label=") == 2
    assert "a row is none of its tokens" in page
    folder.trained.write_text("{")
    assert "<h2>What was trained on" not in write_report(folder).read_text()


def test_an_unfinished_run_shows_the_student_before(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", steps=3, finished=False)).read_text())
    radios = {a["value"]: a for a in page.named("input")}
    assert "checked" in radios["before"]
    assert "disabled" in radios["after"]
    assert "unfinished, step 3 of 8" in "".join(page.text)


def test_a_page_made_at_the_end_of_a_run_says_finished_and_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    write_json(folder.manifest, {"started": 1.0, "finished": 2.0})
    assert "finished, step 8 of 8" in (text := "".join(Page(write_report(folder).read_text()).text))
    assert "unfinished" not in text.replace(".unfinished", "").replace(".status.unfinished", "")
    write_json(folder.exit, {"code": 5, "reason": "4 steps had a non-finite loss"})
    text = "".join(Page(write_report(folder).read_text()).text)
    assert "ended with exit code 5 at step 8 of 8: 4 steps had a non-finite loss" in text


def test_the_wall_time_is_that_from_the_command_on_and_of_a_resumed_run_the_time_it_worked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    times = {"started": 100.0, "finished": 250.0, "phases_began_s": {BEFORE_START: 30.0}, "resumed_from": None}

    def text() -> str:
        return " ".join(" ".join(Page(write_report(folder).read_text()).text).split())

    write_json(folder.manifest, times)
    assert "Wall time 3 min 00 s from the command on" in text()
    write_json(folder.manifest, times | {"resumed_from": 4})
    assert "Working time 1 min 20 s without pauses" in text()
    write_json(folder.manifest, {"started": 100.0})
    assert "Working time 1 min 20 s without pauses" in text()


def test_rows_of_the_viewer_are_counted_from_one() -> None:
    assert ViewedSequence("0:1233", (), None, None).title == "held-out row 1,234"
    assert ViewedSequence("chat/0:3#1", (), None, None).title == "held-out row 4 of chat, its text 2"
    assert ViewedSequence("some text", (), None, None).title == "some text"


def test_a_run_that_only_has_a_configuration_still_gets_a_page(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.config.write_text("name: young\n")
    text = "".join(Page(write_report(folder).read_text()).text)
    assert "young" in text
    assert "No step and no evaluation has been logged yet" in text


def test_a_run_that_was_asked_to_stop_has_not_failed_and_its_length_is_that_of_the_last_start(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    manifest = json.loads(folder.manifest.read_text()) if folder.manifest.exists() else {}
    write_json(folder.manifest, {k: v for k, v in manifest.items() if k != "finished"} | {"total_steps": 1200})
    write_json(folder.exit, {"code": 75, "reason": "stopped after step 8; run the same command again", "time": 1.0})
    text = "".join(Page(write_report(folder).read_text()).text)
    assert "stopped as asked, step 8 of 1,200" in text
    assert "exit code" not in text


def test_a_folder_that_is_no_run_gets_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        write_report(RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_long_series_keeps_its_mean_and_its_spikes() -> None:
    y = [1.0] * 10_000
    y[5000] = 100.0
    points = thin(Series("loss", tuple(range(10_000)), tuple(y)))
    assert len(points.x) == MAX_POINTS
    assert points.high.max() == 100.0
    assert points.low.min() == 1.0
    assert (points.x[0], points.x[-1]) == (0, 9999)


@pytest.mark.parametrize("options", [{}, {"from_zero": True}])
def test_zeros_have_an_axis_that_people_read(options: dict[str, Any]) -> None:
    chart = line_chart("agreement", [Series("student", (0, 2), (0.0, 0.0))], form=percent, **options)
    assert ">100 %<" in chart
    assert "0.000" not in chart


def test_a_loss_that_is_not_finite_is_marked_and_does_not_bend_the_axis() -> None:
    chart = line_chart("loss", [Series("loss", (1, 2, 3), (1.0, math.nan, 2.0))])
    assert "step 2: not finite" in chart
    assert "nan" not in chart.lower().replace("not finite", "")
    assert "None of the 1 values is finite" in line_chart("loss", [Series("loss", (1,), (math.inf,))])
    assert line_chart("loss", [Series("loss", (), ())]) == ""


@pytest.mark.parametrize(
    "values", [(0.0, 0.0), (5.0, 5.0), (-3.0, 2.0), (1e-9, 2e-9), (1e12, 5e12), (1e300, 2e300), (5e-324, 1e-323)]
)
@pytest.mark.parametrize("options", [{}, {"from_zero": True}, {"logarithmic": True}])
def test_any_range_can_be_drawn(values: tuple[float, float], options: dict[str, Any]) -> None:
    assert "<polyline" in line_chart("x", [Series("x", (1, 2), values)], **options)


def test_what_is_not_finite_stays_inside_the_axis_and_a_long_run_of_it_is_one_mark_a_pixel() -> None:
    steps = tuple(range(1, 100_001))
    chart = line_chart("loss", [Series("loss", steps, (math.nan,) * 99_999 + (1.0,))])
    marks = [int(x) for x in re.findall(r'class="missing" d="M(-?\d+)', chart)]
    assert 100 < len(marks) <= WIDTH
    assert min(marks) > 0
    assert max(marks) < WIDTH
    assert "steps from 1: not finite" in chart


def test_axis_numbers_are_round() -> None:
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-3, 12, 4) == [0, 5, 10]


def test_numbers_are_short_and_true_whatever_they_are() -> None:
    assert [compact(v) for v in (0.0006, 2.414, 1234.0, 2.5e6, 0)] == ["0.0006", "2.41", "1,234", "2.5M", "0"]
    assert [compact(v) for v in (-1.2e-9, 0.9531, 361, 549_123.4, 999.96)] == [
        "-1.2e-09",
        "0.953",
        "361",
        "549,123",
        "1,000",
    ]
    assert [compact(v) for v in (999_999.6, 999_999_999, 123_456_789_012, 1e300)] == ["1M", "1B", "123B", "1e+300"]
    assert [compact(v) for v in (math.nan, math.inf, -math.inf)] == ["not finite"] * 3
    assert [percent(v) for v in (0, 0.034, 0.5, 1)] == ["0 %", "3.4 %", "50 %", "100 %"]
    assert [percent(v) for v in (0.9996, 0.9999999, 1e-7, math.nan)] == [
        "99.96 %",
        "> 99.99 %",
        "< 0.01 %",
        "not finite",
    ]
    for value in np.concatenate([[0.0], *(sign * np.logspace(-307, 307, 2000) for sign in (1, -1))]):
        text = compact(float(value))
        assert len(text) <= 9
        scale = {"M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
        assert float(text.rstrip("MBT").replace(",", "")) * scale == pytest.approx(value, rel=0.06)


def test_numbers_of_a_log_are_fixed_where_they_are_ordinary_and_short_where_not() -> None:
    assert [fixed(v, 2) for v in (171.094, 0.0, -0.5, 1e300, math.nan)] == [
        "171.09",
        "0.00",
        "-0.50",
        "1e+300",
        "not finite",
    ]
    assert [share(v) for v in (0.186, 1.0, math.nan)] == ["18.6%", "100.0%", "not finite"]


def test_axis_numbers_differ_where_values_do() -> None:
    assert axis_texts([8.0001, 8.0002, 8.0003], compact) == ["8.0001", "8.0002", "8.0003"]
    assert axis_texts([1_000_000, 1_000_100], compact) == ["1M", "1.0001M"]
    assert axis_texts([0.5, 0.5005, 0.501], percent) == ["50.00 %", "50.05 %", "50.10 %"]


def test_a_token_of_the_viewer_keeps_the_space_before_it() -> None:
    """As sentencepiece does: the first word of what is decoded loses its space."""
    pieces = [" Paris", " is", " nice", "\ufffd", "!"]
    decode = lambda ids: "".join(pieces[i] for i in ids).removeprefix(" ")  # noqa: E731
    assert token_texts([0, 1, 2, 1], decode) == ["Paris", " is", " nice", " is"]
    assert token_texts([], decode) == []
