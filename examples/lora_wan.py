"""LoRA (peft) on an accelerated Wan transformer: adapters train, the rest keeps its weights, `state_dict` keeps its keys.

    python examples/lora_wan.py                                      # tiny, random weights: seconds on a CPU
    python examples/lora_wan.py path/to/Wan2.1-T2V-1.3B-Diffusers
"""

import argparse

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

import sora_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="folder of a Wan 2.1 pipeline (default: a tiny model)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="out/lora")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model:
        model = WanTransformer3DModel.from_pretrained(arguments.model, subfolder="transformer")
    else:
        model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, text_dim=64, freq_dim=64, ffn_dim=128,
                                      num_layers=2)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    print(sora_fast.accelerate(model))
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    print(f"{sum(map(torch.numel, trained)):,} weights of {sum(map(torch.numel, model.parameters())):,} are trained")

    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    clean = torch.randn(1, 16, 5, 8, 12, device=model.device)              # your latents: (B, 16, T, H, W)
    text = torch.randn(1, 32, model.config.text_dim, device=model.device)  # your text encoder's output
    for step in range(arguments.steps):
        share, noise = torch.rand(1, device=model.device), torch.randn_like(clean)
        velocity = model(torch.lerp(clean, noise, share), 1000 * share, text, return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    model.save_lora_adapter(arguments.out)
    print("wrote", arguments.out)


if __name__ == "__main__":
    main()
