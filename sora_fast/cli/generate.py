"""sora-fast generate. T frames, H lines, W columns; clips are uint8 (T, H, W, 3)."""

import math
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..data import MediaItem, probe, read_clip, to_uint8, write_image, write_video
from ..data.frames import bar
from ..diffusion import MediaPrompt, generate
from ..files import check_folder
from ..models import VideoVAE
from ..training.dit import Generator, load_run, policy_for
from ..training.loop import pick_device
from ..training.progress import Progress

FPS = 12.0  # of the files, where neither the run nor a given clip says


def parse_size(text: str, vae: VideoVAE, patch) -> tuple[int, int, int]:
    """``TxHxW`` in pixels, checked against what the VAE and the patch take."""
    try:
        frames, height, width = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--size: expected TxHxW such as 9x96x160, got {text!r}; give frames, lines, columns") from None
    f, step = vae.config.space_factor, vae.config.time_factor
    for name, size, unit, first in (("frames", frames, step * patch[0], 1), ("lines", height, f * patch[1], 0),
                                    ("columns", width, f * patch[2], 0)):
        if size < 1 or (size - first) % unit:
            low = (max(size, 1) - first) // unit * unit + first
            near = f"{low} or {low + unit}" if low > 0 else f"{low + unit}"
            raise ValueError(f"--size: expected {name} as {f'1 + {unit} k' if first else f'a multiple of {unit}'}, got "
                             f"{size}; the nearest are {near}")
    return frames, height, width


def sample(run: Generator, prompts: Sequence[str], sizes: Sequence[tuple[int, int, int]], *, steps: int, guidance: float,
           seed: int, media: Sequence[MediaPrompt | None] | None = None, decoded: bool = False) -> list[torch.Tensor]:
    """Clips uint8 (T, H, W, 3) for ``prompts`` at ``sizes`` (T, H, W) in pixels, all denoised in one pack.

    Args:
        seed: of the first sample's noise; the next ones' are the next numbers, so that none depends on the others.
        media: given frames of each sample, or None.
        decoded: leave the decoder's copy of given frames where it is, in place of the given pixels.
    """
    device, step = next(run.dit.parameters()).device, run.vae.config.time_factor
    media = [None] * len(prompts) if media is None else media

    def condition(null: bool) -> dict:
        with torch.no_grad():
            return dict(text=run.text_encoder([""] * len(prompts) if null else list(prompts)))

    known = [given and given.known(run.vae, size[0]) for given, size in zip(media, sizes, strict=True)]
    shapes = [k.latents.shape if k else run.vae.latent_shape(*size) for k, size in zip(known, sizes, strict=True)]
    shown = Progress("denoise", steps, 0)
    latents = generate(run.dit, run.objective, shapes, patch=run.dit.config.patch, steps=steps, guidance=guidance,
                       condition=condition, known=known, device=device, progress=lambda step, _: shown.update(step, ""),
                       generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))])
    shown.close()
    clips = []
    with torch.no_grad():
        for latent, given, (frames, _, _) in zip(bar(latents, "decode"), media, sizes, strict=True):
            clip = torch.cat([to_uint8(part[0].cpu()) for part in run.vae.decode_stream(latent[None])])
            clips.append(given.finish(clip, step) if given and not decoded else clip[:frames])
    return clips


# ------------------------------------------------------------------------------------------------ given media
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


def open_media(flag: str, file: str) -> MediaItem:
    """The item at ``file``; an image for --image, a clip for --clip."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"generate: expected a file for {flag}, got {file}, which is not there; check the path")
    item = probe(file)
    wanted = {"--image": "image", "--clip": "clip"}.get(flag, item.kind)
    if item.kind != wanted:
        raise ValueError(f"generate: expected {'an image' if wanted == 'image' else 'a clip'} for {flag}, got the "
                         f"{item.kind} {file}; give it as --{item.kind}")
    return item


def _frames(item: MediaItem, fps: float) -> int:
    """How many frames of ``item`` there are at ``fps``."""
    last = item.seconds - 1 / item.fps if item.fps > 0 else 0.0
    return 1 + math.floor(max(last, 0.0) * fps + 1e-6)


def _read(item: MediaItem, count: int, size, fps: float, *, start: float | None, last: bool) -> torch.Tensor:
    """``count`` fitted frames from ``start``, or the last or first ones; as many as there are where there are fewer."""
    have = _frames(item, fps)
    if item.kind == "image" or have == 1:
        return read_clip(item, frames=1, size=size)
    if start is None:
        start = max(have - count, 0) / fps if last else 0.0
    held = have - math.ceil(start * fps - 1e-6)
    if held < 1:
        raise ValueError(f"generate: expected --start within the {item.seconds:.2f} s of {item.path}, got {start:g}; give "
                         f"an earlier one")
    return read_clip(item, frames=min(count, held), start=start, fps=fps, size=size)


def usual_given(t: int, mode: str) -> tuple[int, int]:
    """Latent frames to give at the beginning and at the end of a sample that has ``t``: about half, or a third of each."""
    if mode == "to":  # the first latent frame is one picture: motion shows in two
        return max(1, t // 3) + (t > 3), max(1, t // 3)
    return -(-t // 2), max(1, t // 2)


def media_prompt(a: Namespace, item: MediaItem, other: MediaItem | None, size: tuple[int, int, int], fps: float,
                 step: int) -> MediaPrompt:
    """What the flags ask for, of fitted frames of ``item`` (and ``other`` of --to)."""
    frames, picture = size[0], size[1:]
    t = 1 + (frames - 1) // step
    if a.strength is not None:
        clip = _read(item, frames, picture, fps, start=a.start, last=False)
        if item.kind == "image":
            clip = clip.expand(frames, -1, -1, -1)
        if len(clip) < frames:
            fits = (len(clip) - 1) // step * step + 1
            raise ValueError(f"generate: expected a clip of the {frames} frames of --size at {fps:g} a second, got "
                             f"{len(clip)} in {item.path}; give --size {fits}x{picture[0]}x{picture[1]}, an earlier --start "
                             f"or a higher --fps")
        return MediaPrompt.edit(clip, a.strength)
    mode = "loop" if a.loop else "to" if other else a.extend or "after"
    least = 2 * step + 1 if mode == "to" else step + 1
    if frames < least:
        raise ValueError(f"generate: expected --size of at least {least} frames, so that some are left to generate, got "
                         f"{frames}; raise T, or give --strength to change the given picture")
    begin, end = usual_given(t, mode)
    first, last = a.given or 1 + (begin - 1) * step, a.given or end * step
    read = lambda item, count, last: _read(item, count, picture, fps, start=a.start, last=last)
    if mode == "before":
        clip = read(item, last, False)
        prompt = MediaPrompt.before(clip, step) if len(clip) == 1 or len(clip) >= step else None
    elif mode == "to":
        one, two = read(item, first, True), _read(other, last, picture, fps, start=None, last=False)
        prompt = MediaPrompt.between(one, two, step) if len(two) == 1 or len(two) >= step else None
    else:
        clip = read(item, first, mode == "after")
        prompt = MediaPrompt.loop(clip, step) if mode == "loop" else MediaPrompt.after(clip, step)
    if prompt is None:
        raise ValueError(f"generate: expected at least {step} frames to lead to at {fps:g} a second, got fewer; give a "
                         f"longer clip, --given {step} or more, or an image of it")
    begin, end = prompt.given(step)
    if begin + end >= frames + prompt.cut:
        raise ValueError(f"generate: expected --given to leave some of the {frames} frames of --size to generate, got "
                         f"{begin + end - prompt.cut}; give fewer, or raise T")
    return prompt


def _size_of(item: MediaItem, run: Generator, edit: bool) -> str:
    """--size where none is given: the item fitted as for training, and as long as training's clips unless it is edited."""
    policy = policy_for(run.training, run.vae, run.dit.config.patch)
    seconds, fps = (item.seconds, item.fps) if edit else (1e6, policy.fps or 1.0)
    return "x".join(map(str, policy.fit(item.width, item.height, seconds, fps)))


def _rate(a: Namespace, run: Generator, items: Sequence[MediaItem]) -> float:
    """Frames per second that clips are read and written at: --fps, training's, the clips' own; never above their own."""
    own = [item.fps for item in items if item.kind == "clip" and item.fps > 0]
    return min([a.fps or run.training.fps or (math.inf if own else FPS), *own])


def spread_out(lists: dict[str, list]) -> list[list]:
    """Each flag's values for every sample: given once for all, or once for each."""
    longest = max(lists, key=lambda flag: len(lists[flag]))
    count = len(lists[longest])
    for flag, values in lists.items():
        if len(values) not in (0, 1, count):
            raise ValueError(f"generate: expected one {flag}, or one per {longest} ({count}), got {len(values)}; give as "
                             f"many {flag} as {longest}, or one for all")
    return [(values or [None]) * (count if len(values) < 2 else 1) for values in lists.values()]


# ------------------------------------------------------------------------------------------------ the command
def run(arguments) -> int:
    a = arguments
    check_flags(a)
    check_folder("--out", Path(a.out))
    flag = "--image" if a.image else "--clip"
    lists = {"--prompt": a.prompt, "--size": a.size or [], flag: a.image or a.clip or [], "--to": a.to or []}
    prompts, sizes, files, others = spread_out(lists)
    items = [file and open_media(flag, file) for file in files]
    others = [file and open_media("--to", file) for file in others]
    found = load_run(a.model, pick_device(a.device))
    step, patch = found.vae.config.time_factor, found.dit.config.patch
    sizes = [parse_size(size or _size_of(item, found, a.strength is not None), found.vae, patch)
             for size, item in zip(sizes, items, strict=True)]
    rates = [_rate(a, found, [i for i in pair if i]) for pair in zip(items, others, strict=True)]
    settings = dict(steps=a.steps, guidance=a.guidance, decoded=a.decoded)
    if a.loop and not files[0]:
        media = _first_halves(found, prompts, sizes, seed=a.seed, **settings)
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


def _first_halves(found: Generator, prompts, sizes, *, seed: int, **settings) -> list[MediaPrompt]:
    """The beginnings of loops of which nothing but the caption is given, from the caption."""
    step = found.vae.config.time_factor
    if min(frames for frames, _, _ in sizes) < step + 1:
        raise ValueError(f"generate: expected --size of at least {step + 1} frames for --loop, got "
                         f"{min(frames for frames, _, _ in sizes)}; raise T")
    halves = [(1 + (usual_given(1 + (frames - 1) // step, "loop")[0] - 1) * step, *picture) for frames, *picture in sizes]
    return [MediaPrompt.loop(clip, step) for clip in sample(found, prompts, halves, seed=seed, **settings)]


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


def _write(name: Path, clip: torch.Tensor, fps: float, a: Namespace) -> Path:
    if len(clip) == 1:
        return write_image(name.with_suffix(".png"), clip[0])
    if a.png:
        for number, picture in enumerate(clip):
            write_image(name / f"{number:04d}.png", picture)
        return name
    # Given frames come out as they went in: the usual compression would cost them 3 levels of 255, and a loop its join.
    prompted = bool(a.image or a.clip or a.to or a.loop)
    return write_video(name.with_suffix(".gif" if a.gif else ".mp4"), clip, fps, crf=1 if prompted else 17)
