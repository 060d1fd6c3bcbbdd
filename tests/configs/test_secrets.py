"""No secret enters through a configuration, and no message shows one."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run
from configs.secrets import find_secret, secret_values, without_named_secrets, without_secrets

KEY = "hf_" + "Ab1" * 12
SECRETS = [
    "https://reader:hunter2-and-more@data.example.org/rows.jsonl",
    f"https://data.example.org/rows.jsonl?version=2&X-Amz-Signature={'ab12' * 8}",
    f"https://data.example.org/rows.jsonl?access_token={'ab12' * 8}",
    f"prefix {KEY}",
]
PARTS = ["hunter2", "ab12ab12", "ab12ab12", KEY]
CASES = list(zip(SECRETS, PARTS, strict=True))
HARMLESS = [
    "https://data.example.org/rows.jsonl?version=2",
    "s3://bucket/rows.parquet",
    "https://data.example.org:8443/a@b/rows.jsonl",
    "models/hf_student",
    "organisation/task-key-words",
    "user@host:folder",
]


@pytest.mark.parametrize(("text", "part"), CASES)
def test_a_secret_is_found_and_masked(text: str, part: str) -> None:
    assert part in text
    assert find_secret(text) is not None
    assert part not in without_secrets(text)
    assert part not in find_secret(text)
    assert find_secret(without_secrets(text)) is None or "***" in without_secrets(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert find_secret(text) is None
    assert without_secrets(text, environment={"HOME": "/home/a", "X_TOKEN": "short"}) == text


def test_values_of_secret_variables_are_masked_whole_where_one_holds_the_other() -> None:
    environment = {"HF_TOKEN": "abcdefgh", "AWS_SECRET_ACCESS_KEY": "abcdefgh-and-more", "PATH": "/usr/bin-and-more"}
    assert secret_values(environment) == ["abcdefgh-and-more", "abcdefgh"]
    assert without_secrets("x abcdefgh-and-more y", environment=environment) == "x *** y"


@pytest.mark.parametrize(("value", "part"), CASES)
@pytest.mark.parametrize("by_override", [False, True])
def test_a_configuration_with_a_secret_is_refused_without_showing_it(
    tmp_path: Path, value: str, part: str, by_override: bool
) -> None:
    file = tmp_path / "run.yaml"
    path = "rows.jsonl" if by_override else value
    file.write_text(
        "name: x\nstudent: {model: {path: a}}\nteacher: {model: {path: b}}\n"
        f"prompts:\n  path: {path}\nlabels: topk\ntraining: {{steps: 3}}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_run(file, [f"prompts.path={value}"] if by_override else [])
    message = str(refused.value)
    assert part not in message
    assert "prompts.path" in message
    assert "environment variable" in message
    assert message.startswith(f"{file}: 1 problem")


def test_a_section_whose_value_is_refused_as_a_secret_is_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: x\nstudent: {model: {path: a}}\nteacher: {model: {path: b}}\nprompts: {path: rows.jsonl}\nlabels: topk\n"
        "training: {steps: 3}\nnotify: {webhook: https://hooks.slack.com/services/T0/B0/x1y2z3}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_run(file)
    assert str(refused.value).startswith(
        f"{file}: 1 problem\n  {file}:7: notify.webhook = 'https://hooks.slack.com/***'"
    )


@pytest.mark.parametrize("key", ["api_key", "password", "WANDB_API_KEY", "access_token"])
@pytest.mark.parametrize("by_override", [False, True])
def test_what_a_key_named_as_a_secret_holds_is_not_shown(tmp_path: Path, key: str, by_override: bool) -> None:
    file = tmp_path / "run.yaml"
    tracker = f"{{kind: wandb, {key}: plain0123456789words}}"
    file.write_text(
        "name: x\nstudent: {model: {path: a}}\nteacher: {model: {path: b}}\nprompts: {path: rows.jsonl}\n"
        "labels: topk\ntraining: {steps: 3}\n" + (f"trackers: [{tracker}]\n" if not by_override else "")
    )
    with pytest.raises(ConfigError) as refused:
        load_run(file, [f"trackers=[{tracker}]"] if by_override else [])
    message = str(refused.value)
    assert "plain0123456789words" not in message
    assert f"trackers.0.{key} = ***" in message
    assert f"unknown key '{key}'" in message


def test_settings_that_hold_no_secret_are_shown_as_they_were_typed() -> None:
    for typed in ("labels={kind: token}", "answers.max_new_tokens=64", "data.special_tokens_in_text=escape"):
        assert without_named_secrets(typed) == typed
    assert without_named_secrets("a={api_key: 'two words', project: x}") == "a={api_key: ***, project: x}"
