"""Slurm's commands as this project uses them, played by small scripts on one machine: to test what a batch script does
with signals and exit codes, and what the target makes of Slurm's answers, in seconds. No test of Slurm itself.

The nodes are names; `python` on them is a script too: Ray's head listens on a port, and the run does what `driver`
says: `exit N`, `wait` (for USR1 or TERM, then 75), `deaf` (dies of the first signal).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "sbatch": """
[[ -z "${REFUSE:-}" ]] || { echo "sbatch: error: $REFUSE" >&2; exit 1; }
for script; do :; done
output=$(sed -n 's/^#SBATCH --output=//p' "$script")
echo RUNNING > "$STATE/word"
(
    SLURM_JOB_ID=77 SLURM_JOB_NODELIST=n[1-2] bash "$script" >> "$output" 2>&1 &
    echo $! > "$STATE/batch"
    wait $!
    code=$?
    echo "$code" > "$STATE/code"
    if grep -q RUNNING "$STATE/word"; then ((code)) && echo FAILED > "$STATE/word" || echo COMPLETED > "$STATE/word"; fi
) > /dev/null 2>&1 &
echo 77
""",
    "srun": """
while [[ "$1" == --* ]]; do
    case "$1" in --output=*) output=${1#--output=};; --nodelist=*) host=${1#--nodelist=};; esac
    shift
done
env SLURM_PROCID=0 "$@" >> "$output" 2>&1 &
echo $! > "$STATE/step-$host"
wait
""",
    "scancel": """
echo "scancel $*" >> "$STATE/calls"
case "$*" in
    --batch*) kill -TERM "$(cat "$STATE/batch")" ;;
    --signal=TERM*) cat "$STATE"/step-* | xargs -r kill -TERM ;;
    *) echo CANCELLED > "$STATE/word"; cat "$STATE"/{batch,run,step-*} 2> /dev/null | xargs -r kill -KILL ;;
esac
exit 0
""",
    "scontrol": """
echo "scontrol $*" >> "$STATE/calls"
case "$1 $2" in
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show node") echo "NodeName=$3 Arch=x NodeAddr=by-address NodeHostName=$3" ;;
    "show job") [[ -e "$STATE/word" ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
        word=$(cat "$STATE/word") code=$(cat "$STATE/code")
        echo "JobId=$3 JobName=x JobState=$word Reason=None Restarts=0 ExitCode=$code:0" ;;
esac
""",
    "squeue": """
echo "77|$(cat "$STATE/word")|demo|2026-01-01T00:00:00|stillhouse:demo-1"
echo "78|RUNNING|somebody|2026-01-01T00:00:00|(null)"
""",
    "sleep": """
exec /bin/sleep 0.05  # whatever the script waits for comes sooner here
""",
    # 0.0.0.0 is this machine, and no loopback address to look at
    "getent": """
case "$2" in n1) echo "${ADDRESS_OF_N1:-0.0.0.0} STREAM n1";; by-address) echo "0.0.0.0 STREAM";; *) exit 2;; esac
""",
}

PYTHON = """#!{python} -SE
import os, pathlib, signal, socket, sys, time
state = pathlib.Path({state!r})
verb = " ".join(sys.argv[2:4])
if verb == "launch.ray_node ports":
    with socket.socket() as probe:
        probe.bind(("", 0))
        print(probe.getsockname()[1], 1)
elif verb == "launch.ray_node head":
    if os.environ.get("HEAD") == "broken":
        print("Ray does not like this host")
        sys.exit(1)
    server = socket.create_server(("", int(sys.argv[5])))
    if os.environ.get("HEAD") == "mortal":
        while not (state / "driver").exists():
            time.sleep(0.05)
        sys.exit(1)
    time.sleep(1000)
elif verb == "launch.ray_node join":
    time.sleep(1000)
elif verb == "launch train":
    (state / "run").write_text(str(os.getpid()) + " ")
    token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    facts = [*sys.argv[4:], os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_MODE"], oct(token.stat().st_mode)[-3:]]
    word, _, code = os.environ["DRIVER"].partition(" ")
    def asked(number, frame):
        print("asked by", signal.Signals(number).name, flush=True)
        sys.exit(75)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        if word != "deaf":
            signal.signal(number, asked)
    (state / "driver").write_text(" ".join(facts) + " " + token.read_text())
    if word == "exit":
        sys.exit(int(code))
    time.sleep(1000)
else:
    sys.exit(f"what is {{sys.argv}}?")
"""


class SlurmStandIn:
    """A folder of commands, and what is known of the one job."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.state = folder / "bin", folder / "state"
        self.bin.mkdir()
        self.state.mkdir()
        for name, text in COMMANDS.items():
            self._executable(self.bin / name, f"#!/bin/bash\n{text}")
        self.python = self._executable(folder / "python", PYTHON.format(python=sys.executable, state=str(self.state)))
        (self.state / "code").write_text("0")
        (self.state / "calls").touch()

    def environment(self, **more: str) -> dict[str, str]:
        """With which a batch script, or the target, finds these commands."""
        path = f"{self.bin}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "STATE": str(self.state), **more}

    def start(self, script: Path, *, driver: str, **more: str) -> subprocess.Popen[str]:
        """Run a batch script as slurmd would."""
        environment = self.environment(DRIVER=driver, SLURM_JOB_ID="77", SLURM_JOB_NODELIST="n[1-2]", **more)
        return subprocess.Popen(
            ["bash", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for_run(self, seconds: float = 20) -> str:
        """Until the run itself has begun: what it was told."""
        deadline = time.monotonic() + seconds
        while not (file := self.state / "driver").exists() or not file.read_text():
            assert time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.05)
        return file.read_text()

    def calls(self, command: str) -> list[str]:
        """How a command was called."""
        return [line for line in (self.state / "calls").read_text().splitlines() if line.startswith(command)]

    def processes_left(self) -> list[int]:
        """Steps that still run."""
        pids = [int(file.read_text()) for file in self.state.glob("step-*")]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    @staticmethod
    def _executable(path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o755)
        return path
