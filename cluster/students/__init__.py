"""The ranks of the student as Ray actors: one group, driven and restarted as a whole."""
