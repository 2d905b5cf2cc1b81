"""Decode latents of any length to an mp4 in the memory of one chunk.

    python examples/streaming_decode.py --latent-frames 33 --out out/long.mp4
    python examples/streaming_decode.py --vae path/to/Wan2.1_VAE.pth --latents latents.pt
"""

import argparse

import torch

from sora_fast.data import to_uint8
from sora_fast.data.writing import write_video
from sora_fast.models import VideoVAE, load_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--vae", help="weights of Wan 2.1's VAE (default: a tiny one, random)")
    parser.add_argument("--latents", help="a tensor (1, C, t, h, w) saved by torch.save (default: random)")
    parser.add_argument("--latent-frames", type=int, default=9)
    parser.add_argument("--out", default="out/streamed.mp4")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vae = load_vae(arguments.vae) if arguments.vae else VideoVAE.preset("tiny")
    vae = vae.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if arguments.latents:
        latents = torch.load(arguments.latents, weights_only=True)
    else:
        latents = torch.randn(1, vae.config.latent_channels, arguments.latent_frames, 8, 12)

    pictures = []                                            # uint8: a hundredth of what the decoder needs for them
    for frames in vae.decode_stream(latents.to(next(vae.parameters()).device)):
        pictures.append(to_uint8(frames[0].cpu()))           # (T, H, W, 3), a few frames at a time
        print(f"{sum(map(len, pictures))} frames")
    print("wrote", write_video(arguments.out, torch.cat(pictures), 16))


if __name__ == "__main__":
    main()
