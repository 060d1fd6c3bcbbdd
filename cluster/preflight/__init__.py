"""Is a machine, and a cluster, fit for a run? Each question stands here once: a function that gives a finding. They are
asked by `stillhouse doctor`, by `check`, and on every node when a run starts.

software.py   packages and the plug-in of vLLM, of the process that asks
machine.py    processor, GPUs, limits, disks, shared memory, names, ports, token
nodes.py      both asked of every node of a cluster, and what the nodes have against each other
network.py    one process per node: can they reach each other, and how fast are they together
joining.py    why a cluster cannot be joined
"""
