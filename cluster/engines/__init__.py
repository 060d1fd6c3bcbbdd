"""Engines, one file per kind: `engine: {kind: vllm}` in a config is `cluster/engines/vllm.py`.

A file holds a frozen dataclass `Engine` whose fields are the parameters a config may give, with three methods:

    arguments(role, dtype, tensor_parallel_size, max_length, accelerator, kept_events) -> dict    pure; for `resolve`
    start_scorer(plan, name) -> ScoringEngine         in the actor's process
    start_writer(plan, name) -> WritingEngine         in the actor's process

Importing the file must not import vLLM: `resolve` and `check` read it on machines without one.
"""
