"""Distillation between models with different tokenizers: which of a teacher's labels belong to which student's rows.

`token_bytes.py` says which bytes a token stands for, `rows.py` which rows of two tokenisations end at the same byte,
`vocabularies.py` which ids are one token. A file named as a kind of `align` holds what that kind makes of them.
"""
