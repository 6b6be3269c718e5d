"""How runs stand: `status`, `logs`, `stop`, `board`, and the index of runs.

All read a run's directory; only `stop` leaves a request in it. Nothing here loads torch.
"""
