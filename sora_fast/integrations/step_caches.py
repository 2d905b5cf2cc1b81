"""diffusers' step caches (``model.enable_cache``, ``apply_layer_skip``), which must recognise swapped blocks.

They look up a block's arguments and results by its exact class, so the class of a swapped block is registered too.
"""

import dataclasses
import sys


def register_block(original: type, swapped: type) -> None:
    """Register ``swapped`` in diffusers' registry of transformer blocks like ``original``, if that is registered.

    Nothing is imported: without diffusers' transformers there is no block to register.
    """
    helpers = sys.modules.get("diffusers.hooks._helpers")
    if helpers is None or "diffusers.models.transformers" not in sys.modules:
        return
    try:
        known = helpers.TransformerBlockRegistry.get(original)
    except ValueError:  # not a block that caches work on
        return
    # a copy, because registering stores the class in it
    helpers.TransformerBlockRegistry.register(swapped, dataclasses.replace(known))
