"""The memory that a run's processes need, as a pure function of its configuration and the sizes of its models.

parts.py      what is added up: a part, a role
zero.py       weights, gradients and optimizer states of a rank, by what DeepSpeed is told
student.py    a rank: those, activations, the loss, the teacher's head, labels
teacher.py    an engine: weights, work buffers, the cache of keys and values
processes.py  what a process has before it holds a model, measured
needs.py      all roles of a run
verdict.py    beside what is offered: fits, is close, cannot; and what to change
"""
