"""Runs on a node of a Ray cluster, as a job of its own: prints which results a run folder holds, as one line of JSON.

`stillhouse fetch` sends this file alone. It uses nothing but the standard library and works with any Python 3.9.

    python ray_listing.py FOLDER NAME...     {"error": "", "files": [{"path": ..., "bytes": ..., "sha256": ...}]}
"""

import hashlib
import json
import os
import sys


def main(folder, names):
    error = "" if os.path.isdir(folder) else f"the run folder {folder} does not exist on {os.uname().nodename}"
    print(json.dumps({"error": error, "files": [described(folder, name) for name in found(folder, names)]}))


def found(folder, names):
    """Paths below the folder: the named files, and all regular files of the named folders. No link is followed."""
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


def described(folder, name):
    """Size and hash of what was read: a log of a run that is still working grows meanwhile."""
    digest, size = hashlib.sha256(), 0
    with open(os.path.join(folder, name), "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return {"path": name, "bytes": size, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
