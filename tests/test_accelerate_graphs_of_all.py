"""One graph, and recomputation, of the accelerated models that CI leaves out."""

import pytest
import test_accelerate_fsdp
import test_accelerate_graphs as graphs
import test_accelerate_transformers as transformers
import torch

pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", ["2.2", "qwen"])
def test_it_compiles_in_one_graph(name):
    graphs.test_it_compiles_in_one_graph(name)


@pytest.mark.parametrize("name", [
    name for name in transformers.MODELS if name not in ("wan", "hunyuan", "cogvideox 5b", "dit")])
def test_gradient_checkpointing_and_one_graph(name):
    graphs.test_gradient_checkpointing_and_one_graph(name)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_diffusers_attention_backend_of_a_plain_model(kind):
    graphs.test_diffusers_attention_backend(kind, fast=False)


def test_gradient_checkpointing_and_one_graph_of_cogvideox_s_vae():
    graphs.test_gradient_checkpointing_and_one_graph_of_a_vae("cogvideox")


def test_fsdp2_around_an_accelerated_model(tmp_path):
    test_accelerate_fsdp.test_fsdp2_on_two_processes_gives_the_single_process_s_loss("before", tmp_path)


def test_a_compiled_decoder_takes_chunks_of_any_size():
    """``vae.decoder.compile()`` of an accelerated model, as pipelines do, in sizes that are symbols."""
    vae = graphs.wan.make("2.1")
    fast, _ = graphs.checks.accelerated(vae)
    torch._dynamo.reset()
    fast.decoder.compile(backend="eager", dynamic=True)
    for frames, height, width in ((2, 2, 3), (1, 4, 2)):
        z = graphs.draw(1, 4, frames, height, width).float()
        with torch.no_grad():
            wanted, got = vae.decode(z).sample, fast.decode(z).sample
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_an_export_of_any_height():
    """torch.export of an accelerated encoder whose height is not fixed."""
    fast, _ = graphs.checks.accelerated(graphs.wan.make("2.1"))

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = fast

        def forward(self, video):
            return self.vae.encode(video, return_dict=False)[0].parameters

    model, video = Encoder().eval(), graphs.draw(1, 3, 1, 32, 16).float()
    height = torch.export.Dim("height", min=2, max=64)
    exported = torch.export.export(model, (video,), dynamic_shapes=({3: 8 * height},)).module()
    taller = graphs.draw(1, 3, 1, 48, 16).float()
    with torch.no_grad():
        assert (exported(taller) - model(taller)).abs().max() <= 1e-5 * model(taller).abs().max()
