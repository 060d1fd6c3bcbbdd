"""How a row is read: one file per family of formats; `trainer/data/rows.py` tells which one a row has.
`turns.py`, `conversation.py` and `tools.py` are what those with conversations have in common."""
