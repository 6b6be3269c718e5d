"""The progress line of a training: live on a terminal, a plain line now and then elsewhere. Rank 0 only."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from configs.console import is_live
from configs.files.opening import open_to_read
from eval.progress import progress_bar

PLAIN_S = 10.0
LIVE_S = 0.2


class ProgressLine:
    """Shows steps as they come, and what the evaluator tells through the run's events."""

    def __init__(self, console: Console, steps: int, step: int, events: Path) -> None:
        self.console, self.steps = console, steps
        self.shown = time.monotonic()
        self.first_step, self.started = step, time.monotonic()
        self.events, self.offset = events, events.stat().st_size if events.is_file() else 0
        self.live: Progress | None = None
        if is_live(console.file):
            self.live = progress_bar(console, "loss {task.fields[loss]}  {task.fields[speed]}")
            self.task = self.live.add_task("step", total=steps, completed=step, loss="–", speed="–")
            self.live.start()

    def on_step_end(self, line: Mapping[str, Any]) -> None:
        """A step was made."""
        now = time.monotonic()
        last = line["step"] == self.steps
        if now - self.shown < (LIVE_S if self.live else PLAIN_S) and not last:
            return
        self.shown = now
        self.tell_events()
        loss, speed = f"{line['loss']:.4f}", f"{line['tokens_per_s']:,.0f} tokens/s"
        speed += f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
        if self.live is not None:
            self.live.update(self.task, completed=line["step"], loss=loss, speed=speed, refresh=True)
            return
        made = line["step"] - self.first_step
        left = (self.steps - line["step"]) * (now - self.started) / max(1, made)
        self.console.print(
            f"step {line['step']}/{self.steps}  loss {loss}  {speed}  {_duration(left)} left",
            markup=False,
        )

    def tell_events(self) -> bool:
        """Prints what the evaluator has said, and what was asked for and done, since the last look; whether it did."""
        try:
            with open_to_read(self.events) as file:
                file.seek(self.offset)
                new = file.read()
        except OSError:
            return False
        whole, newline, _ = new.rpartition(b"\n")
        self.offset += len(whole + newline)
        told = False
        for text in whole.splitlines():
            try:
                event = json.loads(text)
            except ValueError:  # cut by a full disk
                continue
            if not isinstance(event, dict) or not isinstance(event.get("message"), str):
                continue
            if event.get("kind") in ("scored", "not scored", "damaged", "saved on request"):
                self.console.print(f"  {event['message']}", markup=False)
                told = True
        return told

    def on_end(self, step: int) -> None:
        self.tell_events()
        if self.live is not None:
            self.live.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
