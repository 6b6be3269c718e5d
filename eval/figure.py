"""A figure that is empty, and a figure that is drawn written to the disk: PNG to look at, PDF and SVG for papers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.files.atomic import write_atomic

DPI = 130
# Without the time and the program, so that equal figures give equal bytes.
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}


def new_figure(width: float, height: float, rows: int = 1, **more: Any) -> tuple[Any, tuple[Any, ...]]:
    """A figure in inches with its axes, one below the other; the object interface, so no state is shared."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = more.pop("height_ratios", None)
    found = figure.subplots(rows, 1, squeeze=False, gridspec_kw={"height_ratios": ratios} if ratios else None, **more)
    for axes in found[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.2)
        axes.set_axisbelow(True)
    return figure, tuple(found[:, 0])


def make_folder(directory: Path) -> None:
    """Makes the folder of figures.

    Raises:
        DataError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--plots: {directory} cannot be made a directory ({error.strerror})") from None


def write_figure(figure: Any, path: Path) -> Path:
    """Writes a figure, each file whole or not at all, and beside the PNG at `path` a PDF and an SVG.

    Raises:
        DataError: it cannot be written.
    """
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.title.set_fontsize(10.5)
        axes.tick_params(labelsize=9)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend is not None else ():
            text.set_fontsize(8.5)
    with rc_context({"svg.hashsalt": path.stem, "pdf.fonttype": 42}):  # fonts as text that can be searched and edited
        for suffix, metadata in FORMATS.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], dpi=DPI, metadata=metadata)
            try:
                write_atomic(path.with_suffix(suffix), buffer.getvalue())
            except OSError as error:
                raise DataError(f"--plots: {path} cannot be written ({error.strerror})") from None
            figure.set_layout_engine("none")  # found by the first; it takes most of the time
    return path
