"""Rank-groups: who this rank is, how ranks meet, and the few collectives that are used.

Trainer and scoring both stand on it. No object is ever pickled between ranks here.
"""
