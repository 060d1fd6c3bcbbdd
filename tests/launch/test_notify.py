"""Who is told how a run ended: a real server and real commands hear of every ending once, and no secret is shown."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from web_hooks import web_hook

from configs.load import load_run
from configs.notify import Notify
from launch import train as train_module
from launch.check import watching
from launch.check.watching import examine_notify
from launch.notify import Notifier
from launch.report.numbers import duration
from launch.stall import Stalled
from trainer.errors import ConfigError, DataError, Preempted, StillhouseError
from trainer.run_folder import RunFolder
from trainer.types import Evaluation, StepMetrics

SECRET = "secret-path"


class Numbers:
    """What a notice reads of an observer."""

    newest_step = StepMetrics(step=7, values={"train/loss": 1.25, "train/tokens": 100.0})
    newest_evaluation = Evaluation(
        7, num_rows=3, forward_kl=0.5, agreement=0.75, perplexity=9.0, teacher_perplexity=8.0, padding_mass=0.0
    )


def configured(tmp_path: Path, notify: dict[str, Any]) -> Path:
    """A configuration that can be loaded, with that section; JSON is YAML."""
    file = tmp_path / "run.yaml"
    run = "name: mine\nfolder: FOLDER\nstudent: {model: {path: a}}\nteacher: {model: {path: b}}\n"
    run += "prompts: {path: rows.jsonl}\ntraining: {steps: 3}\n"
    file.write_text(run.replace("FOLDER", str(tmp_path / "run")) + f"notify: {json.dumps(notify)}\n")
    return file


def notifier(tmp_path: Path, said: list[str], **notify: Any) -> Notifier:
    made = Notifier("mine", Notify(**notify), RunFolder(tmp_path), tell=said.append)
    made.follow(Numbers(), steps=20)
    return made


def test_a_webhook_gets_one_post_with_everything_that_a_person_asks_first(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<html>")
    said: list[str] = []
    with web_hook() as hook:
        notifier(tmp_path, said, webhook=hook.address).ended(3, "train.jsonl:4: no answer")
    assert said == []
    (notice,) = hook.posted
    assert hook.paths == ["/services/T000/secret-path"]
    assert {name: notice[name] for name in ("run", "kind", "exit_code", "reason", "step", "steps", "loss")} == {
        "run": "mine",
        "kind": "failure",
        "exit_code": 3,
        "reason": "train.jsonl:4: no answer",
        "step": 7,
        "steps": 20,
        "loss": 1.25,
    }
    assert notice["evaluation"]["forward_kl"] == 0.5
    assert notice["report"] == str(tmp_path / "report.html")
    assert notice["host"] == os.uname().nodename
    assert notice["text"].startswith(
        f"mine failed on {notice['host']}, after {duration(notice['ended'] - notice['began'])}, exit code 3, "
        "step 7 of 20, loss 1.25"
    )
    assert notice["began"] == psutil.Process().create_time(), "imports count, as in what the run says that it took"
    assert "train.jsonl:4: no answer" in notice["text"], "a chat shows `text` alone"


@pytest.mark.parametrize(
    ("on", "code", "stalled", "kinds"),
    [
        (("end", "failure", "stall"), 0, False, ["end"]),
        (("end", "failure", "stall"), 75, False, []),
        (("end", "failure", "stall"), 130, False, []),
        (("preemption",), 75, False, ["preemption"]),
        (("preemption",), 130, False, ["preemption"]),
        (("preemption",), 4, False, []),
        (("end",), 4, True, []),
        (("failure",), 4, True, ["stall"]),
        (("stall",), 4, True, ["stall"]),
        (("stall",), 4, False, []),
        (("failure",), 1, False, ["failure"]),
    ],
)
def test_only_the_endings_that_are_asked_for_are_told(
    tmp_path: Path, on: tuple[str, ...], code: int, stalled: bool, kinds: list[str]
) -> None:
    with web_hook() as hook:
        notifier(tmp_path, [], webhook=hook.address, on=on).ended(code, "so", stalled=stalled)
    assert [notice["kind"] for notice in hook.posted] == kinds


def test_an_ending_is_told_once(tmp_path: Path) -> None:
    with web_hook() as hook:
        told = notifier(tmp_path, [], webhook=hook.address)
        told.ended(4, "a stall", stalled=True)
        told.ended(0, "finished")
    assert [notice["kind"] for notice in hook.posted] == ["stall"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (500, "the server answered 500"),
        (302, "answered 302 Found; write the address that it leads to"),
        (0, "no answer within 0.5 s"),
    ],
)
def test_a_server_that_takes_nothing_is_told_once_in_bounded_time_without_its_address(
    tmp_path: Path, answers: int, words: str
) -> None:
    said: list[str] = []
    with web_hook(answers) as hook:
        began = time.monotonic()
        notifier(tmp_path, said, webhook=hook.address, timeout_s=0.5).ended(0, "finished")
        took = time.monotonic() - began
    assert took < 10
    assert len(hook.posted) == 1
    assert hook.gets == 0, "a redirect would lose the notice"
    (line,) = said
    assert line.startswith("notify.webhook: how the run ended could not be told: ")
    assert words in line
    assert SECRET not in line


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/secret-path", "http://127.0.0.1:1/secret path\N{SNOWMAN}"])
def test_what_cannot_be_reached_is_told_without_its_address(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", address)
    said: list[str] = []
    notifier(tmp_path, said, webhook="${HOOK}").ended(0, "finished")
    (line,) = said
    assert "secret" not in line


def test_an_address_in_the_environment_is_used_and_a_missing_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with web_hook() as hook:
        host, _, path = hook.address.partition("/services/")
        monkeypatch.setenv("MY_HOOK", path)
        told = notifier(tmp_path, said, webhook=f"{host}/services/${{MY_HOOK}}")
        told.ended(0, "finished")
        assert hook.paths == ["/services/T000/secret-path"]
    monkeypatch.delenv("MY_HOOK")
    notifier(tmp_path, said, webhook="${MY_HOOK}").ended(0, "finished")
    assert said == [
        "notify.webhook: how the run ended could not be told: the environment variable MY_HOOK is not set here; export "
        "it where `train` runs"
    ]


def test_a_command_gets_json_on_stdin_and_variables(tmp_path: Path) -> None:
    program = (
        "import json, os, sys; run = json.load(sys.stdin)['run']; "
        "told = [os.environ[f'STILLHOUSE_{name}'] for name in ('KIND', 'LOSS', 'REPORT')]; "
        "open(sys.argv[1], 'w').write(json.dumps([run, *told]))"
    )
    said: list[str] = []
    told = notifier(tmp_path, said, command=[sys.executable, "-c", program, str(tmp_path / "told")])
    told.ended(0, "finished")
    assert said == []
    assert json.loads((tmp_path / "told").read_text()) == ["mine", "end", "1.25", ""]


def test_a_command_that_is_text_is_run_by_the_shell(tmp_path: Path) -> None:
    said: list[str] = []
    notifier(tmp_path, said, command=f'echo "$STILLHOUSE_KIND $STILLHOUSE_EXIT_CODE" > {tmp_path}/told').ended(5, "nan")
    assert said == []
    assert (tmp_path / "told").read_text() == "failure 5\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo no such address >&2; exit 3", "exit code 3: no such address"),
        ("sleep 600 & sleep 600", "killed after at most 0.5 s"),
        (("no-such-program-anywhere",), "No such file or directory"),
    ],
)
def test_a_command_that_fails_or_hangs_is_told_and_ended(
    tmp_path: Path, command: str | tuple[str, ...], words: str
) -> None:
    said: list[str] = []
    began = time.monotonic()
    notifier(tmp_path, said, command=command, timeout_s=0.5).ended(0, "finished")
    assert time.monotonic() - began < 10
    (line,) = said
    assert line.startswith("notify.command: how the run ended could not be told: ")
    assert words in line


def test_reasons_are_told_without_secrets(tmp_path: Path) -> None:
    with web_hook() as hook:
        notifier(tmp_path, [], webhook=hook.address).ended(2, "cannot read https://me:hunter2@host/rows")
    assert "hunter2" not in json.dumps(hook.posted)


# --- every way in which a run ends ------------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[..., None]:
    def end(*args: object, **more: object) -> None:
        raise error

    return end


ENDINGS = {
    "configuration": (raises(ConfigError("no model")), ConfigError, "failure", 2),
    "data": (raises(DataError("no row")), DataError, "failure", 3),
    "stall": (raises(Stalled("nothing was scored")), Stalled, "stall", 4),
    "preempted": (raises(Preempted("stopped")), Preempted, "preemption", 75),
    "ctrl-c": (raises(KeyboardInterrupt()), KeyboardInterrupt, "preemption", 130),
    "a defect": (raises(TypeError("a bug")), TypeError, "failure", 1),
    "a full disk": (raises(OSError(28, "No space left on device", "/x")), StillhouseError, "failure", 4),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_however_a_run_ends_one_notice_says_so(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end, raised, kind, code = ENDINGS[case]
    monkeypatch.setattr(train_module, "_train_in_folder", end)
    with web_hook() as hook:
        notify = {"webhook": hook.address, "on": ["end", "failure", "preemption"]}
        with pytest.raises(raised):
            train_module.train(configured(tmp_path, notify), [])
    assert [(notice["kind"], notice["exit_code"]) for notice in hook.posted] == [(kind, code)]


def test_a_signal_while_the_ending_is_told_does_not_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_train_in_folder", raises(DataError("no row")))
    command = f"kill -TERM {os.getpid()}; sleep 0.5; kill -INT {os.getpid()}; echo $$ > {tmp_path}/pid; sleep 600"
    began = time.monotonic()
    with pytest.raises(DataError):
        train_module.train(configured(tmp_path, {"command": command, "timeout_s": 100}), [])
    assert time.monotonic() - began < 50, "Ctrl-C ends the waiting"
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists(), "and the command"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- what is configured -----------------------------------------------------------------------------------------------

REFUSED = {
    "nobody": ({"on": ["end"]}, "nobody is told: give webhook or command"),
    "a scheme": ({"webhook": "ftp://example.org/x"}, "the webhook is no http or https address"),
    "no address": ({"webhook": "example.org/hook"}, "the webhook is no http or https address"),
    "a variable": ({"webhook": "$SLACK"}, "a variable is written ${NAME}"),
    "an ending": ({"webhook": "http://a/b", "on": ["ends"]}, "did you mean 'end'?"),
    "nothing": ({"webhook": "http://a/b", "on": []}, "at least 1 item"),
    "an empty command": ({"command": []}, "at least 1 item"),
    "a blank command": ({"command": " "}, "names no program"),
    "patience": ({"command": "x", "timeout_s": 3600}, "at most 120"),
    "a key": ({"webhok": "http://a/b"}, "did you mean 'webhook'?"),
    "a known secret": ({"webhook": "https://hooks.slack.com/services/T0/B0/abc"}, "notify takes webhook: ${NAME}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    notify, words = REFUSED[case]
    file = configured(tmp_path, notify)
    with pytest.raises(ConfigError) as refused:
        load_run(file)
    assert words in str(refused.value)
    assert f"{file}:" in str(refused.value)
    assert "T0/B0/abc" not in str(refused.value)


def findings(tmp_path: Path, **notify: Any) -> list[tuple[str, str]]:
    run = load_run(configured(tmp_path, notify)).run
    return [(finding.status, finding.text) for finding in examine_notify(run)]


def test_check_says_who_is_told_what_and_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_hook() as hook:
        monkeypatch.setenv("HOOK", hook.address)
        found = findings(tmp_path, webhook="${HOOK}", command=["sh", "-c", "true"])
        assert hook.posted == []
    assert found == [
        ("ok", f"end, failure and stall are told to http://127.0.0.1:{hook.server_port} (its address is in HOOK)"),
        ("ok", "end, failure and stall are told to ('sh', '-c', 'true')"),
    ]


def test_check_warns_of_a_webhook_that_does_not_answer(tmp_path: Path) -> None:
    assert findings(tmp_path, webhook="http://127.0.0.1:1/x", on=["end"])[1] == (
        "warning",
        "notify.webhook: http://127.0.0.1:1 does not answer from here (Connection refused)",
    )


@pytest.mark.parametrize(
    ("notify", "words"),
    [
        ({"webhook": "${NOT_SET_ANYWHERE}"}, "notify.webhook: the environment variable NOT_SET_ANYWHERE is not set"),
        ({"command": ["no-such-program-anywhere"]}, "notify.command.0: there is no program 'no-such-program-anywhere'"),
        ({"command": "no-such-program-anywhere -x"}, "notify.command: there is no program 'no-such-program-anywhere'"),
        ({"command": "echo 'x"}, "notify.command: the shell cannot read"),
    ],
)
def test_check_refuses_what_could_never_be_told(tmp_path: Path, notify: dict[str, Any], words: str) -> None:
    ((status, text),) = findings(tmp_path, **notify)
    assert status == "problem"
    assert words in text


@pytest.mark.parametrize("command", ['test "$STILLHOUSE_KIND" = end || mail me', "A=b env", "if true; then :; fi"])
def test_check_takes_every_command_that_the_shell_reads(tmp_path: Path, command: str) -> None:
    assert [status for status, _ in findings(tmp_path, command=command)] == ["ok"]


def test_check_does_not_wait_for_a_name_server_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    monkeypatch.setattr(watching, "ANSWER_S", 0.3)
    monkeypatch.setattr(watching.socket, "create_connection", lambda *args, **more: asked.wait(60))
    began = time.monotonic()
    (_, (status, text)) = findings(tmp_path, webhook="http://somewhere.example/x")
    asked.set()
    assert time.monotonic() - began < 20
    assert (status, text) == (
        "warning",
        "notify.webhook: http://somewhere.example does not answer from here (no answer)",
    )
