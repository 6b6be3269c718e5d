"""Verdicts between loss tables: a pair, along a run, a leaderboard, a sweep, and the curves of training.

They compute and give values; words and tables for people are in `launcher.compare`. Numbers come from
`eval.statistics`, files from `eval.tables`.
"""
