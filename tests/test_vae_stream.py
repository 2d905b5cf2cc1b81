"""Streams of a VideoVAE: state in place, steady chunks as one graph, chunk length from memory, whole clips.

No GPU is needed: a stand-in takes the place of the CUDA graph, and fake tensors say that they are on one.
"""

import inspect
import sys
import types
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sora_fast.models import VideoVAE, vae_stream
from sora_fast.models.vae import PRESETS
from sora_fast.nn import CausalConv3d, StreamState

SMALL = {name: replace(PRESETS[name], width=4, latent_channels=3, latent_mean=None, latent_std=None) for name in PRESETS}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(name="wan2.1", seed=0):
    vae, generator = VideoVAE(SMALL[name]), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in vae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
    return vae


# --------------------------------------------------------------------------------------------- state in place
def layouts(step, parts):
    """The state's layout after each chunk."""
    state = StreamState()
    found = []
    for part in parts:
        step(part, state)
        found.append(state.layout())
    return found


def assert_settles(step, parts):
    """From the fourth chunk on nothing moves: by then every cache holds the two frames before a 3x3x3 convolution."""
    found = layouts(step, parts)
    assert len(found) == 8 and len(found[3]) > 5
    assert all(layout == found[3] for layout in found[3:])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_steady_state_stays_where_it_is(name, size):
    """Addresses and numbers, in both directions; with gradients every chunk has caches of its own, and the check fails."""
    vae = make(name)
    latents = [draw(1, 3, size, 2, 1, seed=n) for n in range(8)]
    video = [draw(1, 3, 4 * size if n else 1, 16, 8, seed=n) for n in range(8)]
    with torch.no_grad():
        assert_settles(vae.decode, latents)
        assert_settles(vae.moments, video)
    with pytest.raises(AssertionError):
        assert_settles(vae.decode, latents)


def test_the_layout_tells_every_change():
    """A tensor that moved or changed its shape, another number, another module."""
    conv, other, state = CausalConv3d(2, 2, 3), CausalConv3d(2, 2, 3), StreamState()
    cache = draw(1, 2, 2, 4, 4)
    seen = []
    for module, value in ((conv, (cache, 0)), (conv, (cache.clone(), 0)), (conv, (cache[:, :, :1], 0)), (conv, (cache, 1)),
                          (other, (cache, 1)), (other, True)):
        state.set(module, value)
        seen.append(state.layout())
    assert len(set(seen)) == len(seen)
    state.set(conv, (cache, 1))
    state.set(other, (cache, 1))
    before = state.layout()
    cache.zero_()
    assert state.layout() == before, "contents do not count"


# --------------------------------------------------------------------------------------------- the graph
class StandIn:
    """The CUDA graph's part: a capture runs nothing, so its effect on the state is undone, and a replay runs it all."""

    def __init__(self, monkeypatch, repeats=1):
        self.captures = self.replays = 0
        monkeypatch.setattr(vae_stream, "REPEATS", repeats)
        stream = vae_stream.CapturedStream

        def made(step, state, capture):
            assert capture is vae_stream.cuda_graph
            return stream(step, state, partial(self.capture, state))
        monkeypatch.setattr(vae_stream, "can_capture", lambda device: True)
        monkeypatch.setattr(vae_stream, "CapturedStream", made)

    def capture(self, state, run, device):
        assert device == torch.device("cpu")
        self.captures += 1
        tensors = list(state.tensors())
        before, layout = [t.clone() for t in tensors], state.layout()
        output = run()
        assert state.layout() == layout, "a graph that moves the state would be replayed with the old addresses"
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        output.fill_(float("nan"))  # what a capture leaves there is nothing to rely on

        def replay():
            self.replays += 1
            output.copy_(run())
        return replay, output


def assert_same(stream, plain, parts):
    """Bit for bit what the same chunks give without a graph; what is out stays as it was; inputs are left alone."""
    given = [part.clone() for part in parts]
    wanted = list(plain(iter(parts)))
    out, seen = [], []
    for part in stream(iter(parts)):
        out.append(part)
        seen.append(part.clone())
    assert len(out) == len(wanted)
    for each in zip(out, seen, wanted, strict=True):
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])
    assert all(torch.equal(a, b) for a, b in zip(parts, given, strict=True))


PLANS = [  # latent frames per chunk, and how many of them are replays
    ((1,) * 8, 4), ((2,) * 7, 4), ((3, 3, 3, 3, 1), 2), ((2, 2, 2, 2, 2, 1), 2), ((2, 2, 2, 2, 1, 2, 2), 3),
    ((1, 2, 1, 2, 1, 2), 0), ((5,), 0), ((4, 4), 0),
]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("plan, replays", PLANS, ids=str)
def test_steady_chunks_are_replayed_in_order(monkeypatch, name, plan, replays):
    vae = make(name)
    latents = list(draw(1, 3, sum(plan), 2, 1).split(plan, dim=2))
    graph = StandIn(monkeypatch)
    assert_same(vae.decode_stream, lambda parts: vae.decode_stream(parts, graph=False), latents)
    assert (graph.captures, graph.replays) == (int(replays > 0), replays)


def test_a_clip_of_a_few_chunks_is_not_worth_a_capture(monkeypatch):
    vae, graph = make(), StandIn(monkeypatch, vae_stream.REPEATS)
    plain = lambda parts: vae.decode_stream(parts, graph=False)
    assert_same(vae.decode_stream, plain, list(draw(1, 3, 21, 2, 1).split(4, dim=2)))  # 81 frames, as Wan 2.1 makes them
    assert graph.captures == 0
    assert_same(vae.decode_stream, plain, list(draw(1, 3, 36, 2, 1).split(4, dim=2)))
    assert (graph.captures, graph.replays) == (1, 4)  # the first chunk, one with full caches, REPEATS - 1 more; then replays


def test_encoding_replays_too(monkeypatch):
    vae, video = make("tiny"), draw(1, 3, 25, 8, 8)
    graph = StandIn(monkeypatch)
    assert_same(vae.encode_stream, lambda parts: vae.encode_stream(parts, graph=False),
                list(video.split([1] + 6 * [4], dim=2)))
    assert (graph.captures, graph.replays) == (1, 4)
    # ragged chunks, some of which give no latent at all, never repeat their state
    assert_same(vae.encode_stream, lambda parts: vae.encode_stream(parts, graph=False),
                list(video.split([3, 2, 7, 1, 1, 5, 6], dim=2)))
    assert graph.captures == 1


def test_two_streams_of_one_model_have_a_graph_each(monkeypatch):
    vae = make()
    clips = [draw(1, 3, 8, 2, 1, seed=n) for n in (1, 2)]
    wanted = [list(vae.decode_stream(clip)) for clip in clips]
    graph = StandIn(monkeypatch)
    pairs = list(zip(*(vae.decode_stream(clip) for clip in clips), strict=True))
    assert (graph.captures, graph.replays) == (2, 8)
    for got, want in zip(zip(*pairs, strict=True), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_graph_whose_output_is_another_fails_the_check(monkeypatch):
    """Planted: what a replay computes does not get where it is read."""
    vae, latents = make(), list(draw(1, 3, 8, 2, 1).split(1, dim=2))
    made = []

    class Forgetful(StandIn):
        def capture(self, state, run, device):
            made.append(super().capture(state, run, device)[1])
            return lambda: made[0].copy_(run()), torch.zeros_like(made[0])
    Forgetful(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(vae.decode_stream, lambda parts: vae.decode_stream(parts, graph=False), latents)


def test_the_cuda_graph_is_made_as_pytorch_has_it(monkeypatch):
    """The calls alone, with PyTorch's own signatures: a capture needs a GPU."""
    said = []
    signature, stream, device = inspect.signature(torch.cuda.graph), object(), torch.device("cuda", 1)

    class Graph:
        def replay(self):
            said.append("replay")

    def capture(*arguments, **options):
        said.append(signature.bind(*arguments, **options).arguments)
        return nullcontext()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: stream if where == device else None)
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext(said.append(where)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: where)
    monkeypatch.setattr(torch.cuda, "stream", lambda current: nullcontext() if current == device else None)
    replay, output = vae_stream.cuda_graph(lambda: said.append("run") or "output", device)
    assert said[0] == device and said[2:] == ["run"] and output == "output"
    graph = said[1].pop("cuda_graph")
    assert isinstance(graph, Graph) and said[1] == dict(stream=stream, capture_error_mode="thread_local")
    replay()
    assert said[3:] == ["replay"]


def test_a_failed_capture_leaves_the_state_as_it_was(caplog):
    """Planted: a step that is broken off between what it sets; from then on it runs as it is, and is captured no more."""
    state, module, total, captures = StreamState(), torch.nn.Identity(), torch.zeros(1), []

    def step(chunk):
        held = state.get(module, total)
        state.set(module, None)
        if len(captures) == 1 and not captures[0]:
            captures[0] = True
            raise RuntimeError("operation not permitted")
        state.set(module, held)
        return (held + chunk.sum()).clone()

    stream = vae_stream.CapturedStream(step, state, lambda run, device: (captures.append(False), run()))
    given = [torch.full((1,), float(n)) for n in range(2 * vae_stream.REPEATS + 2)]
    assert [stream(chunk) for chunk in given] == given and len(captures) == 1
    assert state.get(module) is total and "its capture failed (operation not permitted)" in caplog.text


def test_no_graph_where_none_is_wanted_or_possible(monkeypatch):
    vae, latents = make(), draw(1, 3, 8, 2, 1)
    graph = StandIn(monkeypatch)
    list(vae.decode_stream(latents, graph=False))
    vae.decode_clip(latents, graph=False)
    with torch.autocast("cpu", torch.bfloat16):  # its casts of weights may be gone at the next chunk
        assert next(iter(vae.decode_stream(latents))).dtype == torch.bfloat16
        list(vae.decode_stream(latents))
    assert graph.captures == 0
    monkeypatch.undo()
    assert not vae_stream.can_capture(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not vae_stream.can_capture(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert vae_stream.can_capture(torch.device("cuda"))


def test_inference_mode_replays_too(monkeypatch):
    vae, latents = make(), draw(1, 3, 8, 2, 1)
    wanted = list(vae.decode_stream(latents))
    graph = StandIn(monkeypatch)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(vae.decode_stream(latents), wanted, strict=True))
    assert graph.captures == 1


# --------------------------------------------------------------------------------------------- whole clips
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_a_clip_in_place_is_the_whole_at_once(monkeypatch, name, chunk, captured):
    if captured:
        StandIn(monkeypatch)
    vae, video = make(name), draw(2, 3, 29, 16, 8)
    with torch.no_grad():
        z, pixels = vae.encode(video), vae.decode(vae.encode(video))
    got = vae.encode_clip(video, chunk=chunk)
    torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-4 * z.abs().max().item())
    got = vae.decode_clip(z, chunk=chunk)
    torch.testing.assert_close(got, pixels, rtol=1e-4, atol=1e-4 * pixels.abs().max().item())
    assert got.is_contiguous() and not got.requires_grad


def test_a_clip_goes_where_it_is_told():
    vae, z = make("tiny"), draw(1, 3, 4, 1, 2)
    whole = torch.full((1, 3, 20, 8, 16), float("nan"), dtype=torch.float64)
    out = whole[:, :, 3:16]
    assert vae.decode_clip(z, out=out) is out
    assert torch.equal(out.float(), torch.cat(list(vae.decode_stream(z)), 2)) and whole.isnan().sum() == 7 * 3 * 8 * 16
    latents = torch.empty(1, 3, 4, 1, 2, dtype=torch.bfloat16)
    assert vae.encode_clip(out.float(), out=latents) is latents and latents.isfinite().all()
    with pytest.raises(ValueError, match=r"decode_clip: expected out of \(1, 3, 13, 8, 16\), got \(1, 3, 13, 8, 8\); pass"):
        vae.decode_clip(z, out=out[..., :8])
    with pytest.raises(ValueError, match="the nearest lengths are 13 or 17"):
        vae.encode_clip(draw(1, 3, 14, 8, 8))
    with pytest.raises(ValueError, match="pass what encode gives"):
        vae.decode_clip(draw(1, 4, 2, 1, 1))
    with pytest.raises(ValueError, match="chunk of 1 or more, got 0"):
        vae.decode_clip(z, chunk=0)


def test_progress_counts_frames_and_needs_no_tqdm(monkeypatch):
    vae, z, bars = make("tiny"), draw(1, 3, 4, 1, 2), []

    class Bar:
        def __init__(self, total, desc, unit):
            self.said, self.seen, self.open = (total, desc, unit), [], True
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.open = False

        def update(self, frames):
            self.seen.append(frames)

    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    wanted = vae.decode_clip(z)
    assert not bars, "no bar unless asked"
    assert torch.equal(vae.decode_clip(z, progress=True), wanted)
    video = vae.encode_clip(wanted, progress=True)
    assert [bar.said for bar in bars] == [(13, "decode", "frame"), (4, "encode", "frame")]
    assert bars[0].seen == [1, 4, 4, 4] and bars[1].seen == [1, 1, 1, 1] and not any(bar.open for bar in bars)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # as if it were not installed
    assert torch.equal(vae.encode_clip(wanted, progress=True), video)


# --------------------------------------------------------------------------------------------- chunk length
class Live(TorchDispatchMode):
    """Bytes of all tensors alive that were made inside, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key):
        self.now -= self.sizes.pop(key)


def peak(vae, side, chunk, height, width, dtype):
    if side == "decode":
        stream = vae.decode_stream([torch.zeros(1, 16, chunk, height // 8, width // 8, dtype=dtype) for _ in range(3)])
    else:
        stream = vae.encode_stream([torch.zeros(1, 3, 4 * chunk - 3 * (n == 0), height, width, dtype=dtype)
                                    for n in range(3)])
    with Live() as live:
        for _ in stream:
            pass
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["decode", "encode"])
@pytest.mark.parametrize("name", SMALL)
def test_the_memory_of_a_chunk_is_foretold(name, side, dtype):
    """Three latent frames more per chunk take 0.55 to 1.05 of what is foretold; a forgotten level would halve that."""
    with torch.device("meta"):  # tensors without numbers have all their sizes
        vae = VideoVAE.preset(name, width=16).to(dtype)
        more = peak(vae, side, 4, 64, 96, dtype) - peak(vae, side, 1, 64, 96, dtype)
    foretold = 3 * vae_stream.bytes_per_latent_frame(vae.config, 64, 96, dtype)
    assert 0.55 * foretold <= more <= 1.05 * foretold, more / foretold


def test_bytes_per_latent_frame_by_hand():
    """Wan 2.1 at 720p: 96 channels of 4 frames of 720x1280, 4 x 2 bytes and 4 x 4; where a middle level is wider, that."""
    assert vae_stream.bytes_per_latent_frame(PRESETS["wan2.1"], 720, 1280, torch.bfloat16) == 96 * 4 * 720 * 1280 * 24
    wide = replace(PRESETS["wan2.1"], multipliers=(1, 8, 8, 8))
    assert vae_stream.bytes_per_latent_frame(wide, 16, 16, torch.float32) == 8 * 96 * 4 * 8 * 8 * 32
    assert vae_stream.bytes_per_latent_frame(PRESETS["tiny"], 16, 16, torch.float64) == 32 * 4 * 8 * 8 * 64


def test_the_chunk_comes_from_free_memory(monkeypatch):
    config, gb = PRESETS["wan2.1"], 10**9
    one = vae_stream.bytes_per_latent_frame(config, 720, 1280, torch.bfloat16)  # 8.5 GB
    free = {}
    monkeypatch.setattr(vae_stream, "free_bytes", lambda device: free[device])
    with FakeTensorMode():
        latents = torch.empty(1, 16, 21, 90, 160, dtype=torch.bfloat16, device="cuda")
        video = torch.empty(1, 3, 81, 720, 1280, dtype=torch.bfloat16, device="cuda")
        double = torch.empty(2, 3, 81, 720, 1280, dtype=torch.bfloat16, device="cuda")
        for available, wanted, halved in ((140 * gb, 4, 4), (8 * one, 4, 2), (6 * one - 1, 2, 1), (4 * one, 2, 1),
                                          (3 * gb, 1, 1), (0, 1, 1)):
            free[latents.device] = available
            assert vae_stream.chunk_length(config, latents, 8) == vae_stream.chunk_length(config, video, 1) == wanted
            assert vae_stream.chunk_length(config, double, 1) == halved
    assert vae_stream.chunk_length(config, torch.empty(1, 16, 21, 90, 160), 8) == 1


def test_idle_blocks_of_pytorch_are_free(monkeypatch):
    for name, value in dict(mem_get_info=(5, 100), memory_reserved=40, memory_allocated=30).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert vae_stream.free_bytes(torch.device("cuda")) == 15


@pytest.mark.parametrize("length, decoded, encoded", [(1, [1] * 4, [1] * 4), (2, [5, 8], [1, 2, 1]), (4, [13], [1, 3])])
def test_the_chunks_of_a_tensor(monkeypatch, length, decoded, encoded):
    """Decoding: as many latents each; encoding: the first frame alone, so that all later chunks have one shape."""
    monkeypatch.setattr(vae_stream, "chunk_length", lambda config, clip, scale: length)
    vae, z = make("tiny"), draw(1, 3, 4, 1, 2)
    frames = list(vae.decode_stream(z))
    assert [part.shape[2] for part in frames] == [1, 4, 4, 4] if length == 1 else decoded
    assert [part.shape[2] for part in vae.encode_stream(torch.cat(frames, 2))] == encoded
