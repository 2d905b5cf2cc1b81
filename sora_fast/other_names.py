"""Names that other libraries have for what has another one here: the error says ours. Imports nothing heavy."""

import difflib
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping

ARGUMENTS = {
    **dict.fromkeys(("num_heads", "n_heads", "num_attention_heads", "nhead"), ("heads",)),
    **dict.fromkeys(("embed_dim", "hidden_size", "hidden_dim", "d_model", "dim", "base_dim"), ("width",)),
    **dict.fromkeys(("num_layers", "n_layers", "num_blocks"), ("depth",)),
    **dict.fromkeys(("z_dim", "z_channels", "latent_dim"), ("latent_channels",)),
    **dict.fromkeys(("in_channels", "in_chans", "num_channels"), ("in_channels", "channels")),
    "patch_size": ("patch",), "num_classes": ("classes",), "prediction_type": ("prediction",),
    "cross_attention_dim": ("context_width", "text_width"), "scale": ("softmax_scale",),
}
PLACES = {"DiTBlock": "models.DiTBlock", "Attention": "nn.VarlenAttention", "MultiheadAttention": "nn.VarlenAttention",
          "PatchEmbed": "nn.PatchEmbed3d", "Conv3d": "nn.CausalConv3d", "AutoencoderKL": "models.VideoVAE",
          "from_pretrained": "models.load_dit or sora_fast.models.load_vae"}
PUBLIC = ("ops", "nn", "models", "diffusion", "data", "integrations", "compat", "testing")


def ours(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` probably means."""
    known = list(known)
    near = [word for word in ARGUMENTS.get(name, ()) if word in known] or difflib.get_close_matches(name, known, 1)
    return near[0] if near else None


def missing(module: str, names: Iterable[str], name: str) -> AttributeError:
    """What a module's ``__getattr__`` raises for a ``name`` that is none of its ``names``."""
    loaded = (f"{each}.{name}" for each in PUBLIC if name in getattr(sys.modules.get(f"sora_fast.{each}"), "__all__", ()))
    place = next(loaded, PLACES.get(name))
    names = sorted(names)
    near = f"{module}.{ours(name, names)}" if ours(name, names) else None
    remedy = f"write sora_fast.{place}" if place else f"write {near}" if near else f"it has {', '.join(names)}"
    return AttributeError(f"{module}: expected one of its names, got {name}; {remedy}")


class Elsewhere:
    """A class attribute that other libraries have: reading it says what to write here."""

    def __init__(self, remedy: str):
        self.remedy = remedy

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner):
        raise AttributeError(f"{owner.__name__}: expected one of its names, got {self.name}; write {self.remedy}")


class Named:
    """The base of classes whose unknown keywords are answered with the right one."""

    def __new__(cls, *args, **named):
        if named:
            _check_keywords(cls, named)
        return super().__new__(cls)


def _check_keywords(cls: type, named: Mapping[str, object]) -> None:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    accepted = [each.name for each in parameters]
    unknown = next((name for name in named if name not in accepted), None)
    if unknown is None or any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    remedy = f"write {ours(unknown, accepted)}" if ours(unknown, accepted) else "pass one of these"
    if "config" in accepted:  # sizes are fields of the config
        config = typing.get_type_hints(cls.__init__)["config"]
        config = next((each for each in typing.get_args(config) if each is not type(None)), config)
        fields = list(inspect.signature(config).parameters)
        word = unknown if unknown in fields else ours(unknown, fields)
        remedy = (f"write {cls.__name__}({config.__name__}({word}=...))" if word else
                  f"{config.__name__} has {', '.join(fields)}")
    raise TypeError(f"{cls.__name__}: expected {', '.join(accepted)}, got {unknown}; {remedy}")


def preset(model: str, presets: Mapping[str, object], name: str):
    """``presets[name]``, or a ValueError that names the nearest."""
    if name in presets:
        return presets[name]
    near = [each for each in presets if each.startswith(f"{name}/")] or difflib.get_close_matches(name, presets, 1)
    remedy = f"write {' or '.join(map(repr, near))}" if near else "choose one of them"
    raise ValueError(f"{model}.preset: expected one of {', '.join(presets)}, got {name!r}; {remedy}")


def called_as(remedy: str) -> Callable:
    """Decorates a method that other libraries call with other arguments: a call that does not fit says what to write."""

    def decorate(method):
        @functools.wraps(method)
        def call(*args, **named):
            try:
                return method(*args, **named)
            except TypeError as error:
                if error.__traceback__.tb_next is not None:  # it was raised inside the method: the call did fit
                    raise
            expected = ", ".join(list(inspect.signature(method).parameters)[1:])
            raise TypeError(f"{method.__qualname__}: expected {expected}, got other arguments; {remedy}")

        return call

    return decorate
