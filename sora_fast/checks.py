"""The sentences that bad input gets: op, expectation, what came, remedy.

Shape, dtype and device checks cost nothing and always run. Checks of *values* (``values_are_visible``) run for
CPU tensors, and for CUDA tensors only with ``SORA_FAST_CHECK=1``, because there they wait for the GPU.

A sentence that shows a size is formatted only once the check has failed (``if ...: raise error(...)``): formatting a
size while torch.compile traces would bake that size into the graph. A sentence that is made before (the reasons of a
backend) shows sizes by ``shown``.
"""

import warnings
from collections.abc import Sequence

import torch

from . import env
from .precision import has_data


def show_shape(shape: Sequence[object]) -> str:
    """``(N, 3)`` with the numbers and letters as they are."""
    inner = ", ".join(str(s) for s in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def error(op: str, expected: str, got: object, remedy: str) -> ValueError:
    """The sentence as an exception, for the caller to raise."""
    return ValueError(f"{op}: expected {expected}, got {got}; {remedy}")


def shown(size: object) -> str:
    """"1,024" of a size, or of several, in a sentence that may be made while a graph is traced.

    There a size may be a symbol, which takes no format and which a sentence would bake into the graph: it is not shown.
    """
    if torch.compiler.is_compiling() or isinstance(size, torch.SymInt):
        return "<traced>"
    return f"{size:,}" if isinstance(size, int) else str(size)


def require(condition: bool, op: str, expected: str, got: object, remedy: str) -> None:
    """Raise one ValueError sentence unless ``condition`` holds; neither ``expected`` nor ``remedy`` shows a size."""
    if not condition:
        raise error(op, expected, got, remedy)


def number(op: str, name: str, value: object) -> None:
    """A real number of the host: a tensor would wait for its device."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) and not _converts(value, "__float__"):
        raise TypeError(f"{op}: expected {name} to be a number, got {came(value)}; pass a float")


def whole(op: str, name: str, value: object, least: int | None = None) -> None:
    """An int (numpy's too), at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) and not _converts(value, "__index__"):
        raise TypeError(f"{op}: expected {name} to be an int, got {came(value)}; pass an int")
    if least is not None and value < least:
        raise error(op, f"{name} of {least} or more", value, "pass a larger int")


def several(op: str, name: str, value: object, names: str, least: int | None = None) -> None:
    """A tuple or list of ints, as many as ``names`` ("pt, ph, pw") has, each at least ``least``."""
    right = isinstance(value, (tuple, list)) and len(value) == names.count(",") + 1
    for each in value if right else ():
        if type(each) is not int:
            whole(op, f"every number of {name}", each)
        right = right and (least is None or each >= least)
    if not right:
        floor = "" if least is None else f", each {least} or more"
        raise error(op, f"{name} as ints ({names}){floor}", came(value), "pass them in this order")


def sequence(op: str, name: str, value: object, of: str) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: expected {name} to be a list of {of}, got {came(value)}; put them in a list")


def _converts(value: object, method: str) -> bool:
    return not isinstance(value, torch.Tensor) and hasattr(value, method)


def came(value: object) -> str:
    """What to show of a value of the wrong kind: small things whole, others by their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        shown = repr(value)
        return shown if len(shown) <= 80 else f"{shown[:76]}..."
    if isinstance(value, (tuple, list)) and len(value) <= 6 and all(isinstance(v, (int, float)) for v in value):
        return repr(value)
    return f"a {type(value).__name__}"


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}; pass a torch.Tensor")


def shape(op: str, name: str, value: torch.Tensor, expected: Sequence[int | str], remedy: str) -> None:
    """``expected`` mixes numbers, which must match, and letters, which stand for any size."""
    if not isinstance(value, torch.Tensor):
        tensor(op, name, value)
    sizes = value.shape
    matches = len(sizes) == len(expected)
    if matches:
        for size, want in zip(sizes, expected):  # noqa: B905 (of one length; strict=True takes as long as all the rest)
            if not isinstance(want, str) and size != want:
                matches = False
    if not matches:
        raise ValueError(
            f"{op}: expected {name} of shape {show_shape(expected)}, got {show_shape(value.shape)}; {remedy}"
        )


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            tensor(op, name, value)
        if not value.is_floating_point():
            raise TypeError(f"{op}: expected {name} of a floating dtype, got {value.dtype}; convert it with .float()")


def _different(op: str, field: str, tensors: dict) -> tuple | None:
    """(name, field) of the first given tensor and of the first one that differs from it, or None where all are alike."""
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            tensor(op, name, value)
        if first is None:
            first = name, getattr(value, field)
        elif getattr(value, field) != first[1]:
            return *first, name, getattr(value, field)
    return None


def same_dtype(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors have the first one's dtype."""
    found = _different(op, "dtype", tensors)
    if found:
        first, dtype, name, other = found
        raise TypeError(f"{op}: expected {name} in {first}'s dtype {dtype}, got {other}; "
                        f"convert one with .to(), or run under torch.autocast")


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors lie on the first one's device."""
    found = _different(op, "device", tensors)
    if found:
        first, device, name, other = found
        raise ValueError(f"{op}: expected {name} on {first}'s device {device}, got {other}; "
                         f"move one with .to(device)")


def choice(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: expected {name} to be one of {options}, got {value!r}; choose one of them")


def integers(op: str, name: str, value: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    tensor(op, name, value)
    if value.dtype not in dtypes:
        options = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{op}: expected {name} in {options}, got {value.dtype}; convert it with .to({dtypes[0]})")


def looked_at(value: torch.Tensor) -> bool:
    """Whether values may be read for a warning: on a CPU outside a graph; nothing waits for a GPU to be warned."""
    return value.is_cpu and has_data(value)


def warn_once(owner: object, of: str, sentence: str) -> None:
    """Warn with ``sentence`` about ``of``, once for each ``owner``, which remembers it."""
    warned = vars(owner).setdefault("_warned", set())
    if of not in warned:
        warned.add(of)
        warnings.warn(sentence, stacklevel=2)


def values_are_visible(value: torch.Tensor) -> bool:
    """Whether reading numbers out of ``value`` is allowed here: never while tracing, never by a silent GPU wait."""
    if not has_data(value):
        return False
    if value.is_cpu:
        return True
    return value.is_cuda and env.check_cuda_values()


def cu_seqlens(op: str, name: str, value: torch.Tensor, total: int, owner: str) -> None:
    """Offsets start at 0, never fall, and do not end beyond the ``total`` rows of ``owner``."""
    shape(op, name, value, ("S + 1",), "it holds the start of every sample and the end of the last")
    integers(op, name, value, (torch.int32,))
    if value.shape[0] < 1:
        raise ValueError(f"{op}: expected {name} to hold at least the number 0, got no number; pass zeros(1)")
    if not values_are_visible(value):
        return
    offsets = value.tolist()
    require(offsets[0] == 0, op, f"{name} to start at 0", offsets[0], "prepend the missing start")
    for index in range(len(offsets) - 1):
        if offsets[index + 1] < offsets[index]:
            raise ValueError(
                f"{op}: expected {name} never to fall, got {offsets[index]} before {offsets[index + 1]} at place "
                f"{index + 1}; pass the running sum of the lengths"
            )
    if offsets[-1] > total:
        raise ValueError(
            f"{op}: {name} must not end beyond {owner}'s {shown(total)} rows, got {shown(offsets[-1])}; "
            f"pass offsets into this very tensor"
        )


def rows(op: str, value: torch.Tensor, tokens: int, table_rows: int | None) -> bool:
    """One modulation row a token, int32, -1 for tokens of no sample, non-decreasing otherwise.

    Returns whether there may be tokens of no sample: True too where values are not visible.
    """
    shape(op, "rows", value, (tokens,), "rows names one modulation row for every token")
    integers(op, "rows", value, (torch.int32, torch.int64))
    if tokens == 0 or not values_are_visible(value):
        return True
    low, high = (int(n) for n in value.aminmax())
    require(low >= -1, op, "rows of -1 (no sample) or more", low, "use -1 for tokens that belong to no sample")
    if table_rows is not None and high >= table_rows:
        raise error(op, f"rows below the {table_rows} rows of the modulation", high,
                    "pass one modulation row for every index in rows")
    used = value if low >= 0 else value[value >= 0]
    falls = used[1:] < used[:-1]
    if bool(falls.any()):
        place = int(falls.nonzero()[0])
        raise ValueError(
            f"{op}: expected rows never to fall, got {int(used[place])} before {int(used[place + 1])}; "
            f"order the tokens by sample, as Pack does"
        )
    return low < 0
