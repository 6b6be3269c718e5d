"""The model to train: built from settings or a directory, its settings' effects tried, what it adds to its loss.

Checked before ranks start, then built on each. Dropout is seeded here by position and window.
"""

from trainer.model.build import TrainableLM, make_model

__all__ = ["TrainableLM", "make_model"]
