"""What `stillhouse doctor` looks at, one file per subject; each look gives findings and none can hang.

software.py   packages, plug-in                 of this process; a node of a cluster runs the same in a task
machine.py    processor, GPUs, disk, ports ...
members.py    the nodes of a cluster against each other, through Ray
network.py    one process per node: can they reach each other, and how fast are they together
"""
