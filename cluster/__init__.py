"""Where a run happens: Ray, placement, teacher replicas, the student group, engines."""
