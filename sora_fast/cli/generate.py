"""sora-fast generate. T frames, H lines, W columns; clips are uint8 (T, H, W, 3)."""

import math
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import check_folder
from .parsing import typed

DESCRIPTION = """\
From a caption:  sora-fast generate runs/dit --prompt 'a rabbit' --size 9x96x160
Several at once: ... --prompt 'a rabbit' --size 9x96x160 --prompt 'a cat' --size 1x128x128
Animate a photo: ... --prompt 'a rabbit' --image rabbit.png
Go on:           ... --prompt 'a rabbit' --clip rabbit.mp4 --extend after --size 17x96x160
What was before: ... --prompt 'a rabbit' --clip rabbit.mp4 --extend before --size 17x96x160
Loop:            ... --prompt 'a rabbit' --clip rabbit.mp4 --loop --size 17x96x160
                 ... --prompt 'a rabbit' --loop --size 17x96x160
Interpolate:     ... --prompt 'a rabbit' --clip one.mp4 --to other.mp4 --size 17x96x160
Change:          ... --prompt 'a rabbit in snow' --clip rabbit.mp4 --strength 0.6

--size counts all frames of the file, given ones included. Images and clips are scaled to just cover
the size and cropped. Given frames stand in the file as they are, not as the VAE's blurred copy. So
that no seam shows, what that copy missed of the given frame at a seam is added to the 8 generated
frames beside it, less and less; a seam that still steps further than the given clip's own frames do
is pulled below that over the same frames. --decoded writes the decoder's frames alone. mp4 and gif
are not lossless, --png is. An image to end with (--to, --extend before) is held for a latent frame."""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("model", help="run folder of sora-fast train")
    add("--prompt", type=typed, action="append", required=True, help="caption; repeat for several samples")
    add("--size", action="append", metavar="TxHxW",
        help="frames x lines x columns; T = 1 is an image. This flag, --image, --clip and --to: once for all samples or "
             "once for each (default: that of --image or --clip, fitted as in training)")
    add("--image", action="append", metavar="FILE", help="begin with this image (default: none)")
    add("--clip", action="append", metavar="FILE", help="use this clip as the mode below says (default: none)")
    add("--extend", choices=("after", "before"),
        help="generate what comes after the clip's last frames, or what was before its first (default: after, with --image)")
    add("--loop", action="store_true", help="lead back to the first frame; the clip's first frames begin it, or, without "
                                            "one, the caption's (default: a free end)")
    add("--to", action="append", metavar="FILE",
        help="lead from the image or the clip's last frames to this image or clip's first (default: none)")
    add("--strength", type=float, metavar="S",
        help="change the image or clip: noise it by this share, 0 to 1, and denoise it to the caption (default: none)")
    add("--given", type=int, metavar="N", help="frames of the clip to go on from, rounded down to what the VAE takes; with "
                                               "--to of each clip (default: about half of T, with --to a third)")
    add("--start", type=float, metavar="SECONDS", help="where in the clip its frames are taken from (default: its end with "
                                                       "--extend after and --to, else its beginning)")
    add("--decoded", action="store_true",
        help="write the decoder's frames alone, given ones too (default: given frames as they are)")
    add("--out", default="out/generated", help="folder for mp4 and png files, numbered on from those there")
    add("--steps", type=int, default=25, help="sampling steps")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance, 1: none")
    add("--fps", type=float, help="frames per second at which clips are read, never above their own, and files are written "
                                  "(default: training's, else the clips' own, else 12)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--gif", action="store_true", help="write gif in place of mp4 (default: mp4)")
    kind.add_argument("--png", action="store_true", help="write a folder of png files in place of each mp4 (default: mp4)")
    add("--seed", type=int, default=0, help="seed of the first sample's noise, the next have the next numbers")
    add("--device", default="auto", help="auto, cpu, cuda")


def check_flags(a: Namespace) -> None:
    """One sentence for flags that do not go together, before anything is loaded."""
    if a.steps < 1 or not (a.fps is None or 0 < a.fps < 1000):
        raise ValueError(f"generate: expected --steps of 1 or more and --fps between 0 and 1000, got {a.steps} and "
                         f"{a.fps if a.fps is None else format(a.fps, 'g')}; 25 and 12 are usual")
    modes = {"--extend": a.extend, "--loop": a.loop, "--to": a.to, "--strength": a.strength is not None}
    modes = [flag for flag, given in modes.items() if given]
    if len(modes) > 1:
        raise ValueError(f"generate: expected one of --extend, --loop, --to and --strength, got {' and '.join(modes)}; run "
                         f"the command once for each")
    if a.image and a.clip:
        raise ValueError("generate: expected --image or --clip, got both; to lead from one to the other give the second as "
                         "--to FILE")
    given = a.image or a.clip
    if modes and modes != ["--loop"] and not given:
        raise ValueError(f"generate: expected --image FILE or --clip FILE for {modes[0]}, got none; name one")
    if a.clip and not modes:
        raise ValueError("generate: expected what to do with --clip, got nothing; add --extend after, --extend before, "
                         "--loop, --to FILE or --strength 0.6")
    for flag, value, wants in (("--given", a.given, a.clip and not a.strength), ("--start", a.start, a.clip)):
        if value is not None and not wants:
            raise ValueError(f"generate: expected {flag} with {'--clip' if flag == '--start' else '--clip to go on from'}, "
                             f"got it without; leave it out")
    if a.given is not None and a.given < 1:
        raise ValueError(f"generate: expected --given of 1 frame or more, got {a.given}; leave it out for the usual number")
    if a.start is not None and not 0 <= a.start < math.inf:
        raise ValueError(f"generate: expected --start of 0 seconds or more, got {a.start:g}; it counts from the first")
    if a.strength is not None and not 0 < a.strength <= 1:
        raise ValueError(f"generate: expected --strength above 0 and at most 1, got {a.strength:g}; 0.6 is usual")
    if not given and not a.size:
        raise ValueError("generate: expected --size TxHxW, got none; only with --image or --clip is there a size to take")


def spread_out(lists: dict[str, list]) -> list[list]:
    """Each flag's values for every sample: given once for all, or once for each."""
    longest = max(lists, key=lambda flag: len(lists[flag]))
    count = len(lists[longest])
    for flag, values in lists.items():
        if len(values) not in (0, 1, count):
            raise ValueError(f"generate: expected one {flag}, or one per {longest} ({count}), got {len(values)}; give as "
                             f"many {flag} as {longest}, or one for all")
    return [(values or [None]) * (count if len(values) < 2 else 1) for values in lists.values()]


def run(arguments) -> int:
    a = arguments
    check_flags(a)
    from ..named import parse_size, pick_device
    from ..training.dit import load_run, sample
    from .generate_media import first_halves, media_prompt, open_media, rate_of, size_of

    check_folder("--out", Path(a.out))
    flag = "--image" if a.image else "--clip"
    lists = {"--prompt": a.prompt, "--size": a.size or [], flag: a.image or a.clip or [], "--to": a.to or []}
    prompts, sizes, files, others = spread_out(lists)
    items = [file and open_media(flag, file) for file in files]
    others = [file and open_media("--to", file) for file in others]
    found = load_run(a.model, pick_device(a.device))
    step, patch = found.vae.config.time_factor, found.dit.config.patch
    sizes = [parse_size(size or size_of(item, found, a.strength is not None), found.vae, patch)
             for size, item in zip(sizes, items, strict=True)]
    rates = [rate_of(a, found, [i for i in pair if i]) for pair in zip(items, others, strict=True)]
    settings = dict(steps=a.steps, guidance=a.guidance, decoded=a.decoded)
    if a.loop and not files[0]:
        media = first_halves(found, prompts, sizes, seed=a.seed, **settings)
    else:
        media = [item and media_prompt(a, item, other, size, fps, step)
                 for item, other, size, fps in zip(items, others, sizes, rates, strict=True)]
    # a loop's first half had the seeds before
    clips = sample(found, prompts, sizes, seed=a.seed + (len(prompts) if a.loop and not files[0] else 0), media=media,
                   **settings)
    for clip, prompt, given, fps in zip(clips, prompts, media, rates, strict=True):
        with _new_sample(Path(a.out)) as name:
            path = _write(name, clip, fps, a)
        print(f"{path}: {'x'.join(map(str, clip.shape[:3]))}, {prompt!r}")
        for seam in given.seams(clip, step) if given else ():
            beside = "" if seam.largest is None else f"; the given clip's own frames differ by up to {seam.largest:.2f}"
            print(f"  {seam.place}: neighbouring frames differ by {seam.jump:.2f} of 255{beside}")
    return 0


@contextmanager
def _new_sample(out: Path) -> Iterator[Path]:
    """The next sample's name, without a suffix: numbers go on behind the highest in ``out``, so no sample is ever replaced.

    A hidden file holds the number inside, so that two commands that write here at once take different ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    numbers = lambda: [int(found[1]) for path in out.iterdir() if (found := re.match(r"\.?sample-(\d+)(?!\d)", path.name))]
    while True:
        number = max(numbers(), default=-1) + 1
        held = out / f".sample-{number:02d}"
        try:
            held.touch(exist_ok=False)
        except FileExistsError:
            continue
        if numbers().count(number) == 1:
            break
        held.unlink()  # another command has finished this number in between
    try:
        yield out / f"sample-{number:02d}"
    finally:
        held.unlink()


def _write(name: Path, clip, fps: float, a: Namespace) -> Path:
    from ..data import write_image, write_video

    if len(clip) == 1:
        return write_image(name.with_suffix(".png"), clip[0])
    if a.png:
        for number, picture in enumerate(clip):
            write_image(name / f"{number:04d}.png", picture)
        return name
    # Given frames come out as they went in: the usual compression would cost them 3 levels of 255, and a loop its join.
    prompted = bool(a.image or a.clip or a.to or a.loop)
    return write_video(name.with_suffix(".gif" if a.gif else ".mp4"), clip, fps, crf=1 if prompted else 17)
