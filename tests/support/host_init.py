"""Process 1 of a host of tests/support/hosts.py: makes its own mounts, says `ready`, reaps what nobody waits for.

Run as a script in fresh namespaces, with its settings as JSON in the first argument. Its standard input is a pipe whose
other end the test session holds: when that closes, however the session ended, this process ends, and the kernel ends
everything else in the process namespace with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    socket.sethostname(settings["name"])
    mount("-t", "sysfs", "sysfs", "/sys")
    mount("-t", "tmpfs", "-o", f"size={settings['shared_memory_bytes']}", "tmpfs", "/dev/shm")
    mount("--bind", settings["hosts_file"], "/etc/hosts")
    own = Path(settings["tmp"])
    for kept in settings["kept"]:  # folders under /tmp that the host shares with this machine all the same
        place = own / Path(kept).relative_to("/tmp")
        place.mkdir(parents=True, exist_ok=True)
        mount("--rbind", kept, place)
    mount("--rbind", own, "/tmp")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, reap)
    print("ready", flush=True)
    select.select([sys.stdin], [], [])  # nothing is ever written: readable means closed


def reap(*_: object) -> None:
    """Take the exit status of every child that has ended; children of dead processes become ours."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
