"""How a student learns: everything between a prompt and a checkpoint, free of Ray and vLLM."""
