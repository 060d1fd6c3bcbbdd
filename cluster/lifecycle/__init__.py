"""From start to end: Ray started, joined and left, what its nodes and processes are, their logs, and what to do when
one of them fails or is taken away. The nodes' fitness for a run is asked in `cluster/preflight`."""
