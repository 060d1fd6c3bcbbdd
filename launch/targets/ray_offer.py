"""Runs on a node of a Ray cluster, as a job of its own: offers the results of a run to the log API, and waits.

`stillhouse fetch` sends this file alone. It uses nothing but the standard library and works with any Python 3.9.

    python ray_offer.py FOLDER BOX NAME...     BOX/offer.json says what lies beside it, or that there is nothing

Ray's dashboard serves every file under the log folder of a node, byte for byte and in pieces, to whoever has the
cluster's token. So results are put there for as long as this job lives: as links where they are large, as copies where
a run that is still working may replace them. Stopping the job, or an hour, removes them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time

COPIED_BYTES = 32 * 2**20
LIFETIME_S = 3600.0
OFFER = "offer.json"


def main(folder, box, names):
    logs = os.path.dirname(os.readlink("/proc/self/fd/1"))  # this job's own output lies in the log folder
    place = os.path.join(logs, box)
    signal.signal(signal.SIGTERM, stop)
    try:
        os.mkdir(place, 0o700)
        error = "" if os.path.isdir(folder) else f"the run folder {folder} does not exist on {os.uname().nodename}"
        files = [offer(folder, name, place) for name in found(folder, names)]
        with open(os.path.join(place, "." + OFFER), "w") as file:
            json.dump({"error": error, "files": files}, file)
        os.rename(file.name, os.path.join(place, OFFER))
        time.sleep(LIFETIME_S)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def stop(number, frame):
    raise SystemExit(0)


def found(folder, names):
    """Paths below the folder: the named files, and all regular files of the named folders."""
    for name in names:
        top = os.path.join(folder, name)
        if os.path.islink(top):
            continue
        if os.path.isfile(top):
            yield name
        for place, _, files in sorted(os.walk(top)):
            for file in sorted(files):
                path = os.path.join(place, file)
                if not os.path.islink(path):
                    yield os.path.relpath(path, folder)


def offer(folder, name, place):
    """Put one file into the box; returns its size and hash, both of what is in the box now."""
    source, target = os.path.join(folder, name), os.path.join(place, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.getsize(source) <= COPIED_BYTES:
        shutil.copyfile(source, target)
    else:
        os.symlink(os.path.abspath(source), target)
    digest, size = hashlib.sha256(), 0
    with open(target, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return {"path": name, "bytes": size, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
