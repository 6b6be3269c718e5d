"""Scoring: the reference set, per-sample losses over a rank-group, loss tables, statistics, comparisons.

Knows nothing about training: it scores any Hugging Face model directory.
"""
