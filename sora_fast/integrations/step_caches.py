"""Step caches of diffusers (``model.enable_cache``, ``apply_layer_skip``), which must know a swapped block.

They look up what a block takes and returns by its exact class, so the class that a swap makes is entered too.
"""

import dataclasses
import sys


def register_block(original: type, made: type) -> None:
    """Enter ``made`` in diffusers' registry of transformer blocks as what ``original`` is there, if it is.

    Nothing is imported for it: without diffusers' transformers there is no block to enter.
    """
    helpers = sys.modules.get("diffusers.hooks._helpers")
    if helpers is None or "diffusers.models.transformers" not in sys.modules:
        return
    try:
        known = helpers.TransformerBlockRegistry.get(original)
    except ValueError:  # not a block that caches work on
        return
    # a copy: to register notes the class in it
    helpers.TransformerBlockRegistry.register(made, dataclasses.replace(known))
