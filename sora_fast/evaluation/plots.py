"""Plots as PNG. They are not pyplot's, which would choose a backend for everybody."""

import io
from collections.abc import Callable


def png(draw: Callable, *, size: tuple[float, float] = (6.4, 3.6), dpi: int = 150) -> bytes:
    """What ``draw(axes)`` puts on axes of ``size`` inches; nothing where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return b""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.3, which="both")
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()
