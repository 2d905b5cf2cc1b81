"""One graph of a whole model: packs of any size, and chunks of a stream."""

import math
from dataclasses import replace

import pytest
import test_dit as of_dit
import test_vae as of_vae
import torch

from sora_fast import Pack
from sora_fast.models import Text
from sora_fast.nn import StreamState

pytestmark = pytest.mark.full


def test_compiled_packs_of_any_size_share_one_graph():
    """fullgraph, flat buffers with tails, sizes and sample counts that differ: no new graph after the second size."""
    graphs = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    config = replace(of_dit.SMALL["tiny"], classes=5, depth=1, fractional_side=4.0)
    model = of_dit.make(config)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    numbers, counts = config.in_channels * math.prod(config.patch), []
    packs = [([(1, 2, 3), (2, 2, 2)], (3, 4)), ([(1, 4, 4), (3, 1, 2), (2, 2, 5)], (2, 5, 7)),
             ([(2, 3, 3), (1, 1, 1), (1, 5, 2), (4, 2, 1)], (6, 2, 3, 9)), ([(7, 3, 2), (1, 2, 8)], (11, 4)),
             ([(1, 16, 1), (1, 16, 2), (1, 1, 16)], (16, 32, 1))]
    for place, (grids, lengths) in enumerate(packs):
        pack = Pack(grids, text_lengths=lengths)
        pack = pack.pad_to(pack.num_tokens + place)
        text = Text(of_dit.draw(sum(lengths), config.text_width), of_dit.draw(len(grids), config.text_width, seed=1),
                    lengths)
        given = dict(timesteps=torch.arange(1.0, 1 + len(grids)) * 90, labels=torch.arange(len(grids)), text=text)
        flat = of_dit.draw(pack.num_tokens * numbers, seed=place)
        leaves = list(model.parameters())
        wanted = model(flat, pack=pack, **given)
        got = compiled(flat, pack=pack, **given)
        of_dit.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(wanted.square().sum(), leaves),
                        strict=True):
            of_dit.assert_close(a, b)
        counts.append(len(graphs))
    assert counts[0] >= 1 and counts[1:] == [counts[1]] * (len(packs) - 1), counts


def test_a_chunk_of_a_stream_compiles_whole():
    vae, z = of_vae.make(of_vae.SMALL["tiny"]), of_vae.draw(1, 3, 5, 1, 2)
    compiled = torch.compile(vae.decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = vae.decode(z)
        of_vae.assert_close(compiled(z), wanted)
        state = StreamState()
        of_vae.assert_close(torch.cat([compiled(part, state) for part in z.split(1, dim=2)], 2), wanted)
