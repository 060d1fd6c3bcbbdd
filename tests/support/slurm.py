"""A real Slurm over the hosts of tests/support/hosts.py: slurmctld on one host, slurmd on others, munge for all.

It needs what `apt-get install --no-install-recommends slurm-wlm munge` installs; nothing is installed here. The munge
daemon has a key and a socket of its own below the shared folder, so that one of this machine is neither needed nor met.
"""

from __future__ import annotations

import functools
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hosts import Host, wait_until
from leftovers import once_gone

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "munged")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
START_TIMEOUT_S = 120.0
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Slurm's spool folder holds sockets, so its path must be short: below each host's own /tmp.
CONFIGURATION = """\
ClusterName=hosts
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir=/tmp/slurmd-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=60
KillWait={kill_wait_s}
MinJobAge=3600
SchedulerParameters=sched_interval=2,batch_sched_delay=0
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
CGROUPS = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
IgnoreSystemd=yes
"""


@functools.cache
def why_no_slurm() -> str | None:
    """Why Slurm cannot be started here; None where it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATHS) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} not found; apt-get install --no-install-recommends slurm-wlm munge"
    return None


@dataclass(frozen=True)
class SlurmJob:
    """What `scontrol show job` says."""

    id: str
    state: str
    reason: str
    exit_code: str  # "75:0": exit status, signal
    nodes: str
    script: str

    @property
    def over(self) -> bool:
        return self.state in OVER


class SlurmOnHosts:
    """Controller and workers; `submitter` has the commands alone."""

    def __init__(self, controller: Host, workers: Sequence[Host], *, folder: Path, kill_wait_s: int = 30) -> None:
        self.controller = controller
        self.workers = list(workers)
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "state").mkdir()
        nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=4000" for host in self.workers]
        text = CONFIGURATION.format(
            controller=controller.name,
            controller_address=controller.address,
            folder=folder,
            kill_wait_s=kill_wait_s,
            nodes="\n".join(nodes),
            names=",".join(host.name for host in self.workers),
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text(CGROUPS)
        self._daemons: list[subprocess.Popen] = []

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Returns when every worker is idle."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        socket = self.folder / "munge.socket"
        munged = ["munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}"]
        munged += [f"--{name}={self.folder / f'munge.{suffix}'}" for name, suffix in MUNGE_FILES.items()]
        self._daemon(self.controller, munged)
        wait_until(socket.exists, START_TIMEOUT_S)
        self._daemon(self.controller, ["slurmctld", "-D", "-c"])
        for host in self.workers:
            self._daemon(host, ["slurmd", "-D", "-N", host.name])
        try:
            wait_until(lambda: self.node_states() == {host.name: "idle" for host in self.workers}, START_TIMEOUT_S, 0.5)
        except TimeoutError:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
            raise RuntimeError(f"Slurm does not start: {self.node_states()}\n{logs}") from None

    def command(self, *words: str, host: Host | None = None, **options: object) -> str:
        """The output of a Slurm command, typed on the controller's host if not said otherwise."""
        result = (host or self.controller).run(list(words), self.env, **options)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {result.stdout}")
        return result.stdout

    def node_states(self) -> dict[str, str]:
        result = self.controller.run(["sinfo", "--noheader", "--Node", "--format=%n %t"], self.env)
        return dict(line.split() for line in result.stdout.splitlines()) if result.returncode == 0 else {}

    def submit(
        self, script: Path, *options: str, host: Host | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """The id of the job."""
        command = ["sbatch", "--parsable", *options, str(script)]
        result = (host or self.controller).run(command, {**self.env, **(env or {})}, cwd=script.parent)
        if result.returncode != 0:
            raise RuntimeError(f"sbatch: {result.stdout}")
        return result.stdout.strip().splitlines()[-1]

    def job(self, job_id: str) -> SlurmJob:
        text = self.command("scontrol", "show", "job", job_id)
        fields = dict(re.findall(r"(\w+)=(\S*)", text))
        return SlurmJob(
            id=job_id,
            state=fields["JobState"],
            reason=fields["Reason"],
            exit_code=fields["ExitCode"],
            nodes=fields["NodeList"],
            script=fields.get("Command", ""),
        )

    def seconds_running(self, job_id: str) -> int:
        """Since its start, of a running job."""
        text = self.command("squeue", "--noheader", "--format=%M", f"--job={job_id}").strip()
        days, _, clock = text.rpartition("-")
        seconds = 0
        for part in clock.split(":"):
            seconds = 60 * seconds + int(part)
        return 86400 * int(days or 0) + seconds

    def wait(self, job_id: str, timeout_s: float) -> SlurmJob:
        """Until the job is over and its nodes are idle again, which they are after the last of its processes."""
        wait_until(lambda: self.job(job_id).over, timeout_s, 0.5)
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, timeout_s, 0.5)
        return self.job(job_id)

    def left_running(self, timeout_s: float = 60) -> list[str]:
        """What runs on the workers beside slurmd after at most `timeout_s`; expected: nothing."""
        return once_gone(self._beside_daemons, timeout_s)

    def _beside_daemons(self) -> list[str]:
        left = [(host, one) for host in self.workers if host.is_on for one in host.processes()]
        return [f"{host.name}: {one.command}" for host, one in left if not re.match(r"(\S*/)?slurmd ", one.command)]

    def _daemon(self, host: Host, command: Sequence[str]) -> None:
        log = (self.folder / f"{command[0]}-{host.name}.out").open("w")
        with log:
            self._daemons.append(host.popen(command, self.env, stdout=log, stderr=subprocess.STDOUT))


MUNGE_FILES = {"pid-file": "pid", "log-file": "log", "seed-file": "seed"}
