"""Training curves of two runs, paired step by step: whether they may be, what differs, what their difference shows.

Knows metrics and settings of runs, and nothing of scores; `eval.compare` may ask it what differs between two runs.
"""
