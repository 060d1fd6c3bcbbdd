"""Encodings of soft labels, one file per kind: `kind: topk` in a config is `trainer/labels/topk.py`.

A file holds one frozen dataclass `Encoding` (see `trainer/labels/encoding.py`) whose fields are the parameters that a
config may give. Only the chosen file is imported. Nothing here imports Ray or vLLM: `make` runs inside the teacher's
worker process, `pair` on the student's device.
"""
