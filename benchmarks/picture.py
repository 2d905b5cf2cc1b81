"""README's picture: the demo's samples of Big Buck Bunny beside the clip's own frames.

    sora-fast demo && python -m sora_fast.benchmarks.picture out/demo docs/images/demo.png

No other clip's frames are shown: Big Buck Bunny is (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0.
T frames, H height, W width.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sora_fast import files
from sora_fast.data import read_clip
from sora_fast.data.media import probe

SOURCE = "bigbuckbunny.mp4"
GAP = 8  # between a clip and its sample in the demo's files, and between pictures here
LABEL = 20  # height of a line of text


def sheet(pairs: Sequence[tuple[str, torch.Tensor, torch.Tensor]], shown: int = 3):
    """A PIL image of (caption, real, generated), uint8 (T, H, W, 3): the clip's frames above the sample's."""
    from PIL import Image, ImageDraw

    _, H, W, _ = pairs[0][1].shape
    block = shown * (W + GAP)
    image = Image.new("RGB", (len(pairs) * block + GAP, 2 * (H + LABEL) + LABEL + GAP), "white")
    draw = ImageDraw.Draw(image)
    for place, (caption, *clips) in enumerate(pairs):
        left = GAP + place * block
        draw.text((left, 4), f'"{caption}"', fill="black")
        for row, (label, clip) in enumerate(zip(("frames of the clip", "generated from the caption"), clips, strict=True)):
            top = LABEL + row * (H + LABEL)
            draw.text((left, top + 4), label, fill="#59636e")
            for column in range(shown):
                frame = clip[round(column * (len(clip) - 1) / (shown - 1))]
                image.paste(Image.fromarray(frame.numpy()), (left + column * (W + GAP), top + LABEL))
    return image.quantize(256, dither=0)  # a palette: a third of the size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="README's picture from a finished sora-fast demo")
    parser.add_argument("demo", nargs="?", default="out/demo", type=Path, help="the demo's folder (default: out/demo)")
    parser.add_argument("out", nargs="?", default="docs/images/demo.png", type=Path, help="the picture to write")
    a = parser.parse_args(arguments)
    pairs = []
    for sample in json.loads((a.demo / "figures.json").read_text(encoding="utf-8"))["samples"]:
        if sample["source"] == SOURCE:
            item = probe(a.demo / "samples" / sample["file"])
            both = read_clip(item, frames=item.frames, size=(item.height, item.width))
            width = (both.shape[2] - GAP) // 2
            pairs.append((sample["caption"], both[:, :, :width], both[:, :, width + GAP :]))
    if not pairs:
        raise ValueError(f"picture: expected samples of {SOURCE} in {a.demo}, got none; run sora-fast demo first")
    files.replace(a.out, lambda path: sheet(pairs).save(path, "PNG", optimize=True))
    print(f"wrote {a.out}, {a.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
