"""Engines, one file per kind: `engine: {kind: vllm}` in a config is `cluster/engines/vllm.py`.

A file holds a frozen dataclass `Engine` whose fields are the parameters a config may give, with three methods:

    arguments(role, dtype, ..., stop_strings) -> dict       pure; for `resolve`
    start_scorer(plan, name) -> ScoringEngine               in the actor's process
    start_generator(plan, name) -> GeneratingEngine         in the actor's process

Importing the file must not import vLLM: `resolve` and `check` read it on machines without one.
"""
