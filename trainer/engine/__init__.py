"""DeepSpeed's engine: made with the optimizer's groups and schedule, its state in our own form, the moving average.

What is known of DeepSpeed's insides is in `zero_state`, pinned to a version. The loop sees the engine alone.
"""

from trainer.engine.build import make_engine, make_optimizer

__all__ = ["make_engine", "make_optimizer"]
