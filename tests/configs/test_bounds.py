"""What a configuration may hold: numbers that a machine can use, paths that a disk can hold, a page or two of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from configs.document import MAX_BYTES
from configs.errors import ConfigError
from configs.load import dump_run, load_run
from configs.paths import named_path
from configs.section import MOST_SECONDS

BASE = """\
name: x
student: {model: {path: a}}
teacher: {model: {path: b}}
prompts: {path: c}
data: {evaluation: {path: c}}
training: {steps: 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(BASE)
    return tmp_path / "run.yaml"


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_run(file, overrides)
    assert len(str(raised.value)) < 2000
    return str(raised.value)


@pytest.mark.parametrize("name", ["start", "room", "score", "step"])
@pytest.mark.parametrize("seconds", ["1e300", "2592001", ".inf", "1e10"])
def test_a_wait_that_no_timer_holds_is_refused(file: Path, name: str, seconds: str) -> None:
    text = refused(file, f"faults.{name}_timeout_s={seconds}")
    assert f"faults.{name}_timeout_s = " in text
    assert "must be at most 2592000" in text or "must be a finite number" in text
    assert load_run(file, [f"faults.{name}_timeout_s={MOST_SECONDS}"]).run.faults


@pytest.mark.parametrize(
    "number", ["0x" + "f" * 5000, "9" * 4000, "9" * 5000, "9223372036854775808", "-9223372036854775808"]
)
@pytest.mark.parametrize("key", ["seed", "training.steps", "data.max_length", "labels.k", "report.generate", "other"])
def test_an_integer_that_no_machine_holds_is_refused(file: Path, key: str, number: str) -> None:
    assert f"{key} = " in refused(file, f"{key}={number}") or key == "other"


@pytest.mark.parametrize("key", ["training.sequences_per_step", "student.ranks", "training.depth", "report.generate"])
def test_a_count_that_no_machine_holds_is_refused(file: Path, key: str) -> None:
    assert "must be at most 2147483647" in refused(file, f"{key}=2147483648")


PATH_KEYS = ["folder", "student.model.path", "teacher.model.path", "student.model.local_copy", "prompts.path"]
PATH_KEYS += ["data.evaluation.path", "teacher.chat_template"]


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_path_that_no_disk_holds_is_refused(file: Path, key: str) -> None:
    assert "there is no user 'nosuchuser' here" in refused(file, f"{key}=~nosuchuser/x")
    assert "too long; a name has at most 255 bytes" in refused(file, f"{key}={'x' * 300}")
    assert "too long; a name has at most 255 bytes" in refused(file, f"{key}=a/{'é' * 150}/b")
    assert "too long" in refused(file, f"{key}={'x/' * 2100}")
    assert load_run(file, [f"{key}=a/{'é' * 120}/b"])


def test_the_root_is_no_run_folder(file: Path) -> None:
    assert "the root of all files is no run folder" in refused(file, "folder=/")
    assert load_run(file, ["folder=/x", "prompts.path=/"])


@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 300, "a\0b"])
def test_a_path_of_a_command_line_is_refused_in_the_same_words(path: str) -> None:
    with pytest.raises(ConfigError, match="RUN: "):
        named_path("RUN", path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("body", ["[" * 60_000, "{" * 60_000, "x" * MAX_BYTES, "[1" + ", 1" * 30_000 + "]", "&a [*a]"])
def test_a_file_that_is_no_page_of_settings_is_one_message_in_bounded_time(file: Path, body: str) -> None:
    file.write_text(BASE + "more: " + body + "\n")
    began = time.monotonic()
    refused(file)
    assert time.monotonic() - began < 60


def test_a_device_that_never_ends_is_no_configuration_and_a_pipe_is_one(tmp_path: Path) -> None:
    assert "has more than 128 KiB" in refused(Path("/dev/zero"))
    reading, writing = os.pipe()
    with open(writing, "w") as end:
        end.write(BASE)
    run = load_run(f"/dev/fd/{reading}").run
    os.close(reading)
    (tmp_path / "again.yaml").write_text(dump_run(run))
    assert load_run(tmp_path / "again.yaml").run == run


def test_the_name_of_an_anchor_may_be_used_again_without_a_warning(
    file: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file.write_text(BASE + "report: {generate: &a 1, generate_tokens: *a, viewer_sequences: &a 2}\n")
    assert load_run(file).run.report.viewer_sequences == 2
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["topk", "nucleus", "sampled", "given_ids", "hidden", "dense"])
@pytest.mark.parametrize(
    ("temperature", "bound"), [("0.009", "at least 0.01"), ("1e-30", "at least"), ("1e30", "at most 100")]
)
def test_a_temperature_whose_square_no_loss_can_hold_is_refused(
    file: Path, kind: str, temperature: str, bound: str
) -> None:
    assert bound in refused(file, f"labels={{kind: {kind}, temperature: {temperature}}}")


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("[jsd]", "objective.0\n      jsd needs 'beta', which is missing: write {loss: jsd, beta: ...}"),
        ("jsd", "objective = 'jsd'\n      must be a list, here [jsd]"),
        (
            "[{loss: forward_kl, token_weights: [position]}]",
            "token_weights.0\n      position needs 'half_life', which is missing: write {kind: position, "
            "half_life: ...}",
        ),
        ("[{loss: forward_kl, token_weights: entropy}]", "must be a list, here [entropy]"),
        (
            "[{loss: forward_kl, token_weights: [{kind: difficulty, keep: 0.05}]}]",
            "below the smallest (0.1): lower least",
        ),
        ("[{loss: dkd, alpha: 0, beta: 0}]", "alpha and beta are both 0"),
        ("[{loss: dpo, beta: 1e300}]", "must be at most 1000"),
        ("[{loss: forward_kl, token_weights: [{kind: confidence, power: 1e300}]}]", "must be at most 1000"),
        ("[reverse_kl]", "write labels: given_ids (the student's likeliest ids) or labels: hidden (exact)"),
    ],
)
def test_a_term_with_parameters_that_cannot_be_says_what_to_write(file: Path, objective: str, words: str) -> None:
    assert words in refused(file, "labels=sampled", f"objective={objective}")
