"""The Slurm target: the batch script as text and as it runs, and the target's verbs, with Slurm's commands played."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_stand_in import SlurmStandIn

from cluster.lifecycle.ray_session import METRICS_CLOSED, ray_environment
from configs.load import load_run
from configs.paths import ROOT
from launch.bundle import Bundle, make_bundle
from launch.jobs import ending_file, note_ending
from launch.targets import JobRecord, load_target
from launch.targets.slurm_script import limit_s
from trainer.errors import ConfigError, InfrastructureError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
JOB = "demo-1"


@pytest.fixture
def slurm(tmp_path: Path) -> SlurmStandIn:
    return SlurmStandIn(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Of the demo, with hardly any files."""
    folder = tmp_path / "bundle"
    (folder / "code").mkdir(parents=True)
    (folder / "run.yaml").write_text("name: demo\n")
    run = load_run(ROOT / "configs" / "demo.yaml", [f"folder={tmp_path / 'runs' / 'demo'}"]).run
    return Bundle(folder, run, "0" * 16, ())


def options(**given: object) -> object:
    return load_target("slurm").Options.model_validate_json(json.dumps({"nodes": 2, **given}), strict=True)


@pytest.fixture
def script(bundle: Bundle, slurm: SlurmStandIn, request: pytest.FixtureRequest) -> Path:
    """The batch script in its submission folder."""
    given = getattr(request, "param", {})
    shipment = load_target("slurm").prepare(bundle, options(python=str(slurm.python), **given), JOB)
    folder = Path(shipment.command[-1]).parent
    folder.mkdir(parents=True)
    (folder / "code").mkdir()
    (folder / "job.sbatch").write_text(shipment.files["job.sbatch"])
    return folder / "job.sbatch"


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=60)
    return job.returncode, output


# --- the text ---------------------------------------------------------------------------------------------------------


def shellcheck(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["shellcheck", "--shell=bash", "-"], input=script, capture_output=True, text=True)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_script_of_every_shipped_configuration_is_clean_shell(
    config: Path, tmp_path: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    models = [f"teacher.model.path={tiny_teacher}", f"student.model.path={tiny_student}"]
    made = make_bundle(config, ["folder=/shared/runs/x", *models], folder=tmp_path / "bundle")
    full = options(
        **{"time": "1-12", "partition": "gpu", "account": "a", "qos": "q", "gpus_per_node": "h100:8", "memory": "64G"},
        **{"cpus_per_node": 32, "requeue": True, "setup": ["module load cuda"], "extra": ["--constraint=ib"]},
    )
    for chosen in (options(), full):
        shipment = load_target("slurm").prepare(made, chosen, JOB)
        checked = shellcheck(shipment.files["job.sbatch"])
        assert checked.returncode == 0, checked.stdout
        assert set(shipment.files) == {"job.sbatch", "run.yaml", "code", "prompts"}


def test_shellcheck_would_see_a_variable_without_quotes(script: Path) -> None:
    broken = script.read_text().replace('getent ahostsv4 "$1"', "getent ahostsv4 $1")
    assert broken != script.read_text()
    checked = shellcheck(broken)
    assert checked.returncode == 1
    assert "SC2086" in checked.stdout


def test_the_options_become_lines_of_sbatch(bundle: Bundle) -> None:
    chosen = options(time=90, partition="gpu", gpus_per_node="h100:8", cpus_per_node=16, grace_s=60, extra=["--nice"])
    text = load_target("slurm").prepare(bundle, chosen, JOB).files["job.sbatch"]
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    for line in ("--nodes=2", "--time=90", "--partition=gpu", "--gpus-per-node=h100:8", "--cpus-per-task=16", "--nice"):
        assert line in lines
    assert {"--signal=B:USR1@60", "--open-mode=append", "--no-requeue", "--comment=stillhouse:demo-1"} <= set(lines)
    assert "-- --num-cpus=16 --num-gpus=8" in text
    assert "--exclusive" not in lines
    assert "--exclusive" in load_target("slurm").prepare(bundle, options(), JOB).files["job.sbatch"]


def test_ray_starts_in_a_job_with_the_settings_it_has_everywhere(script: Path) -> None:
    for name, value in ray_environment(memory_bytes=2**40).items():
        by_the_node = name == "RAY_AUTH_TOKEN_PATH" or name in METRICS_CLOSED  # `launch.ray_node` sets these
        assert by_the_node or f"export {name}={value}\n" in script.read_text()


def test_a_shipment_is_made_without_a_trace(bundle: Bundle) -> None:
    load_target("slurm").prepare(bundle, options(), JOB)
    assert not bundle.run.folder.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nodes": 0}, "nodes"),
        ({"nodes": 2, "partition": "a b"}, "partition"),
        ({"nodes": 2, "time": "soon"}, "time"),
        ({"nodes": 2, "time": "0:90", "grace_s": 90}, "grace_s"),
        ({"nodes": 2, "setup": ["a\nb"]}, "setup"),
        ({"nodes": 2, "extra": ["nice"]}, "extra"),
        ({"nodes": 2, "gpus_per_node": 0}, "gpus_per_node"),
    ],
)
def test_an_option_that_sbatch_could_not_mean_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_target("slurm").Options.model_validate_json(json.dumps(given), strict=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-2", 93600), ("1-2:30", 95400), ("1-0:0:1", 86401), ("0", None)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert limit_s(text) == seconds


def test_a_number_of_nodes_is_needed_to_submit_and_not_to_list(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="--with nodes=2"):
        load_target("slurm").prepare(bundle, options(nodes=None), JOB)


def test_a_run_folder_that_sbatch_cannot_name_is_refused(bundle: Bundle) -> None:
    run = bundle.run.model_copy(update={"folder": Path("/shared/my runs/x")})
    with pytest.raises(ConfigError, match="my runs"):
        load_target("slurm").prepare(Bundle(bundle.folder, run, "0" * 16, ()), options(), JOB)


# --- the script at work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 5])
def test_the_exit_code_of_the_job_is_that_of_the_run(script: Path, slurm: SlurmStandIn, code: int) -> None:
    returned, output = ended(slurm.start(script, driver=f"exit {code}"))
    assert returned == code, output
    told = slurm.wait_for_run().split()
    assert told[1:3] == ["--ending", str(script.parent / "exit.json")]
    del told[1:3]
    assert told[:3] == ["run.yaml", "--wait-for-nodes", "2"]
    assert told[3].startswith("0.0.0.0:")
    assert told[4:6] == ["token", "600"]
    assert len(told[6]) == 64
    assert not list(script.parent.glob("ray_token*"))
    assert slurm.processes_left() == []
    assert slurm.calls("scontrol requeue") == []


@pytest.mark.parametrize("script", [{}, {"requeue": True}], indirect=True, ids=["once", "requeue"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_signal_reaches_the_run_once_and_75_is_queued_again_if_slurm_asked(
    script: Path, slurm: SlurmStandIn, number: signal.Signals
) -> None:
    job = slurm.start(script, driver="wait")
    slurm.wait_for_run()
    job.send_signal(number)
    returned, output = ended(job)
    assert returned == 75, output
    assert output.count("asked by") == 1
    assert f"asked by {number.name}" in output
    again = "requeue=1" in script.read_text() and number == signal.SIGUSR1
    assert len(slurm.calls("scontrol requeue 77")) == again
    assert slurm.processes_left() == []


def test_a_run_that_was_asked_before_it_could_listen_lost_nothing(script: Path, slurm: SlurmStandIn) -> None:
    job = slurm.start(script, driver="deaf")
    slurm.wait_for_run()
    job.send_signal(signal.SIGUSR1)
    assert ended(job)[0] == 75


def test_a_run_that_dies_of_a_signal_nobody_asked_for_does_not_count_as_saved(
    script: Path, slurm: SlurmStandIn
) -> None:
    job = slurm.start(script, driver="deaf")
    slurm.wait_for_run()
    subprocess.run(["pkill", "-TERM", "-P", str(job.pid), "-f", "launch train"], check=True)
    assert ended(job)[0] == 128 + 15


@pytest.mark.parametrize("script", [{"requeue": True, "max_failures": 1}], indirect=True)
def test_failures_of_machines_are_queued_again_up_to_a_limit(script: Path, slurm: SlurmStandIn) -> None:
    for start in range(2):
        assert ended(slurm.start(script, driver="exit 4", SLURM_RESTART_COUNT=str(start)))[0] == 4
    assert len(slurm.calls("scontrol requeue")) == 1


def test_a_head_that_does_not_start_ends_the_job_with_its_own_words(script: Path, slurm: SlurmStandIn) -> None:
    returned, output = ended(slurm.start(script, driver="wait", HEAD="broken"))
    assert returned == 4
    assert "Ray does not like this host" in output
    assert slurm.processes_left() == []


def test_a_head_that_ends_in_the_middle_ends_the_job(script: Path, slurm: SlurmStandIn) -> None:
    returned, output = ended(slurm.start(script, driver="wait", HEAD="mortal"))
    assert returned == 4
    assert "Ray's head ended before the run" in output
    assert "asked by SIGTERM" in output


def test_a_node_that_calls_itself_loopback_is_reached_by_the_address_slurm_uses(
    script: Path, slurm: SlurmStandIn
) -> None:
    returned, output = ended(slurm.start(script, driver="exit 0", ADDRESS_OF_N1="127.0.1.1"))
    assert returned == 0, output
    assert slurm.wait_for_run().split()[5].startswith("0.0.0.0:")


# --- the target's verbs -----------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(bundle: Bundle, slurm: SlurmStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobRecord]:
    for name, value in slurm.environment(DRIVER="wait").items():
        monkeypatch.setenv(name, value)
    target = load_target("slurm")
    chosen = options(python=str(slurm.python), grace_s=5)
    record = target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    slurm.wait_for_run()
    yield record
    if target.status(record).state == "running":
        subprocess.run(["scancel", "77"], check=False)


def test_a_submitted_job_is_followed_and_stopped(
    submitted: JobRecord, slurm: SlurmStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = load_target("slurm")
    folder = Path(submitted.folder) / "submissions" / JOB
    assert submitted.handle == "77"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir() if "." in path.name)[0] == "job.log"
    assert target.status(submitted).state == "running"
    assert [status.job for status in target.list(options())] == [JOB]
    target.stop(submitted)
    status = target.status(submitted)
    assert (status.state, status.exit_code) == ("stopped", 75)
    assert slurm.calls("scancel 77") == []
    text = "".join(target.logs(submitted, follow=True))
    assert "asked by SIGTERM" in text
    assert slurm.processes_left() == []


def test_a_job_that_slurm_forgot_is_known_by_what_it_noted(submitted: JobRecord, slurm: SlurmStandIn) -> None:
    subprocess.run(["scancel", "77"], check=True)
    (slurm.state / "word").unlink()
    assert load_target("slurm").status(submitted).exit_code is None
    note_ending(ending_file(Path(submitted.folder), submitted.job), 5, "diverged")
    status = load_target("slurm").status(submitted)
    assert (status.state, status.exit_code, status.message) == ("failed", 5, "diverged")


def test_what_sbatch_refuses_is_said_in_its_words_and_leaves_nothing(
    bundle: Bundle, slurm: SlurmStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, chosen = load_target("slurm"), options(partition="nowhere")
    shipment = target.prepare(bundle, chosen, JOB)
    for name, value in slurm.environment(REFUSE="invalid partition specified: nowhere").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="invalid partition specified: nowhere"):
        target.submit(bundle, shipment, chosen, JOB)
    monkeypatch.setenv("REFUSE", "Unable to contact slurm controller (connect failure)")
    with pytest.raises(InfrastructureError, match="Unable to contact"):
        target.submit(bundle, shipment, chosen, JOB)
    assert list((bundle.run.folder / "submissions").iterdir()) == []


def test_without_sbatch_nothing_is_written(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    target, chosen = load_target("slurm"), options()
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    assert not bundle.run.folder.exists()
