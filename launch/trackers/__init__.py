"""Trackers, one file per kind: `trackers: [{kind: wandb}]` in a config is `launch/trackers/wandb.py`.

    MetricsLog --> metrics.jsonl --followed by--> follower.py, a process for each tracker --> TrackedRun --> its library
    trackers.py    starts these processes, says where the run goes on, and ends them in bounded time

The run only ever writes its own file. A tracker that is slow, away or broken is behind for a while, and reads on from
where it was: it can neither end a run nor slow it, and nothing is dropped.
"""
