"""`vernier train`: ranks and evaluator on this machine, watched until the run's last word.

`supervise` is the only one that kills or restarts ranks here. What a run did is in its directory, never only here.
"""
