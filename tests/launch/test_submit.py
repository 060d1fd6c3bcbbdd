"""The commands around a submission, as a person types them: what is printed, refused, remembered, and returned."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from command_line import SECRET, stillhouse
from fakes.ray_dashboard import FakeDashboard, fake_dashboard
from ray_head import free_port
from ruamel.yaml import YAML

from configs.load import load_run
from launch import submit
from launch.bundle import Bundle
from launch.jobs import write_record
from launch.targets import local, ray, ray_client
from trainer.run_folder import RunFolder

JOB = {
    "submission_id": "small-1",
    "status": "RUNNING",
    "driver_node_id": "ab12",
    "driver_exit_code": None,
    "start_time": 1_700_000_000_000,
    "type": "SUBMISSION",
    "entrypoint": "exec python -m launch train run.yaml",
    "message": "Job is currently running.",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    for name in ("models/teacher", "models/student"):
        (folder / name).mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    config = {
        "name": "small",
        "student": {"model": {"path": "models/student"}},
        "teacher": {"model": {"path": "models/teacher"}},
        "prompts": {"path": "rows.jsonl"},
        "training": {"steps": 3},
    }
    with (folder / "run.yaml").open("w") as file:
        YAML(typ="safe").dump(config, file)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def dashboard() -> FakeDashboard:
    with fake_dashboard() as fake:
        yield fake


def submit_unchecked(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The models here are empty folders: tests/launch/test_submit_check.py has the look before."""
    return stillhouse("submit", "--no-check", *arguments, **environment)


def remember(project: Path, address: str, **fields: object) -> None:
    """As if the run had been submitted to this cluster."""
    record = {"job": "small-1", "kind": "ray", "name": "small", "folder": "/cluster/runs/small", "handle": "small-1"}
    record |= {"options": {"address": address}, "submitted": time.time(), **fields}
    (project / "runs/small").mkdir(parents=True)
    (project / "runs/small/submission.json").write_text(json.dumps(record))


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stderr.count("error:") == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


# --- before anything is sent ------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_whole_request_and_contacts_nobody(project: Path, dashboard: FakeDashboard) -> None:
    given = ["--with", f"address={dashboard.address}", "--with", "driver_resources={head: 1}"]
    result = submit_unchecked("run.yaml", "--to", "ray", "--dry-run", "--set", "seed=7", *given)
    assert result.returncode == 0, result.stderr
    text = result.stdout
    request = json.loads(text.split("----- job.json -----\n")[1].split("\n\n")[0])
    ending = request["entrypoint"].partition("; exec python -m launch train run.yaml --ending ")[2]
    assert ending == f"{project}/runs/small/submissions/{request['submission_id']}/exit.json"
    assert request["runtime_env"]["env_vars"]["PYTHONPATH"] == "code"
    assert request["entrypoint_resources"] == {"head": 1}
    assert "seed: 7" in text.split("----- run.yaml -----\n")[1]
    assert "code/cluster/engines/vllm_labels.py" in text
    assert "prompts/" in text
    assert SECRET not in text
    assert not (project / "runs").exists()
    assert dashboard.changes == []


def test_a_dry_run_of_the_local_target_leaves_nothing_behind(project: Path) -> None:
    result = submit_unchecked("run.yaml", "--to", "local", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert (
        f"command   {sys.executable} -m launch train run.yaml --ending {project}/runs/small/submissions/"
        in result.stdout
    )
    assert not (project / "runs").exists()


def test_two_dry_runs_differ_only_in_the_name_of_the_job(project: Path) -> None:
    first, second = (submit_unchecked("run.yaml", "--to", "ray", "--dry-run").stdout for _ in range(2))
    job = [text.split("job ")[1].split(":")[0] for text in (first, second)]
    assert job[0] != job[1]
    assert first.replace(job[0], "J") == second.replace(job[1], "J")


@pytest.mark.parametrize(
    ("kind", "part"), [("rai", "did you mean 'ray'?"), ("__init__", "unknown kind"), ("cloud", "there are")]
)
def test_an_unknown_target_is_answered_with_the_nearest(project: Path, kind: str, part: str) -> None:
    assert_refused(submit_unchecked("run.yaml", "--to", kind), f"--to {kind}", part)


def test_wrong_options_are_told_all_at_once_with_their_places(project: Path) -> None:
    (project / "site.yaml").write_text("adress: http://x:1\nstop_wait_s: soon\n")
    given = ["--with", "driver_cpus=-1", "--with", "environment={MY_API_KEY: abcdefgh}"]
    result = submit_unchecked("run.yaml", "--to", "ray", "--target-file", "site.yaml", *given)
    assert_refused(
        result,
        "options of --to ray: 4 problems",
        "site.yaml:1: adress",
        "did you mean 'address'?",
        "site.yaml:2: stop_wait_s = 'soon'",
        "--with driver_cpus=-1: driver_cpus = -1",
        "environment.MY_API_KEY",
        "looks like a secret",
    )


def test_a_wrong_configuration_and_a_large_upload_are_refused_before_the_cluster_is_asked(
    project: Path, dashboard: FakeDashboard
) -> None:
    to_ray = ["--to", "ray", "--with", f"address={dashboard.address}"]
    assert_refused(submit_unchecked("run.yaml", *to_ray, "--set", "training.step=1"), "unknown key 'step'")
    (project / "rows.jsonl").write_bytes(b"x" * (3 * 2**20))
    result = submit_unchecked("run.yaml", *to_ray, "--max-upload", "2")
    assert_refused(result, "more than the 2 MiB allowed", "rows.jsonl (prompts.path)")
    assert dashboard.changes == []
    assert not (project / "runs").exists()


# --- what the cluster says --------------------------------------------------------------------------------------------


def test_an_address_that_does_not_answer_is_named(project: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    result = submit_unchecked("run.yaml", "--to", "ray", "--with", f"address={address}")
    assert_refused(result, f"no Ray dashboard answers at {address} (Connection refused)", "--with address=")


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://head:8265/jobs"])
def test_what_is_no_address_of_a_dashboard_is_refused_as_such(project: Path, address: str) -> None:
    result = submit_unchecked("run.yaml", "--to", "ray", "--with", f"address={address}")
    assert_refused(result, f"address: {address} is not the address of a Ray dashboard")


def test_a_missing_token_a_wrong_one_and_an_unreadable_one_are_three_messages(
    project: Path, dashboard: FakeDashboard
) -> None:
    dashboard.token = "right"
    command = ["submit", "run.yaml", "--no-check", "--to", "ray", "--with", f"address={dashboard.address}"]
    assert_refused(stillhouse(*command), "wants a token and got none (HTTP 401)", "RAY_AUTH_TOKEN_PATH")
    (project / "token").write_text("wrong\n")
    (project / "token").chmod(0o600)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(project / "token")}
    named = f"refuses the token from RAY_AUTH_TOKEN_PATH={project / 'token'}"
    assert_refused(stillhouse(*command, **wrong), named, "HTTP 403")
    dashboard.wrong_token_status = 401
    assert_refused(stillhouse(*command, **wrong), named, "HTTP 401")
    (project / "token").chmod(0o644)
    assert_refused(stillhouse(*command, **wrong), f"chmod 600 {project / 'token'}")
    missing = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(project / "nothing")}
    assert_refused(stillhouse(*command, **missing), f"token file {project / 'nothing'} cannot be read")
    assert_refused(stillhouse(*command, RAY_AUTH_MODE="token"), "there is no token", "auth_token")
    (project / "token").chmod(0o644)
    assert_refused(stillhouse(*command, **wrong), "has mode 0644, so others may read it")
    (project / "token").chmod(0o600)
    (project / "token").write_text("\n")
    assert_refused(stillhouse(*command, "--with", f"token_path={project / 'token'}"), "is empty")
    assert dashboard.changes == []


def test_another_version_of_ray_or_python_is_refused_and_both_are_named(
    project: Path, dashboard: FakeDashboard
) -> None:
    import ray

    command = ["submit", "run.yaml", "--no-check", "--to", "ray", "--with", f"address={dashboard.address}"]
    dashboard.ray = "2.59.1"
    assert_refused(stillhouse(*command), "runs Ray 2.59.1", f"this machine has Ray {ray.__version__}")
    dashboard.ray, dashboard.python = ray.__version__, "3.10.4"
    assert_refused(stillhouse(*command), "runs Python 3.10.4", f"{sys.version_info.major}.{sys.version_info.minor}")
    assert dashboard.changes == []


def test_a_cluster_on_the_network_without_a_token_is_refused_unless_asked(
    project: Path, dashboard: FakeDashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "request", _as_if_on_this_machine(dashboard, requests.request))
    command = ["submit", "run.yaml", "--no-check", "--to", "ray", "--with", "address=http://head.cluster:8265"]
    result = stillhouse(*command)
    assert_refused(result, "asks for no token", "insecure=true")
    assert "warning: token and code go to head.cluster unencrypted" in result.stderr
    assert dashboard.changes == []


def _as_if_on_this_machine(dashboard: FakeDashboard, request: Callable[..., Any]) -> Callable[..., Any]:
    """A name service for one name."""

    def resolved(method: str, url: str, **options: Any) -> Any:
        return request(method, url.replace("http://head.cluster:8265", dashboard.address), **options)

    return resolved


def test_a_second_job_of_a_run_that_is_not_over_is_refused(project: Path, dashboard: FakeDashboard) -> None:
    folder = str(project / "runs/small")
    dashboard.jobs = [{**JOB, "metadata": {"stillhouse": "train", "name": "small", "folder": folder}}]
    result = submit_unchecked("run.yaml", "--to", "ray", "--with", f"address={dashboard.address}")
    assert_refused(result, "the job small-1 of the same run folder", "is running", "stillhouse logs -f small")
    assert dashboard.changes == []


def test_a_web_server_that_is_no_dashboard_is_named_as_such(project: Path, dashboard: FakeDashboard) -> None:
    dashboard.answer = lambda path, authorization: (200, b"<html>hello</html>")
    result = submit_unchecked("run.yaml", "--to", "ray", "--with", f"address={dashboard.address}")
    assert_refused(result, "not as the dashboard of a Ray cluster")


# --- what becomes of a job --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "wrote", "code", "state"),
    [
        ({"status": "RUNNING"}, {"step": 3}, 0, "running, step 3 of 8"),
        ({"status": "RUNNING"}, {"step": 3, "code": 75}, 0, "running, step 3 of 8"),
        ({"status": "PENDING", "driver_node_id": None}, {}, 0, "pending"),
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, {"step": 8}, 0, "succeeded, exit code 0, step 8 of 8"),
        (
            {"status": "FAILED", "driver_exit_code": 3},
            {"code": 3, "reason": "row 7\n  is bad"},
            3,
            "failed, exit code 3",
        ),
        ({"status": "FAILED", "driver_exit_code": 75}, {}, 75, "preempted, exit code 75"),
        ({"status": "STOPPED"}, {"code": 75, "reason": "saved"}, 75, "stopped, exit code 75"),
        ({"status": "STOPPED"}, {}, 130, "stopped"),
        ({"status": "STOPPED"}, {"code": 0}, 0, "succeeded, exit code 0"),
        ({"status": "FAILED", "driver_node_id": None, "message": "no such environment"}, {}, 4, "failed"),
    ],
)
def test_status_returns_the_runs_own_exit_code(
    project: Path, dashboard: FakeDashboard, fields: dict[str, object], wrote: dict[str, Any], code: int, state: str
) -> None:
    remember(project, dashboard.address)
    dashboard.jobs = [{**JOB, **fields}]
    seen = "stillhouse-small-1"
    if "step" in wrote:
        dashboard.logs[f"{seen}/manifest.json"] = b'{"total_steps": 8}'
        dashboard.logs[f"{seen}/metrics.jsonl"] = b'{"time": 1.0, "kind": "step", "step": %d}\n' % wrote["step"]
    if "code" in wrote:
        dashboard.logs[f"{seen}/submissions/small-1/exit.json"] = json.dumps({"time": 1.0, **wrote}).encode()
    result = stillhouse("status", "small")
    assert result.returncode == code, result.stderr
    assert result.stdout.startswith(f"{state}: small-1 (ray), run folder /cluster/runs/small")
    said = wrote.get("reason") or {**JOB, **fields}["message"]
    shown = "" if state.startswith(("running", "succeeded")) else said
    assert result.stdout.splitlines()[1:] == shown.splitlines()


def test_a_cluster_that_was_started_anew_no_longer_knows_the_job(project: Path, dashboard: FakeDashboard) -> None:
    remember(project, dashboard.address)
    result = stillhouse("status", "small")
    assert result.returncode == 4
    assert "does not know the job small-1: was it started anew since?" in result.stdout
    assert_refused(stillhouse("logs", "small"), "does not know the job", code=4)


@pytest.mark.parametrize("command", [("logs", "-f", "small"), ("stop", "small")], ids=["follow", "stop"])
def test_waiting_for_a_job_ends_where_its_cluster_is_started_anew(
    project: Path, dashboard: FakeDashboard, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "POLL_S", 0.01)
    remember(project, dashboard.address)
    dashboard.jobs = [JOB]
    answer, asked = dashboard.answer, []

    def forgetful(path: str, authorization: str | None) -> tuple[int, bytes]:
        asked.extend([path] if path == "/api/jobs/small-1" else [])
        if path.endswith("/stop"):
            return 200, b'{"stopped": true}'
        return (404, b"does not exist") if len(asked) > 2 and path in asked else answer(path, authorization)

    dashboard.answer = forgetful
    result = stillhouse(*command)
    assert "does not know the job small-1" in result.stdout, result.stderr
    assert "failed: small-1" in result.stdout


def test_a_dashboard_that_accepts_and_never_answers_is_given_up(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        remember(project, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert_refused(stillhouse("status", "small"), "no Ray dashboard answers", "timed out")


def test_a_dashboard_behind_https_is_asked_where_the_system_trusts_its_certificate(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=dashboard"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    (project / "both.pem").write_text((project / "key.pem").read_text() + (project / "cert.pem").read_text())
    with fake_dashboard(project / "both.pem") as dashboard:
        remember(project, dashboard.address)
        dashboard.jobs = [JOB]
        assert_refused(stillhouse("status", "small"), "no Ray dashboard answers", "CERTIFICATE_VERIFY_FAILED")
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            found = stillhouse("status", "small", **{name: str(project / "cert.pem")})
            assert "running" in found.stdout, found.stderr
        missing = stillhouse("status", "small", REQUESTS_CA_BUNDLE=str(project / "nothing.pem"))
        assert_refused(missing, "the certificates for https cannot be used", "nothing.pem")


def test_a_password_file_for_the_host_does_not_replace_the_token(project: Path, dashboard: FakeDashboard) -> None:
    dashboard.token, dashboard.jobs = "right", [JOB]
    netrc = project / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    netrc.chmod(0o600)
    remember(project, dashboard.address)
    found = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "right", "NETRC": str(netrc)}
    assert "running" in stillhouse("status", "small", **found).stdout


def test_logs_come_whole_and_list_names_only_our_jobs(project: Path, dashboard: FakeDashboard) -> None:
    remember(project, dashboard.address)
    metadata = {"stillhouse": "train", "name": "small", "folder": "/cluster/runs/small"}
    dashboard.jobs = [
        {**JOB, "metadata": metadata},
        {**JOB, "submission_id": "other", "metadata": {}},
        {**JOB, "submission_id": "older", "metadata": metadata, "status": "FAILED", "driver_exit_code": 5}
        | {"start_time": 1_600_000_000_000},
    ]
    dashboard.logs["job-driver-small-1.log"] = "grün\n".encode() * 1000
    assert stillhouse("logs", "small").stdout == "grün\n" * 1000
    lines = stillhouse("list", "--to", "ray", "--with", f"address={dashboard.address}").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["running", "failed"]
    assert "exit 5" in lines[1]
    assert "small-1" in stillhouse("list").stdout


def test_a_run_that_was_not_submitted_from_here_is_answered_with_the_nearest(
    project: Path, dashboard: FakeDashboard
) -> None:
    assert_refused(stillhouse("status", "small"), "no job was submitted from here for the run small")
    remember(project, dashboard.address)
    assert_refused(stillhouse("stop", "smal"), "did you mean 'small'?")
    dashboard.jobs = [JOB]
    for name in ("runs/small", "/cluster/runs/small", str(project / "runs/small")):
        assert stillhouse("status", name).returncode == 0


def test_fetching_into_the_folder_of_a_local_run_is_refused(project: Path, dashboard: FakeDashboard) -> None:
    remember(project, dashboard.address)
    dashboard.jobs = [JOB]
    (project / "runs/small/checkpoints").mkdir()
    assert_refused(stillhouse("fetch", "small"), "holds a run of this machine", "--into FOLDER")
    assert dashboard.changes == []
    assert (project / "runs/small/checkpoints").exists()


# --- on this machine --------------------------------------------------------------------------------------------------


STAND_IN = """\
import pathlib, signal, sys, time
run, ending = pathlib.Path(sys.argv[-1]).parents[2], pathlib.Path(sys.argv[-1])
def saved(*_):
    ending.parent.mkdir(parents=True)
    ending.write_text('{"code": 75, "reason": "saved, run again"}')
    sys.exit(75)
signal.signal(signal.SIGTERM, saved)
(run / "manifest.json").write_text('{"total_steps": 9}')
print("trains", flush=True)
(run / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\\n')
while True:
    time.sleep(0.1)
"""


def start_stand_in(project: Path, program: str) -> None:
    """Submit a program of the test in place of our code, which would need models and minutes."""
    folder = project / "bundle"
    (folder / "code/launch").mkdir(parents=True)
    (folder / "code/launch/__init__.py").touch()
    (folder / "code/launch/__main__.py").write_text(program)
    (folder / "run.yaml").touch()
    run = load_run("run.yaml").run.model_copy(update={"folder": (project / "runs/small").absolute()})
    bundle, target, options = Bundle(folder, run, "hash", ()), local.Target(), local.Options()
    write_record(target.submit(bundle, target.prepare(bundle, options, "small-1"), options, "small-1"))


def shows(text: str, timeout_s: float = 30) -> str:
    """What status prints, once it holds the text."""
    deadline = time.monotonic() + timeout_s
    while text not in (shown := stillhouse("status", "small").stdout):
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)
    return shown


def test_a_job_outlives_its_submission_and_saves_when_it_is_stopped(project: Path) -> None:
    start_stand_in(project, STAND_IN)
    assert shows("step 1 of 9").startswith("running, step 1 of 9: small-1 (local)")
    assert stillhouse("logs", "small").stdout == "trains\n"
    stopped = stillhouse("stop", "small")
    assert "asked small-1 to save a checkpoint and end" in stopped.stdout
    assert "stopped, exit code 75" in stopped.stdout
    assert "saved, run again" in stopped.stdout
    assert stillhouse("status", "small").returncode == 75
    assert stillhouse("stop", "small").returncode == 0
    assert stat.S_IMODE((project / "runs/small/submission.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((project / "runs/small").stat().st_mode) == 0o700
    kept = [file for file in project.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert kept == []


@pytest.mark.parametrize(
    ("program", "code", "shown"),
    [
        ("raise SystemExit(0)", 0, "succeeded, exit code 0"),
        ("print('error: row 7 is bad'); raise SystemExit(3)", 3, "failed, exit code 3"),
        ("raise SystemExit(75)", 75, "preempted, exit code 75"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "failed, exit code 137"),
    ],
)
def test_a_local_job_has_the_exit_code_of_its_process(project: Path, program: str, code: int, shown: str) -> None:
    start_stand_in(project, program)
    followed = stillhouse("logs", "-f", "small")
    assert followed.returncode == code, followed.stdout
    assert shown in followed.stdout
    assert stillhouse("status", "small").returncode == code
    assert shown.split(",")[0] in stillhouse("list").stdout


def test_a_local_job_whose_shell_was_killed_is_no_longer_running(project: Path) -> None:
    start_stand_in(project, STAND_IN)
    shows("step 1 of 9")
    shell = json.loads((project / "runs/small/submission.json").read_text())["handle"].split()[0]
    family = [psutil.Process(int(shell)), *psutil.Process(int(shell)).children()]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    result = stillhouse("status", "small")
    assert result.returncode == 4
    assert "its process is gone" in result.stdout


def test_a_run_folder_that_is_in_use_is_refused(project: Path) -> None:
    (project / "runs/small").mkdir(parents=True)
    with RunFolder(project / "runs/small").lock():
        assert_refused(submit_unchecked("run.yaml", "--to", "local"), "is in use by pid")
    assert not (project / "runs/small/jobs").exists()


def test_a_head_that_is_busy_for_a_moment_does_not_cost_the_exit_code_of_a_followed_run(
    project: Path, dashboard: FakeDashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "POLL_S", 0.01)
    monkeypatch.setattr(submit, "STATUS_WAIT_S", 0.01)
    dashboard.jobs = [{**JOB, "status": "FAILED", "driver_exit_code": 75}]
    remember(project, dashboard.address)
    dashboard.dropped = {3, 4, 5, 7, 8}  # the first answers say that the cluster and the job are known
    result = stillhouse("logs", "-f", "small")
    assert dashboard.requests > 8
    assert result.returncode == 75, result.stderr


def test_a_head_that_is_gone_for_good_ends_the_following_with_its_address(
    project: Path, dashboard: FakeDashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "POLL_S", 0.01)
    dashboard.jobs = [JOB]
    remember(project, dashboard.address)
    dashboard.dropped = set(range(3, 500))
    result = stillhouse("logs", "-f", "small")
    assert result.returncode == 4
    assert dashboard.address in result.stderr
