"""The KubeRay target: its YAML against schemas, its script at work, and its verbs with kubectl played."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from launch_schemas import RAY_JOB
from ruamel.yaml import YAML

from cluster.lifecycle.ray_session import METRICS_CLOSED, ray_environment
from configs.load import load_run, load_section
from configs.paths import ROOT
from launch.bundle import Bundle, BundleFile, make_bundle
from launch.jobs import ending_file, note_ending
from launch.targets import load_target, options_of
from launch.targets.kuberay_capacity import check_capacity
from launch.targets.kuberay_manifests import archive, config_map, object_name
from trainer.errors import ConfigError, InfrastructureError

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="extra dev: kubernetes-validate")

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
JOB = "demo-1122-030405-ab12"
FULL = (
    "teachers={replicas: 2, gpus: 8, cpus: 32, memory: 256Gi, shm: 64Gi}",
    "teachers.node_selector={cloud.google.com/gke-spot: 'true'}",
    "teachers.tolerations=[{key: cloud.google.com/gke-spot, operator: Equal, value: 'true', effect: NoSchedule}]",
    "students={replicas: 2, gpus: 8}",
    "secrets.HF_TOKEN=hub/token",
    "environment.NCCL_DEBUG=WARN",
    "image_pull_secrets=[registry]",
    "service_account=runner",
    "deadline_s=86400",
)


def options(*given: str) -> Any:
    needed = ["image=registry.example/stillhouse:1", "claim=shared"]
    return load_section(load_target("kuberay").Options, None, [*needed, *given], title="options", option="--with")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    (folder / "code").mkdir(parents=True)
    (folder / "run.yaml").write_text("name: demo\n")
    (folder / "code" / "a.py").write_text("A = 1\n")
    run = load_run(ROOT / "configs" / "demo.yaml", ["folder=/shared/runs/demo", "student.ranks=2"]).run
    return Bundle(folder, run, "0" * 16, (BundleFile("run.yaml", 11), BundleFile("code/a.py", 6)))


def documents(shipment: Any) -> list[dict]:
    return list(YAML(typ="safe").load_all(shipment.files["rayjob.yaml"]))


def pods(ray_job: dict) -> list[dict]:
    """Every pod template of a RayJob, as a Pod of its own; KubeRay fills in what a template may lack."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [*(group["template"] for group in groups), ray_job["spec"]["submitterPodTemplate"]]
    return [
        {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "x"}}
        for template in templates
    ]


def validate(resource: dict) -> None:
    kubernetes_validate.validate(resource, "1.33", strict=True)


# --- the YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), FULL], ids=["least", "full"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_yaml_of_every_shipped_configuration_is_what_kubernetes_and_kuberay_take(
    config: Path, given: tuple[str, ...], tmp_path: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    models = [f"teacher.model.path={tiny_teacher}", f"student.model.path={tiny_student}"]
    made = make_bundle(config, ["folder=/shared/runs/x", *models], folder=tmp_path / "bundle")
    ray_job, policy = documents(load_target("kuberay").prepare(made, options(*given), JOB))
    jsonschema.validate(ray_job, RAY_JOB)
    for resource in (*pods(ray_job), policy, config_map(JOB, b"x")):
        validate(resource)


@pytest.mark.parametrize(
    "place",
    [("spec",), ("spec", "containers", 0), ("spec", "volumes", 2, "emptyDir"), ("spec", "securityContext")],
    ids=str,
)
def test_a_misspelt_key_in_a_pod_would_be_seen(bundle: Bundle, place: tuple) -> None:
    ray_job, _ = documents(load_target("kuberay").prepare(bundle, options(*FULL), JOB))
    for pod in pods(ray_job)[:3]:
        validate(pod)
        broken = copy.deepcopy(pod)
        inner = broken
        for part in place:
            inner = inner[part]
        key = next(iter(inner))
        inner[f"{key}z"] = inner.pop(key)
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(broken)


@pytest.mark.parametrize("key", ["backoffLimits", "headGroupSpecs", "minReplica"])
def test_a_misspelt_key_of_the_rayjob_would_be_seen(bundle: Bundle, key: str) -> None:
    text = load_target("kuberay").prepare(bundle, options(), JOB).files["rayjob.yaml"]
    right = {"backoffLimits": "backoffLimit:", "headGroupSpecs": "headGroupSpec:", "minReplica": "minReplicas:"}[key]
    ray_job = next(YAML(typ="safe").load_all(text.replace(right, f"{key}:")))
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(ray_job, RAY_JOB)


def test_teachers_may_be_spot_and_students_are_not(bundle: Bundle) -> None:
    ray_job, _ = documents(load_target("kuberay").prepare(bundle, options(*FULL), JOB))
    teachers, students = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert teachers["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert teachers["template"]["spec"]["tolerations"][0]["value"] == "true"
    assert not {"nodeSelector", "tolerations"} & set(students["template"]["spec"])
    assert (teachers["replicas"], teachers["minReplicas"], teachers["maxReplicas"]) == (2, 2, 2)


def test_roles_are_bound_to_their_group_by_labels_in_the_words_of_the_configuration(bundle: Bundle) -> None:
    shipment = load_target("kuberay").prepare(bundle, options(), JOB)
    cluster = documents(shipment)[0]["spec"]["rayClusterSpec"]
    assert [group["labels"] for group in cluster["workerGroupSpecs"]] == [
        {"stillhouse.io/group": "teachers"},
        {"stillhouse.io/group": "students"},
    ]
    line = next(line for line in shipment.files["run.sh"].splitlines() if " launch train " in line)
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.split("\n")
    overrides = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    run = load_run(ROOT / "configs" / "demo.yaml", overrides).run
    assert run.student.placement.node_labels == {"stillhouse.io/group": "students"}
    assert run.teacher.scorer.placement.node_labels == {"stillhouse.io/group": "teachers"}
    assert run.teacher.generator.placement.node_labels == {"stillhouse.io/group": "teachers"}
    assert words[words.index("--wait-for-nodes") + 1] == "3"


def test_labels_that_the_run_asks_for_are_given_to_the_group(bundle: Bundle) -> None:
    given = ["folder=/shared/runs/demo", "student.placement.node_labels={disk: fast}"]
    run = load_run(ROOT / "configs" / "demo.yaml", given).run
    own = Bundle(bundle.folder, run, "0" * 16, bundle.files)
    shipment = load_target("kuberay").prepare(own, options(), JOB)
    students = documents(shipment)[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    assert students["labels"] == {"stillhouse.io/group": "students", "disk": "fast"}
    assert "student.placement" not in shipment.files["run.sh"]
    both = ["teacher.scorer.placement.node_labels={disk: a}", "teacher.generator.placement.node_labels={disk: b}"]
    run = load_run(ROOT / "configs" / "demo.yaml", [*given, *both]).run
    with pytest.raises(ConfigError, match="write the same for both"):
        load_target("kuberay").prepare(Bundle(bundle.folder, run, "0" * 16, bundle.files), options(), JOB)


def test_pods_run_as_nobody_special_and_have_time_to_save(bundle: Bundle) -> None:
    ray_job, _ = documents(load_target("kuberay").prepare(bundle, options("grace_s=300"), JOB))
    for pod in pods(ray_job):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert set(container["resources"]["limits"]) == set(container["resources"]["requests"])
    for pod in pods(ray_job)[:3]:
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 300 + 30
        variables = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
        assert variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "300"
        for name, value in ray_environment(memory_bytes=2**40).items():
            assert name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", *METRICS_CLOSED) or variables[name] == value


def test_shared_memory_and_volume_are_in_every_ray_pod(bundle: Bundle) -> None:
    ray_job, _ = documents(load_target("kuberay").prepare(bundle, options("students.shm=8Gi"), JOB))
    students = pods(ray_job)[2]["spec"]
    volumes = {volume["name"]: volume for volume in students["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in students["containers"][0]["volumeMounts"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert mounts == {"work": "/stillhouse", "shm": "/dev/shm", "shared": "/shared"}


def test_secrets_are_named_and_never_written(bundle: Bundle) -> None:
    ray_job, _ = documents(load_target("kuberay").prepare(bundle, options(*FULL), JOB))
    env = pods(ray_job)[1]["spec"]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}} in env
    assert not [entry for entry in env if entry["name"].endswith("TOKEN") and "value" in entry]
    with pytest.raises(ConfigError, match=r"secrets\.HF_TOKEN=its-name/its-key"):
        options("environment.HF_TOKEN=planted")


@pytest.mark.parametrize("job", ["a", "7-up", "x" * 50, "a-very-long-name-of-a-run-1122-030405-ab12-0123456"])
def test_names_of_objects_are_names_that_kubernetes_takes(job: str) -> None:
    jsonschema.validate(object_name(job), RAY_JOB["properties"]["metadata"]["properties"]["name"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("teachers.replicas=0", "greater than 0"),
        ("studnets.replicas=1", "did you mean 'students'"),
        ("students.memory=lots", "students.memory"),
        ("teachers.replicas=1.5", "whole number"),
        ("secrets.A=no-key", "secrets"),
    ],
)
def test_a_wrong_option_is_one_clear_message(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options(given)


def test_what_is_missing_is_said_at_once(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--with image=.*--with claim="):
        load_target("kuberay").prepare(bundle, load_target("kuberay").Options(), JOB)


def test_a_group_that_is_too_small_is_refused_before_anything_is_sent(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"students of this run need 2 GPUs.*1 x 1.*--with students\.replicas=2"):
        load_target("kuberay").prepare(bundle, options("students.gpus=1"), JOB)


CAPACITIES = [
    # given to the run, pods, what is said, the words of the advice
    (
        ("teacher.scorer.tensor_parallel_size=8",),
        "teachers.gpus=4",
        "9 GPUs in parts of 8",
        "teachers.gpus=8 --with teachers.replicas=2",
    ),
    (
        ("teacher.scorer.tensor_parallel_size=4", "teacher.scorer.replicas=3"),
        "teachers.gpus=6",
        "13 GPUs in parts of 4 on one machine",
        "teachers.replicas=3",
    ),
    (
        ("teacher.scorer.placement.nodes=2", "teacher.scorer.replicas=2"),
        "teachers.gpus=8",
        "3 GPUs",
        "teachers.replicas=2",
    ),
    (
        ("student.placement.strategy=strict_spread", "student.ranks=4"),
        "students.gpus=8",
        "4 GPUs",
        "students.replicas=4",
    ),
    (("student.placement.strategy=strict_pack", "student.ranks=4"), "students.gpus=2", "4 GPUs", "students.gpus=4"),
    (("student.ranks=9",), "students.gpus=4", "9 GPUs", "students.replicas=3"),
    (("student.ranks=8",), "students.cpus=4", "1 x 8 GPUs and 4 CPUs", "students.cpus=8"),
    (("student.ranks=8",), "students.gpus=0 students.cpus=4", "1 x 4 CPUs", "students.replicas=2"),
    (
        ("teacher.scorer.tensor_parallel_size=8",),
        "teachers.gpus=4 teachers.cpus=4 teachers.replicas=2",
        "2 x 4 GPUs and 4 CPUs",
        "teachers.gpus=8 --with teachers.cpus=8",
    ),
]


@pytest.mark.parametrize(("given", "pods", "said", "advice"), CAPACITIES)
def test_advice_on_pods_is_one_that_helps(given: tuple[str, ...], pods: str, said: str, advice: str) -> None:
    run = load_run(ROOT / "configs" / "demo.yaml", ["folder=/shared/runs/demo", *given]).run
    given_pods = ["teachers.gpus=8", "teachers.cpus=99", "students.gpus=8", "students.cpus=99", *pods.split()]
    with pytest.raises(ConfigError, match=said) as refused:
        check_capacity(run, options(*given_pods))
    assert f"--with {advice}" in str(refused.value)
    check_capacity(run, options(*given_pods, *advice.split(" --with ")))


def test_a_run_folder_off_the_volume_is_refused_with_the_words_to_write(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="--set folder=/vol/runs/demo"):
        load_target("kuberay").prepare(bundle, options("mount=/vol"), JOB)


def test_a_run_of_one_process_is_refused(bundle: Bundle) -> None:
    run = bundle.run.model_copy(update={"runtime": "in_process"})
    with pytest.raises(ConfigError, match="runtime: ray"):
        load_target("kuberay").prepare(Bundle(bundle.folder, run, "0" * 16, ()), options(), JOB)


def test_rows_that_no_configmap_holds_are_refused_with_their_size(bundle: Bundle) -> None:
    import random

    rows = bundle.folder / "prompts" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_bytes(random.Random(0).randbytes(2**20 + 2**18))
    large = Bundle(bundle.folder, bundle.run, "0" * 16, (*bundle.files, BundleFile("prompts/rows.jsonl", 2**20)))
    with pytest.raises(ConfigError, match=r"(?s)packs to 12\d\d KiB.*1280 KiB  prompts/rows.jsonl.*--shared"):
        load_target("kuberay").prepare(large, options(), JOB)


def test_equal_bundles_pack_to_equal_bytes_and_code_stays_out_where_the_image_has_it(bundle: Bundle) -> None:
    texts = {"run.sh": "true\n"}
    first = archive(bundle, texts, with_code=True)
    assert first == archive(bundle, texts, with_code=True)
    assert zipfile.ZipFile(io.BytesIO(first)).namelist() == ["code/a.py", "run.yaml", "run.sh"]
    without = archive(bundle, texts, with_code=False)
    assert zipfile.ZipFile(io.BytesIO(without)).namelist() == ["run.yaml", "run.sh"]


# --- the script at work -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_script(bundle: Bundle, tmp_path: Path) -> Any:
    """Runs run.sh with a Python that ends with a code; gives (exit code, times that the run was started)."""
    run = bundle.run.model_copy(update={"folder": tmp_path / "shared" / "demo"})
    chosen = options(f"mount={tmp_path}/shared", f"python={tmp_path}/python")
    text = load_target("kuberay").prepare(Bundle(bundle.folder, run, "0" * 16, ()), chosen, JOB).files["run.sh"]
    checked = subprocess.run(["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    here = tmp_path / "run.sh"
    here.write_text(text.replace("/stillhouse/bundle", str(bundle.folder)))

    def start(code: int) -> tuple[int, int]:
        note = f"from pathlib import Path; from launch.jobs import note_ending; note_ending(Path('$2'), {code}, '')"
        (tmp_path / "python").write_text(
            f"#!/bin/bash\necho x >> {tmp_path}/starts\nwhile [[ $1 != --ending ]]; do shift; done\n"
            f'{sys.executable} -c "{note}"\nexit {code}\n'
        )
        (tmp_path / "python").chmod(0o755)
        done = subprocess.run(["bash", here], capture_output=True, text=True)
        return done.returncode, len((tmp_path / "starts").read_text().split())

    return start


@pytest.mark.parametrize("code", [0, 2, 3, 5])
def test_a_verdict_that_no_new_start_can_change_is_given_again_at_once(run_script: Any, code: int) -> None:
    assert run_script(code) == (code, 1)
    assert run_script(0) == (code, 1)


@pytest.mark.parametrize("code", [4, 75])
def test_a_run_that_may_go_on_is_started_again(run_script: Any, code: int) -> None:
    assert run_script(code) == (code, 1)
    assert run_script(0) == (0, 2)


# --- the target's verbs -----------------------------------------------------------------------------------------------

KUBECTL = """#!/bin/bash
echo "$*" >> "$STATE/calls"
[[ -z "${REFUSE:-}" ]] || { echo "$REFUSE" >&2; exit 1; }
case "$*" in
    *" create "*|"create "*) cat > "$STATE/created" ;;
    *"get rayjobs"*) cat "$STATE/answer" ;;
    *"get pods"*) echo pod/head ;;
    *exec*) sed -i 's/"Running"/"Complete"/; s/"RUNNING"/"STOPPED"/' "$STATE/answer" ;;
    *logs*) printf 'step 1/2\\nstep 2/2\\n' ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kubectl"
    folder.mkdir()
    (folder / "kubectl").write_text(KUBECTL)
    (folder / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("STATE", str(folder))
    return folder


def answer(state: Path, deployment: str, job: str, message: str = "") -> None:
    status = {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message, "failed": 0}
    metadata = {
        "name": JOB,
        "labels": {"stillhouse.io/job": JOB},
        "annotations": {"stillhouse.io/run": "demo"},
        "creationTimestamp": "2026-11-22T03:04:05Z",
    }
    (state / "answer").write_text(json.dumps({"items": [{"metadata": metadata, "status": status}]}))


def test_a_job_is_created_followed_and_stopped_through_kubectl(bundle: Bundle, kubectl: Path) -> None:
    target, chosen = load_target("kuberay"), options("namespace=team", "context=big")
    record = target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    kinds = [item["kind"] for item in YAML(typ="safe").load_all((kubectl / "created").read_text())]
    assert kinds == ["ConfigMap", "RayJob", "NetworkPolicy"]
    assert options_of(target, record) == chosen
    answer(kubectl, "Running", "RUNNING")
    assert target.status(record).state == "running"
    assert "".join(target.logs(record, follow=True)) == "step 1/2\nstep 2/2\n"
    target.stop(record)
    calls = (kubectl / "calls").read_text().splitlines()
    assert all(call.startswith("--context=big --namespace=team ") for call in calls)
    assert [call for call in calls if f"ray job stop --no-wait --address=http://127.0.0.1:8265 {JOB}" in call]
    assert f"delete rayjobs.ray.io,configmaps,networkpolicies --selector=stillhouse.io/job={JOB}" in calls[-1]


@pytest.mark.parametrize(
    ("deployment", "job", "message", "state", "code"),
    [
        ("Initializing", "", "", "pending", None),
        ("Complete", "SUCCEEDED", "", "succeeded", 0),
        ("Failed", "FAILED", "Job entrypoint command failed with exit code 3, last available logs", "failed", 3),
        ("Failed", "FAILED", "Job entrypoint command failed with exit code 75, ...", "preempted", 75),
        ("Complete", "STOPPED", "", "stopped", None),
        ("Failed", "", "DeadlineExceeded", "failed", None),
    ],
)
def test_the_words_of_kuberay_are_understood(
    bundle: Bundle, kubectl: Path, deployment: str, job: str, message: str, state: str, code: int | None
) -> None:
    target, chosen = load_target("kuberay"), options()
    record = target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    answer(kubectl, deployment, job, message)
    status = target.status(record)
    assert (status.state, status.exit_code, status.name) == (state, code, "demo")


def test_a_rayjob_that_was_deleted_is_a_stopped_run(bundle: Bundle, kubectl: Path) -> None:
    target, chosen = load_target("kuberay"), options()
    record = target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    (kubectl / "answer").write_text('{"items": []}')
    assert (target.status(record).state, target.status(record).message) == ("stopped", "the RayJob was deleted")
    assert target.list(chosen) == []
    assert f"get rayjobs.ray.io --selector=stillhouse.io/job={JOB} --output=json" in (kubectl / "calls").read_text()


def test_what_the_run_noted_on_a_volume_that_is_mounted_here_is_believed(
    bundle: Bundle, kubectl: Path, tmp_path: Path
) -> None:
    run = bundle.run.model_copy(update={"folder": tmp_path / "shared" / "demo"})
    target, chosen = load_target("kuberay"), options(f"mount={tmp_path}/shared")
    own = Bundle(bundle.folder, run, "0" * 16, bundle.files)
    record = target.submit(own, target.prepare(own, chosen, JOB), chosen, JOB)
    answer(kubectl, "Failed", "FAILED", "the pod of the submitter is gone")
    assert target.status(record).exit_code is None
    note_ending(ending_file(run.folder, JOB), 5, "no finite loss")
    (run.folder / "manifest.json").write_text('{"total_steps": 9}')
    (run.folder / "metrics.jsonl").write_text('{"time": 1.0, "kind": "step", "step": 4}\n')
    status = target.status(record)
    assert (status.state, status.exit_code, status.message) == ("failed", 5, "no finite loss")
    assert (status.step, status.steps) == (4, 9)


def test_what_kubectl_refuses_is_said_in_its_words_and_undone(
    bundle: Bundle, kubectl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, chosen = load_target("kuberay"), options()
    shipment = target.prepare(bundle, chosen, JOB)
    monkeypatch.setenv("REFUSE", 'error: no matches for kind "RayJob" in version "ray.io/v1"')
    with pytest.raises(ConfigError, match="Is KubeRay installed"):
        target.submit(bundle, shipment, chosen, JOB)
    monkeypatch.setenv("REFUSE", "The connection to the server 10.0.0.1:6443 was refused")
    with pytest.raises(InfrastructureError, match="connection to the server"):
        target.submit(bundle, shipment, chosen, JOB)


def test_without_kubectl_the_message_names_the_dry_run(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, chosen = load_target("kuberay"), options()
    shipment = target.prepare(bundle, chosen, JOB)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no kubectl on this machine\. --dry-run prints the YAML"):
        target.submit(bundle, shipment, chosen, JOB)


def test_fetching_names_the_command_to_type(bundle: Bundle, kubectl: Path, tmp_path: Path) -> None:
    target, chosen = load_target("kuberay"), options("namespace=team")
    record = target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    with pytest.raises(ConfigError, match="kubectl --namespace=team cp POD:/shared/runs/demo"):
        target.fetch(record, tmp_path / "here")
