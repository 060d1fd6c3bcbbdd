"""What a person types: the command line and what its commands do."""
