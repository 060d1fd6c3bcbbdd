"""Which machines there are, what each role gets of them, and how it is reserved; all but `reserve.py` without Ray."""
