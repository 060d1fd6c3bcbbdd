"""What the doctor says of a machine, against invented ones and this one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.placement.hardware import Node
from cluster.preflight import machine
from cluster.preflight.finding import Finding, Look, Silence, bounded, examine, ok

HOST = Node("n", num_cpus=8, memory_bytes=2**36)
GPUS = Node("n", num_cpus=8, gpus=("H100",) * 4)
DRIVER = ("580.65", "13.0")


def status(finding: Finding) -> str:
    assert (finding.status != "ok") == bool(finding.advice), "whatever is not well says what to do"
    return finding.status


@pytest.mark.parametrize(
    ("node", "driver", "built_for", "expected", "said"),
    [
        (HOST, None, None, "ok", "no GPU"),
        (HOST, DRIVER, "13.0", "warning", "may open no GPU"),
        (GPUS, None, "13.0", "problem", "no NVIDIA driver"),
        (GPUS, DRIVER, None, "problem", "build for hosts"),
        (GPUS, ("550.1", "12.4"), "13.0", "problem", "supports CUDA 12.4, torch was built for 13.0"),
        (GPUS, ("580.1", "13.0"), "13.2", "ok", "4x H100"),
        (GPUS, DRIVER, "12.8", "ok", "4x H100, driver 580.65"),
    ],
)
def test_devices_driver_and_torch_are_held_against_each_other(
    node: Node, driver: tuple[str, str] | None, built_for: str | None, expected: str, said: str
) -> None:
    found = machine.accelerators(node, lambda: built_for, lambda: driver)
    assert status(found) == expected
    assert said in found.text


def test_a_machine_without_a_driver_has_none(tmp_path: Path) -> None:
    assert machine.nvidia_driver(tmp_path / "version") is None


def test_amx_decides_the_dtype_on_hosts() -> None:
    assert "float32" in machine.processor(HOST).text
    assert "bfloat16" in machine.processor(Node("n", 8, memory_bytes=2**36, cpu_has_amx_bf16=True)).text


@pytest.mark.parametrize(("soft", "expected"), [(256, "problem"), (1024, "warning"), (65536, "ok")])
def test_few_open_files_are_named(soft: int, expected: str) -> None:
    assert status(machine.open_files((soft, 65536))) == expected


def test_a_folder_is_judged_by_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    assert status(machine.disk("run folder", tmp_path / "a" / "b", 1)) == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is made for a question"
    full = machine.disk("run folder", tmp_path, 2**60)
    assert status(full) == "problem"
    assert "keep_checkpoints" in full.advice
    (tmp_path / "file").touch()
    assert "is a file" in machine.disk("run folder", tmp_path / "file" / "run", None).text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot write" in machine.disk("run folder", tmp_path, None).text


def test_shared_memory_is_held_against_the_object_store(tmp_path: Path) -> None:
    small = machine.shared_memory(2**60, tmp_path)
    assert status(small) == "problem"
    assert "labels travel through the disk" in small.text
    assert "--shm-size" in small.advice
    assert status(machine.shared_memory(1, tmp_path)) == "ok"
    assert " free" in machine.shared_memory(1, tmp_path).text
    assert " free" not in machine.shared_memory(1, tmp_path, in_use=True).text, "a store that runs has taken its part"
    assert status(machine.shared_memory(None, tmp_path / "gone")) == "problem"


@pytest.mark.parametrize(
    ("address", "several", "expected"),
    [("10.0.0.5", True, "ok"), ("127.0.1.1", False, "ok"), ("127.0.1.1", True, "warning"), (None, False, "warning")],
)
def test_a_name_that_is_a_loopback_address_is_a_trap_for_several_nodes(
    address: str | None, several: bool, expected: str
) -> None:
    def resolve(name: str) -> str:
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    found = machine.host_name(several_nodes=several, name="n2", resolve=resolve)
    assert status(found) == expected
    assert "n2" in found.text


def test_taken_ports_are_named_and_too_few_are_a_problem() -> None:
    assert status(machine.ports(set())) == "ok"
    taken = machine.ports({("0.0.0.0", 6379)})
    assert status(taken) == "warning"
    assert "6379 (ray start --head)" in taken.text
    assert status(machine.ports({("::", port) for port in range(10_002, 19_500)})) == "problem"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert ("127.0.0.1", listener.getsockname()[1]) in machine.listening_ports()


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", "ok"), ("::1", "ok"), ("0.0.0.0", "warning"), ("10.0.0.5", "warning")]
)
def test_a_dashboard_that_others_reach_is_named(host: str, expected: str) -> None:
    assert status(machine.dashboard({(host, 8265)})) == expected
    assert status(machine.dashboard({(host, 9999)})) == "ok"


def test_the_token_is_judged_by_mode_file_and_who_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "token"
    file.write_text("ab12" * 16)
    named = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    file.chmod(0o644)
    found = machine.token(named)
    assert status(found) == "problem"
    assert f"chmod 600 {file}" in found.advice
    file.chmod(0o600)
    assert status(machine.token(named)) == "ok"
    assert status(machine.token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab12" * 16})) == "ok"
    assert "ab12" not in machine.token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab12" * 16}).text
    assert status(machine.token({"RAY_AUTH_MODE": "disabled"})) == "warning"
    assert status(machine.token({})) == "ok"
    own = tmp_path / "cache" / "stillhouse" / "ray_token"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o644)
    assert status(machine.token({})) == "problem", "the token that runs here will use"


def test_a_look_that_hangs_or_breaks_hides_no_other() -> None:
    never = threading.Event()

    def hang() -> Finding:
        never.wait()
        return ok("hangs", "")

    def fail() -> Finding:
        raise OSError(5, "Input/output error")

    looks = [Look("hangs", hang), Look("breaks", fail), Look("fine", lambda: ok("fine", "yes"))]
    found = list(examine(looks, timeout_s=0.2))
    assert [f.status for f in found] == ["problem", "problem", "ok"]
    assert "no answer within" in found[0].text
    assert "Input/output error" in found[1].text
    never.set()


def test_findings_come_one_by_one_and_a_silence_between_two_is_told() -> None:
    never = threading.Event()

    def say() -> Iterator[str]:
        yield "first"
        never.wait()

    found = bounded(say(), first_s=20, then_s=0.2)
    assert next(found) == "first"
    with pytest.raises(Silence, match="no answer for 0 s"):
        next(found)
    never.set()
    assert list(bounded(iter([1, 2]), first_s=20, then_s=20)) == [1, 2]


def test_what_breaks_between_two_findings_is_raised_where_they_are_read() -> None:
    def say() -> Iterator[str]:
        yield "first"
        raise KeyError("of nobody's making")

    found = bounded(say(), first_s=20, then_s=20)
    assert next(found) == "first"
    with pytest.raises(KeyError):
        next(found)


def test_a_run_that_starts_ray_itself_asks_nothing_about_ray_start() -> None:
    def asked(ray: str) -> set[str]:
        return {look.subject for look in machine.looks(machine.Needs(ray=ray), {})}

    assert asked("by_hand") - asked("own") == {"ports", "token", "dashboard"}
    assert asked("own") == asked("running")


def test_a_size_is_never_rounded_to_nothing() -> None:
    sizes = (0, 900, 478_213, 1_000_000, 12_400_000, 1_540_000_000)
    assert [machine.size_text(size) for size in sizes] == ["0 MB", "1 kB", "478 kB", "1 MB", "12 MB", "1.5 GB"]
