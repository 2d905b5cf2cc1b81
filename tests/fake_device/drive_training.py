"""Steps of training and of generation on the fake device: they wait for the loss that they read, and for nothing else."""

from collections import Counter

import pytest
import torch
from training_checks import latent_clips, tiny_dit, tiny_vae, write_media

from sora_fast.diffusion import DDPM, FlowMatching, LearnedVariance, generate, place
from sora_fast.models import ByteTextEncoder, DiT
from sora_fast.training import throughput
from sora_fast.training.dit import load_run
from sora_fast.training.loop import Trainer

from . import waits


@pytest.fixture
def steps(monkeypatch):
    """The waits of each step of a run."""
    found, one_step = [], Trainer._one_step

    def watched(*arguments):
        with waits.seen() as of_step:
            result = one_step(*arguments)
        found.append([wait for wait in of_step if (wait.file, wait.function) != ("sora_fast/training/loop.py", "_one_step")])
        return result

    monkeypatch.setattr(Trainer, "_one_step", watched)
    monkeypatch.setitem(throughput.SIDE, "cuda", 64)
    return found


def no_hidden(steps):
    hidden = Counter(str(wait) for of_step in steps for wait in of_step)
    assert len(steps) == 3 and not hidden, "\n".join(f"{count} x {wait}" for wait, count in hidden.items())


@pytest.mark.parametrize("settings", [
    dict(precision="bf16", budget=0), dict(precision="fp32", budget=256, accumulate=2, checkpointing=True),
    dict(precision="fp32", budget=256, objective="ddpm", learn_sigma=True)],
    ids=["bf16, budget found", "two packs, checkpointing", "learned variance"])
def test_steps_of_a_dit(tmp_path, steps, settings):
    trainer = tiny_dit(tmp_path, latent_clips(), device="cuda", steps=3, heldout=0.25, heldout_every=2, save_every=2,
                       **settings)
    trainer.run()
    assert all(p.is_cuda for p in trainer.parameters.values())
    no_hidden(steps)
    assert all(p.is_cuda for p in load_run(str(tmp_path), "cuda").dit.parameters())


def conditions(text):
    return lambda null: dict(text=text([""] * 2 if null else ["a clip", "an image"]))


@pytest.mark.parametrize("default", ["cpu", "cuda"])
@pytest.mark.parametrize("objective", [FlowMatching(), FlowMatching("x0"), DDPM(), LearnedVariance()],
                         ids=["flow", "flow, x0", "ddpm", "learned variance"])
def test_generation(objective, default):
    """The numbers of a CPU, and steps that wait for nothing: more of them make no more waits.

    ``default``: of torch.set_default_device.
    """
    torch.manual_seed(0)
    text = ByteTextEncoder(128)
    dit = DiT.preset("tiny", in_channels=4, text_width=128, learn_sigma=isinstance(objective, LearnedVariance)).eval()
    torch.nn.init.normal_(dit.final_layer.linear.weight, std=0.02)  # it begins at 0
    sizes = [(4, 3, 8, 8), (4, 1, 8, 8)]
    first = torch.randn(4, 1, 8, 8)

    def run(device, count):
        made = generate(dit.to(device), objective, sizes, patch=dit.config.patch, steps=count, guidance=3.0,
                        condition=conditions(text.to(device)), known=[place(sizes[0], start=first.to(device)), None],
                        generator=torch.Generator().manual_seed(1), device=device)
        assert all(clip.device.type == device for clip in made)
        return [clip.cpu() for clip in made]

    wanted = run("cpu", 2)
    found = {}
    for count in (2, 4):
        with waits.seen() as found[count], torch.device(default):
            got = run("cuda", count)
        if count == 2:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    more = Counter(map(str, found[4])) - Counter(map(str, found[2]))
    assert not more, "\n".join(f"{count} x {wait}" for wait, count in more.items())


@pytest.mark.parametrize("settings", [{}, dict(regularisation="vq", codes=16), dict(adversarial=0.5, adversarial_start=0)],
                         ids=["kl", "codes", "adversarial"])
def test_steps_of_a_vae(tmp_path, steps, settings):
    trainer = tiny_vae(tmp_path / "run", write_media(tmp_path), device="cuda", steps=3, **settings)
    trainer.run()
    assert all(p.is_cuda for p in trainer.parameters.values())
    no_hidden(steps)
