"""`stillhouse check`: everything about a run that can be known before an accelerator is asked for. `run.py` asks in the
order of the pipeline; each other file holds the questions of one subject."""
