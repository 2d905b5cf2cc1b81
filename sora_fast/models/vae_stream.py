"""Streams of a causal video autoencoder: how long a chunk is, steady chunks as one CUDA graph, whole clips in place.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from .. import checks
from ..nn import StreamState

# Latent frames. At 16 frames the two cached before a 3x3x3 convolution are an eighth more to read, at 4 they are a half;
# beyond that a chunk gains little and takes its memory all the same.
LONGEST_CHUNK = 4
# Steady chunks in a row before one is captured: a capture takes about a chunk's time, in which the GPU waits, so that a
# clip of a few chunks would lose by it.
REPEATS = 4


def bytes_per_latent_frame(config, height: int, width: int, dtype: torch.dtype) -> int:
    """Memory that each latent frame of a chunk takes at the peak of encoding or decoding one clip.

    At its widest level a residual block holds four tensors in ``dtype`` (its input, the activation, that with its past
    before it, the output) and its norm four more in float32. Weights and the stream's state come on top, whatever the
    chunk.

    Args:
        config: a VAEConfig. height, width: of the video, in pixels.
    """
    elements, area = 0, config.time_factor * height * width // config.patch**2  # pixels of a latent frame at this level
    for channels, (space, time) in zip(config.widths, (*config.resamples, (False, False)), strict=True):
        elements = max(elements, channels * area)
        area //= (4 if space else 1) * (2 if time else 1)
    return elements * 4 * (dtype.itemsize + torch.promote_types(dtype, torch.float32).itemsize)


def free_bytes(device: torch.device) -> int:
    """What PyTorch could still allocate on a CUDA device, its own idle blocks included."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def chunk_length(config, clip, scale: int) -> int:
    """Latent frames per chunk of ``clip``, whose pixels are ``scale`` of the video's: half of the free memory's worth.

    On a CPU 1: longer chunks take more memory there and no less time (17 frames of 64 x 96, width 32: 0.67 s either way).
    """
    if not isinstance(clip, torch.Tensor) or clip.dim() != 5 or clip.device.type != "cuda":
        return 1
    batch, height, width = clip.shape[0], scale * clip.shape[3], scale * clip.shape[4]
    needed = max(1, batch * bytes_per_latent_frame(config, height, width, clip.dtype))
    return max(1, min(LONGEST_CHUNK, free_bytes(clip.device) // 2 // needed))


# ------------------------------------------------------------------------------------------------ CUDA graph
def cuda_graph(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """``(replay, output)``: ``run`` as a CUDA graph, not yet run; each replay overwrites ``output``."""
    graph = torch.cuda.CUDAGraph()
    # a stream of this device, where the default one may be another's; other threads, such as loaders, may go on meanwhile;
    # a capture that fails leaves its stream the current one, so that one is put back from outside
    with (torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)),
          torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")):
        output = run()
    return graph.replay, output


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class CapturedStream:
    """``step(chunk)`` over the chunks of one stream, whose past is in ``state``; steady chunks replay one graph.

    A chunk is steady if the one before it had its shape and left the state as it was: every tensor at its address, every
    number unchanged. After REPEATS of one shape that shape is captured; everything else runs as it is, so one set of
    buffers serves the stream. Not under autocast, whose casts of weights live only as long as its context. Where a capture
    fails, as by a hook of the user's that waits for the GPU, the stream goes on without one and says so.

    ``capture(run, device)`` gives ``(replay, output)``, as ``cuda_graph`` does.
    """

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor], state: StreamState, capture):
        self.step, self.state, self.capture = step, state, capture
        self.key = self.replay = self.input = self.output = None
        self.repeats, self.failed = 0, False

    def __call__(self, chunk: torch.Tensor) -> torch.Tensor:
        """What ``step`` gives. ``output`` itself where it came from the graph: the next call overwrites it."""
        if self.failed or torch.is_autocast_enabled(chunk.device.type):
            return self.step(chunk)
        key = (chunk.shape, chunk.dtype, chunk.device, self.state.layout())
        if self.replay is None:
            self.key, self.repeats = key, self.repeats + 1 if key == self.key else 0
            if self.repeats < REPEATS:
                return self.step(chunk)
            self.input, past = chunk.clone(), self.state.held()
            try:
                self.replay, self.output = self.capture(lambda: self.step(self.input), chunk.device)
            except RuntimeError as error:
                self.state.put_back(past)  # a capture runs nothing: what the tensors hold is as it was
                self.failed, self.input = True, None
                logging.getLogger("sora_fast").warning("a stream goes on without a CUDA graph, slower: its capture failed "
                                                       "(%s)", " ".join(str(error).split())[:400])
                return self.step(chunk)
        elif key != self.key:
            return self.step(chunk)
        else:
            self.input.copy_(chunk)
        self.replay()
        return self.output


# ------------------------------------------------------------------------------------------------ streams and clips
class Streaming(nn.Module):
    """encode_stream, decode_stream, encode_clip and decode_clip of a VideoVAE, by its ``moments`` and ``decode``.

    All of them without gradients (``moments`` and ``decode`` with a StreamState have one) and in memory that does not grow
    with the length.
    """

    @torch.no_grad()
    def encode_stream(self, video: torch.Tensor | Iterable[torch.Tensor], *, chunk: int | None = None,
                      graph: bool = True) -> Iterator[torch.Tensor]:
        """Latents of ``video`` (one tensor, or its chunks of any lengths) as they come, posterior means.

        Args:
            chunk: frames per step where ``video`` is one tensor. None: the first alone, then as many of time_factor as fit
                into half of the GPU's free memory, up to 16; on a CPU time_factor.
            graph: on CUDA, chunks of one shape run as one CUDA graph once a few have passed.

        Yields:
            (B, C, t_i, h, w), t_i > 0; together what ``encode`` gives.
        """
        yield from self._encoded(video, chunk, graph, own=True)

    @torch.no_grad()
    def decode_stream(self, latents: torch.Tensor | Iterable[torch.Tensor], *, chunk: int | None = None,
                      graph: bool = True) -> Iterator[torch.Tensor]:
        """Pixels of ``latents`` (one tensor, or its chunks of any lengths) as they come.

        Args:
            chunk: latent frames per step where ``latents`` is one tensor. None: as many as fit into half of the GPU's free
                memory, up to 4; on a CPU one.
            graph: on CUDA, chunks of one shape run as one CUDA graph once a few have passed.

        Yields:
            (B, 3, T_i, H, W); together what ``decode`` gives; frames given out never change.
        """
        yield from self._decoded(latents, chunk, graph, own=True)

    @torch.no_grad()
    def encode_clip(self, video: torch.Tensor, *, chunk: int | None = None, out: torch.Tensor | None = None,
                    progress: bool = False, graph: bool = True) -> torch.Tensor:
        """What ``encode`` gives, in the memory of one chunk and of the result, which is allocated once.

        Args:
            video: (B, 3, T, H, W). chunk, graph: as in ``encode_stream``.
            out: (B, C, t, h, w) to write into, of any floating dtype and on any device.
            progress: show a bar, where tqdm is installed.
        """
        self._check_video(video)
        shape = (video.shape[0], *self.latent_shape(*video.shape[2:]))
        return _collect("encode_clip", self._encoded(video, chunk, graph), shape, out, progress)

    @torch.no_grad()
    def decode_clip(self, latents: torch.Tensor, *, chunk: int | None = None, out: torch.Tensor | None = None,
                    progress: bool = False, graph: bool = True) -> torch.Tensor:
        """What ``decode`` gives, in the memory of one chunk and of the result, which is allocated once.

        Args:
            latents: (B, C, t, h, w). chunk, graph: as in ``decode_stream``.
            out: (B, 3, T, H, W) to write into, of any floating dtype and on any device: pixels of a long clip may go to
                the CPU as they come.
            progress: show a bar, where tqdm is installed.
        """
        self._check_latents(latents)
        c = self.config
        batch, _, t, h, w = latents.shape
        shape = (batch, c.in_channels, 1 + (t - 1) * c.time_factor, h * c.space_factor, w * c.space_factor)
        return _collect("decode_clip", self._decoded(latents, chunk, graph), shape, out, progress)

    def _encoded(self, video, chunk, graph, own=False):
        """Latents chunk by chunk, of which the next may overwrite the last unless it is to be the caller's ``own``."""
        first = 1 if chunk is None else chunk
        size = self.config.time_factor * chunk_length(self.config, video, 1) if chunk is None else chunk

        def counted():
            frames = 0
            for part in _chunks("encode_stream", video, first, size):
                self._check_video(part, length=False)
                frames += part.shape[2]
                yield part
            self._check_length(frames)

        for part in _run(lambda part, state: self._latents(self.moments(part, state)), counted(), graph, own):
            if part.shape[2]:
                yield part

    def _decoded(self, latents, chunk, graph, own=False):
        size = chunk_length(self.config, latents, self.config.space_factor) if chunk is None else chunk
        yield from _run(self.decode, _chunks("decode_stream", latents, size, size), graph, own)


def _chunks(name: str, clip, first: int, size: int) -> Iterator[torch.Tensor]:
    checks.whole(f"VideoVAE.{name}", "chunk", size)
    if size < 1:
        raise ValueError(f"VideoVAE.{name}: expected chunk of 1 or more, got {size}; pass the frames per step")
    if not isinstance(clip, Iterable):
        raise TypeError(f"VideoVAE.{name}: expected one tensor or its chunks, got {checks.came(clip)}; pass (B, C, T, H, W)")
    if isinstance(clip, torch.Tensor):
        clip = (clip[:, :, :first], *clip[:, :, first:].split(size, dim=2))
    sizes = None  # of the stream: what its state holds has them too
    for part in clip:
        checks.tensor(f"VideoVAE.{name}", "every chunk", part)
        if part.dim() == 5:
            sizes = sizes or (part.shape[0], *part.shape[3:])
            if sizes != (part.shape[0], *part.shape[3:]):
                batch, height, width = sizes
                raise ValueError(f"VideoVAE.{name}: expected chunks of one stream to be alike in all but their frames, "
                                 f"({batch}, C, T, {height}, {width}), got {tuple(part.shape)}; start a new stream")
        if part.dim() != 5 or part.shape[2]:  # a chunk without frames changes nothing; a wrong shape is told later
            yield part


def _run(step, parts: Iterable[torch.Tensor], graph: bool, own: bool) -> Iterator[torch.Tensor]:
    """``step`` over ``parts`` as they come, with a state of their own."""
    state, run = StreamState(), None
    plain = lambda part: step(part, state)
    for part in parts:
        if run is None:
            run = CapturedStream(plain, state, cuda_graph) if graph and can_capture(part.device) else plain
        y = run(part)
        yield y.clone() if own and run is not plain and y is run.output else y


def _collect(name: str, parts, shape, out, progress: bool) -> torch.Tensor:
    if out is not None:
        checks.tensor(f"VideoVAE.{name}", "out", out)
    if out is not None and out.shape != shape:
        raise ValueError(f"VideoVAE.{name}: expected out of {tuple(shape)}, got {tuple(out.shape)}; pass one of this shape, "
                         f"or none")
    done = 0
    with _bar(name, shape[2], progress) as bar:
        for part in parts:
            out = part.new_empty(shape) if out is None else out
            out[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
            if bar is not None:
                bar.update(part.shape[2])
    return out


def _bar(name: str, frames: int, show: bool):
    """A bar of frames, or a context of None where none is asked for or tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=frames, desc=name.partition("_")[0], unit="frame") if show else nullcontext()
