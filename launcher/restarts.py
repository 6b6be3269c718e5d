"""How often, and after which pause, what has ended is started again."""

from __future__ import annotations

import math
from dataclasses import dataclass

LONGEST_S = 30.0


@dataclass
class RestartPolicy:
    """Starts again up to `most` times in a row without progress; each pause is twice the one before."""

    most: int
    first_pause_s: float = 0.0
    furthest: float = -math.inf
    in_a_row: int = 0  # ends without progress, the last one with it

    def after(self, progress: float) -> float | None:
        """Takes note of an end. Gives the pause before the next start, in seconds; None where there shall be none.

        Args:
            progress: how far it had come, such as steps made or tables written.
        """
        self.in_a_row = 1 if progress > self.furthest else self.in_a_row + 1
        self.furthest = max(self.furthest, progress)
        if self.in_a_row > self.most:
            return None
        return min(LONGEST_S, self.first_pause_s * 2 ** (self.in_a_row - 1))
