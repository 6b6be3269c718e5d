"""What keeps a training alive or ends it with a reason: lock, heartbeats, watchdog, guards, adaptations.

`hang_verdict` judges, the others gather and act. Only the holder of the lock may commit anything to a run.
"""
