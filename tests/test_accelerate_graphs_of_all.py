"""One graph, and recomputation, of the accelerated models that CI leaves out."""

import pytest
import test_accelerate_fsdp
import test_accelerate_graphs as graphs
import test_accelerate_transformers as transformers

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
