"""`vernier plan --schedule`: the learning rate of every step, drawn before a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from configs.schema import Config
from launcher.text import say
from trainer.engine.schedule import learning_rate, warmup_steps

WIDTH, HEIGHT = 64, 12  # of the drawing, in characters
BLOCKS = " ▁▂▃▄▅▆▇█"


def rates_of(config: Config) -> list[float]:
    """The learning rate of each step."""
    steps = config.schedule.steps or config.steps
    peak = config.optimizer.lr
    return [
        learning_rate(step, peak=peak, steps=steps, schedule=config.schedule) for step in range(1, config.steps + 1)
    ]


def draw_schedule(config: Config, picture: Path, console: Console) -> None:
    """Prints the schedule as text, and writes it as a PNG."""
    rates = rates_of(config)
    most = max(rates)
    warm = warmup_steps(config.schedule.steps or config.steps, config.schedule)
    say(console, f"{config.schedule.name}: {config.steps:,} steps, {warm:,} of warm-up; {most:.3g} at the peak")
    columns = min(WIDTH, len(rates))
    shown = [rates[round(at * (len(rates) - 1) / max(1, columns - 1))] for at in range(columns)]
    for row in range(HEIGHT, 0, -1):
        filled = "".join(BLOCKS[min(8, max(0, round(8 * (HEIGHT * rate / most - row + 1))))] for rate in shown)
        label = f"{most * row / HEIGHT:9.2e}" if row in (HEIGHT, HEIGHT // 2) else " " * 9
        say(console, f"{label} │{filled.rstrip()}")
    say(console, f"{'0':>9} └{'─' * columns}")
    say(console, f"{'':11}{1:<{columns // 2}}{len(rates):>{columns - columns // 2},}")
    _write(rates, config, picture)
    say(console, f"written to {picture}")


def _write(rates: list[float], config: Config, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(1, len(rates) + 1), rates)
    axes.set(xlabel="step", ylabel="learning rate", title=f"{config.name}: {config.schedule.name}", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
