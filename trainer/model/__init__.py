"""The model to train: built from settings or a directory, its settings' effects tried, what it adds to its loss.

Checked before ranks start, then built on each. Dropout is seeded here by position and window. What the model learns is
in `trainer.objectives`.
"""

from trainer.model.build import make_model

__all__ = ["make_model"]
