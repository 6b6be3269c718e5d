"""Checkpoints and snapshots: written by all ranks in the background, found again whole, kept or let go.

`checkpointer` decides what is saved at a step, `find_whole` what a start goes on from. Only the run's trainer writes or
moves them, under its lock.
"""
