"""The student: how it is loaded, sharded, attends, is trained and exported; and what is asked of any model folder."""
