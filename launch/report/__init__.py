"""What a person sees of a run: metrics and their sinks, progress, the HTML page, the model card."""
