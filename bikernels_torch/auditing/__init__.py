"""Knowing what is covered: which operators of a program can make its results depend on the batch.

Where to look: `kinds` holds the tables of operators, `rows` finds a slice's rows in a tensor, `run` compares operator
by operator, `place` tells where in the model an operator was called, `report` what comes of it.
"""
