"""Rollout engines: copies of the student that write, and take in its weights while it is trained."""
