"""Wan's text-to-video pipeline of diffusers, plain and accelerated: the same video to rounding.

    python examples/accelerate_wan_pipeline.py                       # tiny, random weights: seconds on a CPU
    python examples/accelerate_wan_pipeline.py path/to/Wan2.1-T2V-1.3B-Diffusers
"""

import argparse

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

import sora_fast


def tiny_pipeline() -> WanPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, text_dim=64, freq_dim=64, ffn_dim=128,
                                        num_layers=2)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer,
                       scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="folder of a Wan 2.1 pipeline (default: a tiny one)")
    parser.add_argument("--prompt", default="a rabbit in a meadow")
    arguments = parser.parse_args()
    if arguments.model:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = WanPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16).to(device)
        given = dict(prompt=arguments.prompt, height=480, width=832, num_frames=81)
    else:
        pipe = tiny_pipeline()
        text = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
        given = dict(prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), height=32, width=48, num_frames=9,
                     num_inference_steps=4)

    video = lambda: pipe(**given, output_type="pt", generator=torch.Generator().manual_seed(2)).frames
    plain = video()
    print(sora_fast.accelerate(pipe.vae))
    print(sora_fast.accelerate(pipe.transformer))
    fast = video()
    print(f"video {tuple(fast.shape)}, largest difference of a pixel in [0, 1]: {(fast - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
