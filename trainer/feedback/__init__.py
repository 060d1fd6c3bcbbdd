"""What is said of a whole answer: a file per kind of reward, and what calls it."""
