"""A run's directory: where its files lie, how its state is read and written, and why what ended did.

`RunDir` is the one owner of names below a run. The trainer writes state under its lock; all others read it here.
"""
