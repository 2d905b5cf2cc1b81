"""Plots as PNG. They are not pyplot's, which would choose a backend for everybody."""

import io
from collections.abc import Callable


def png(draw: Callable, *, size: tuple[float, float] = (6.4, 3.6), dpi: int = 150) -> bytes:
    """What ``draw(axes)`` puts on axes of ``size`` inches; nothing where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullLocator
    except ImportError:
        return b""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":  # the ticks of its own would read 5.72 x 10^-2
        if high < 30 * low:  # too few decades for powers of ten
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()
