"""What a run is: the typed configuration. Importing it brings neither torch nor ray."""
