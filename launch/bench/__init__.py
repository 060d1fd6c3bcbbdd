"""`stillhouse bench`: what a token costs and where the time goes, measured so that anybody can repeat it.

distil    CPU time per token of the whole pipeline, against the plain recipe in one process    distil.py
scoring   CPU time of a labelled batch, against vLLM's bare prefill of it                      scoring.py
start     what the time from the command to the first step is made of                          run_times.py
waits     busy and waiting shares of student and teachers at steady state                      run_times.py
"""
