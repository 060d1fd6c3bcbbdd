"""A run in motion: the job, the plan of a step, the two loops, staging of labels, checkpoints, and the controller."""
