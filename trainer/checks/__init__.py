"""What measures a student or refuses a machine: held-out evaluation, start-up self-tests, the test of labels."""
