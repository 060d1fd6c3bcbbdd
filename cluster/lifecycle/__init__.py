"""Ray and its processes from start to end. Whether machines are fit for a run is asked in `cluster/preflight`.

ray_session.py, ray_token.py     Ray's environment; starting, joining and leaving it; who may use it
nodes.py, drain.py               which nodes are alive, which are about to be taken away, and what that means for a run
processes.py, shared_memory.py   ending actors' processes for certain, with the shared memory they leave behind
guard.py                         the process that cleans up when the run itself was killed
calls.py, logs.py                calls of actors with a deadline; output of each role under the run folder
health.py                        what to do when something failed, as a pure function
"""
