"""How files are written and read so that they are whole or not there: renames, seals, manifests, names of steps.

Whoever writes into a run or a data set does it by these, and never by `open`. They know nothing of what is in the
files.
"""
