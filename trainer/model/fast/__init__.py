"""What makes products fast on one kind of CPU. Results equal the plain ones, and nothing else in trainer/ depends on
the hardware."""
