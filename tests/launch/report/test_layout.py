"""The report in a real browser: no number, name or text is cut, covered or out of sight, at four widths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from browser import WIDTHS, browser, layout_faults, rendered

from launch.report.metrics import GRAD_NORM, LEARNING_RATE, LOSS, STUDENT_WAIT, TOKENS_PER_S, MetricsLog, Timeline
from launch.report.page import sample_records, write_report
from launch.report.trained import trained_records
from launch.report.worst import worst_records
from trainer.checks.shown import First, LabelRows, TrainedTokens, Worst, WorstText, WorstToken
from trainer.run_folder import RunFolder, write_json
from trainer.types import Evaluation, SampleTokens, StepMetrics

pytestmark = pytest.mark.skipif(
    browser() is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)

NAN, INF = math.nan, math.inf
NUMBERS = (
    0.0,
    1.0,
    -1.2e-9,
    3.97,
    12.34,
    361.0,
    999.96,
    549_123.0,
    -999_999.0,
    123_456_789_012.0,
    1e300,
    5e-324,
    NAN,
    INF,
)
LONG = "a_name_that_never_ends_" * 12
TEXTS = {
    "long": LONG,
    "markup": "</p></script><img src=x onerror=alert(1)><b>bold</b>",
    "arabic": "ما هي عاصمة فرنسا؟ أجب بجملة واحدة من فضلك. " * 8,
    "chinese": "请用一句话回答法国的首都是哪里" * 12,
    "emoji": "👩‍👩‍👧‍👦🇫🇷é̂" * 40,
    "lines": "one\n\ttwo\n" * 30,
}


def trained_tokens(text: str, *, labels: str, how: str) -> TrainedTokens:
    """Labels of 40 tokens of any encoding and alignment."""
    n, m = 40, 8
    logprobs = -np.linspace(0, 12, n * m, dtype=np.float32).reshape(n, m)
    ones = np.linspace(0, 1, n, dtype=np.float32)
    label = LabelRows(
        ids=np.arange(n * m).reshape(n, m) % 60,
        teacher=logprobs,
        student=np.where(np.arange(m) == 3, np.nan, 2 * logprobs),
        control=np.broadcast_to(np.arange(m) > 5, (n, m)),
        num_kept=np.full(n, -1 if labels == "hidden" else 64),
        tail=ones,
        student_tail=ones[::-1],
        **dict.fromkeys(("entropy", "student_entropy", "kl"), 10 * ones),
        target=-ones,
        student_target=-20 * ones,
    )
    beside = tuple(np.arange(i % 7, dtype=np.int32) for i in range(n)) if how else ()
    tokens, groups = np.arange(60, dtype=np.int32), np.arange(n) if how else np.empty(0, np.int64)
    return TrainedTokens("0:3", 8, LONG, text, labels, how, tokens, np.arange(n), label, groups, beside)


def write_run(
    path: Path,
    *,
    name: str = "a-run",
    evaluations: list[Evaluation] | None = None,
    steps: range = range(1, 9),
    value: float = 2.5,
    text: str = "what is the capital of France?",
    pause_s: float = 0.0,
    reason: str = "",
    tasks: tuple[str, ...] = (),
) -> RunFolder:
    folder = RunFolder.create(path)
    folder.config.write_text(f"name: {json.dumps(name)}\nteacher: {{model: {{path: owner/{LONG[:90]}}}}}\n")
    log, timeline = MetricsLog(folder), Timeline(folder)
    for step in steps:
        start = step * 10 + (pause_s if step > steps[len(steps) // 2] else 0)
        timeline.span("student", "train", start, start + 9, f"step {step}")
        timeline.span("scorer-0", "score", start - 5, start + 2)
        values = {
            LOSS: value,
            TOKENS_PER_S: value,
            GRAD_NORM: value * step,
            LEARNING_RATE: value / step,
            STUDENT_WAIT: 0.1,
            **{f"teacher/{name}/tokens": 1e6 * value for name in tasks},
        }
        for name in tasks:
            values |= {f"task/{name}/{field}": 1000 * value for field in ("sequences", "loss_tokens", "forward_kl")}
        log.step(StepMetrics(step, values))
    measured = Evaluation(
        8, 6, 0.5, 0.6, 12.0, 8.0, tasks={name: Evaluation(8, 6, 9.5, 0.1, 1e9, 3.2) for name in tasks}
    )
    for evaluation in evaluations if evaluations is not None else [measured]:
        log.evaluation(evaluation)
    log.event("redispatch", what=text, replica=LONG)
    sample = SampleTokens(
        id="0:3",
        token_ids=np.arange(60, dtype=np.int32),
        rows=np.arange(59),
        student_logprob=np.full(59, -1.0, np.float32),
        teacher_logprob=np.full(59, -np.inf, np.float32),
        kl=np.linspace(0, 9, 59, dtype=np.float32),
    )
    write_json(folder.samples, {"before": sample_records([sample], lambda ids: "".join(text[i : i + 1] for i in ids))})
    decode = lambda ids: "".join(text[i : i + 1] for i in ids)  # noqa: E731
    kinds = ("topk", "sampled", "token", "hidden", "given_ids")
    trained = [trained_tokens(text, labels=kind, how="") for kind in kinds]
    trained += [trained_tokens(text, labels="topk", how="overlap"), trained_tokens(text, labels="token", how="chunks")]
    write_json(folder.trained, trained_records(trained, decode, lambda task, teacher: decode))
    first, tokens = First(3, -0.5), np.arange(60, dtype=np.int32)
    far = [
        WorstToken(LONG, kl, tokens[:24], tokens[24:25], tokens[25:33], -9.0, -1.0, first, first) for kl in (9.5, 1e9)
    ]
    write_json(folder.worst, worst_records(Worst(tuple(far), (WorstText(9.5, 1000, sample),)), 8, decode))
    turns = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    answers = {who: [text, text * 20] for who in ("before", "after", "teacher", "reference")}
    write_json(folder.generations, {"prompts": [turns, text], **answers})
    write_json(
        folder.manifest, {"versions": {LONG: LONG}, "warnings": [text, LONG], "roles": {"student": {"ranks": 2}}}
    )
    write_json(folder.exit, {"code": 5 if reason else 0, "reason": reason})
    return folder


def pages(folders: dict[str, RunFolder]) -> dict[str, str]:
    return {name: write_report(folder).read_text() for name, folder in folders.items()}


def test_any_two_headline_numbers_fit_their_tiles(tmp_path: Path) -> None:
    pairs = [(before, NUMBERS[i - 1]) for i, before in enumerate(NUMBERS)] + [(549_123.0, 361.0), (-1.2e-9, -9.9e-9)]
    runs = {
        f"{before} to {after}": write_run(
            tmp_path / str(number),
            evaluations=[Evaluation(step, 6, v, v, v, v) for step, v in ((0, before), (8, after))],
            value=before,
        )
        for number, (before, after) in enumerate(pairs)
    }
    assert layout_faults(pages(runs), tmp_path) == []


def test_any_text_and_any_length_of_a_run_fit_the_page(tmp_path: Path) -> None:
    evaluations = [Evaluation(step, 6, 6.0 / (step + 1), 0.5, 1e6 / (step + 1), 8.0) for step in range(0, 100_000, 500)]
    runs = {
        **{name: write_run(tmp_path / name, text=text, reason=text) for name, text in TEXTS.items()},
        "no step": write_run(tmp_path / "none", steps=range(0), evaluations=[]),
        "only an evaluation": write_run(
            tmp_path / "before", steps=range(0), evaluations=[Evaluation(0, 6, 4, 0.1, 99, 8)]
        ),
        "one step": write_run(tmp_path / "one", steps=range(1, 2)),
        "100,000 steps": write_run(tmp_path / "many", steps=range(20, 100_001, 20), evaluations=evaluations, value=1e5),
        "no held-out rows": write_run(tmp_path / "unheld", evaluations=[]),
        "nothing finite": write_run(tmp_path / "nan", value=NAN, evaluations=[Evaluation(8, 6, NAN, NAN, NAN, NAN)]),
        "several tasks": write_run(tmp_path / "tasks", tasks=("chat", "x" * 64, "sft")),
        "resumed twice": write_run(tmp_path / "resumed", pause_s=86_400.0),
        "long name": write_run(tmp_path / "named", name="x" * 80),
    }
    assert layout_faults(pages(runs), tmp_path) == []


def test_the_measurement_sees_a_number_that_is_cut_and_a_label_that_leaves_its_figure(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text()
    broken = {
        "uncut": page.replace("</style>", ".tile .value span { transform: translate(120px); }</style>"),
        "cut": page.replace("</style>", ".tile .value { overflow: hidden; white-space: nowrap; width: 20px }</style>"),
        "moved": page.replace('text-anchor="end"', 'text-anchor="end" transform="translate(-60)"'),
        "wide": page.replace("</style>", "main { min-width: 3000px; }</style>"),
    }
    found = "\n".join(layout_faults(broken, tmp_path))
    for name, fault in (
        ("uncut", "out of"),
        ("cut", "cut: value"),
        ("moved", "out of its figure"),
        ("wide", "page is"),
    ):
        for width in WIDTHS:
            assert f"{name} at {width}: {fault}" in found


HOSTILE = "'\"><img src=x onerror=alert(1)></code><script>alert(2)</script>\u2028<!--"


@pytest.mark.parametrize("kind", ["topk", "token"])
def test_a_hostile_token_is_text_for_the_browser_too_when_its_label_is_shown(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path / "run")
    decode = lambda ids: HOSTILE * len(ids)  # noqa: E731
    trained = [trained_tokens(HOSTILE, labels=kind, how=how) for how in ("", "overlap")]
    write_json(folder.trained, trained_records(trained, decode, lambda task, teacher: decode))
    document = rendered(write_report(folder), tmp_path)
    assert 'class="label" aria-live="polite"><p class="of">prediction of <code>' in document
    assert "<img" not in document
    assert document.count("<script>") == 1
    assert document.count("&lt;img src=x onerror=alert(1)&gt;") > 80
