"""Encodings of soft labels, one file per kind: `kind: topk` in a config is `trainer/labels/topk.py`.

A file holds one class `Encoding` (see `trainer/labels/encoding.py`), derived from its parameters in configs/labels.py.
Only the chosen file is imported. Nothing here imports Ray or vLLM: `encode` runs inside the teacher's worker process,
`align` on the student's device.
"""
