"""sora-fast: demo, train-vae, train, generate, eval, info, explain, validate, bench, predict, tune."""

import argparse
import codecs
import difflib
import dis
import io
import os
import sys
from pathlib import Path

from ..files import FULL

DTYPES = ("float64", "float32", "bfloat16", "float16")


def _info(arguments) -> int:
    from ..explanation import info

    print(info())
    return 0


def _explain(arguments) -> int:
    import torch

    from ..explanation import explain

    print(explain(arguments.what, device=arguments.device, dtype=getattr(torch, arguments.dtype),
                  grad=not arguments.no_grad, assume_validated=arguments.assume_validated))
    return 0


def _validate(arguments) -> int:
    from .validate import run

    return run(arguments)


def _train_vae(arguments) -> int:
    from .train import train_vae

    return train_vae(arguments)


def _train(arguments) -> int:
    from .train import train

    return train(arguments)


def _generate(arguments) -> int:
    from .generate import run

    return run(arguments)


def _eval(arguments) -> int:
    from .eval import run

    return run(arguments)


def _demo(arguments) -> int:
    from .demo import run

    return run(arguments)


def _bench(action: str):
    def run(arguments) -> int:
        from . import bench

        return getattr(bench, action)(arguments)
    return run


def _predict(arguments) -> int:
    from .predict import run

    return run(arguments)


def _tune(arguments) -> int:
    from .tune import run

    return run(arguments)


def parser() -> argparse.ArgumentParser:
    from .. import __version__
    from ..training.config import DiTTraining, VAETraining
    from .options import add_options
    from .parsing import Parser

    top = Parser(prog="sora-fast", description="Fast, differentiable, ragged layers for Sora-style video models: see them "
                                               "work, train, generate, check.")
    top.add_argument("--version", action="version", version=f"sora_fast {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, help, description=None):
        sub = commands.add_parser(name, help=help, description=description or help,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "train a VAE and a DiT on real clips and photos, generate, and write a report",
                  "The whole system on three real clips and twelve photos that come with two Python packages: trains\n"
                  "the tiny VAE and the tiny DiT, generates clips and images from captions, images and clips, and\n"
                  "writes OUT/report.html.\n"
                  "About six and a half minutes on two CPU cores.")
    sub.add_argument("--out", default="out/demo", help="folder for the report and all beside it (default: %(default)s)")
    sub.add_argument("--vae-steps", type=int, default=500, help="training steps of the VAE (default: %(default)s)")
    sub.add_argument("--dit-steps", type=int, default=1000, help="training steps of the DiT (default: %(default)s)")
    sub.add_argument("--minutes", type=float, default=8.0,
                     help="on a slow machine, shorten both trainings to end about then; 0: never (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    sub.add_argument("--threads", type=int, default=0,
                     help="CPU threads; 0: whichever is faster, one or all (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")

    sub = command("train-vae", _train_vae, "train a VideoVAE on a folder of clips and images")
    add_options(sub, VAETraining)
    sub = command("train", _train, "train a text-conditioned DiT on packs of clips and images of any size")
    add_options(sub, DiTTraining)

    sub = command("generate", _generate, "generate clips and images of any sizes from captions, images and clips",
                  "From a caption:  sora-fast generate runs/dit --prompt 'a rabbit' --size 9x96x160\n"
                  "Several at once: ... --prompt 'a rabbit' --size 9x96x160 --prompt 'a cat' --size 1x128x128\n"
                  "Animate a photo: ... --prompt 'a rabbit' --image rabbit.png\n"
                  "Go on:           ... --prompt 'a rabbit' --clip rabbit.mp4 --extend after --size 17x96x160\n"
                  "What was before: ... --prompt 'a rabbit' --clip rabbit.mp4 --extend before --size 17x96x160\n"
                  "Loop:            ... --prompt 'a rabbit' --clip rabbit.mp4 --loop --size 17x96x160\n"
                  "                 ... --prompt 'a rabbit' --loop --size 17x96x160\n"
                  "Interpolate:     ... --prompt 'a rabbit' --clip one.mp4 --to other.mp4 --size 17x96x160\n"
                  "Change:          ... --prompt 'a rabbit in snow' --clip rabbit.mp4 --strength 0.6\n\n"
                  "--size counts all frames of the file, given ones included. Images and clips are scaled to just cover\n"
                  "the size and cropped. Given frames stand in the file as they are, not as the VAE's blurred copy. So\n"
                  "that no seam shows, what that copy missed of the given frame at a seam is added to the 8 generated\n"
                  "frames beside it, less and less; a seam that still steps further than the given clip's own frames do\n"
                  "is pulled below that over the same frames. --decoded writes the decoder's frames alone. mp4 and gif\n"
                  "are not lossless, --png is. An image to end with (--to, --extend before) is held for a latent frame.")
    sub.add_argument("model", help="run folder of sora-fast train")
    sub.add_argument("--prompt", type=typed, action="append", required=True, help="caption; repeat for several samples")
    sub.add_argument("--size", action="append", metavar="TxHxW",
                     help="frames x lines x columns; T = 1 is an image. This flag, --image, --clip and --to: once for all "
                          "samples or once for each (default: that of --image or --clip, fitted as in training)")
    sub.add_argument("--image", action="append", metavar="FILE", help="begin with this image (default: none)")
    sub.add_argument("--clip", action="append", metavar="FILE", help="use this clip as the mode below says (default: none)")
    sub.add_argument("--extend", choices=("after", "before"),
                     help="generate what comes after the clip's last frames, or what was before its first "
                          "(default: after, with --image)")
    sub.add_argument("--loop", action="store_true", help="lead back to the first frame; the clip's first frames begin it, "
                                                         "or, without one, the caption's (default: a free end)")
    sub.add_argument("--to", action="append", metavar="FILE",
                     help="lead from the image or the clip's last frames to this image or clip's first (default: none)")
    sub.add_argument("--strength", type=float, metavar="S",
                     help="change the image or clip: noise it by this share, 0 to 1, and denoise it to the caption "
                          "(default: none)")
    sub.add_argument("--given", type=int, metavar="N",
                     help="frames of the clip to go on from, rounded down to what the VAE takes; with --to of each clip "
                          "(default: about half of T, with --to a third)")
    sub.add_argument("--start", type=float, metavar="SECONDS",
                     help="where in the clip its frames are taken from (default: its end with --extend after and --to, else "
                          "its beginning)")
    sub.add_argument("--decoded", action="store_true",
                     help="write the decoder's frames alone, given ones too (default: given frames as they are)")
    sub.add_argument("--out", default="out/generated", help="folder for mp4 and png files, numbered on from those there "
                                                           "(default: %(default)s)")
    sub.add_argument("--steps", type=int, default=25, help="sampling steps (default: %(default)s)")
    sub.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1: none (default: %(default)s)")
    sub.add_argument("--fps", type=float, help="frames per second at which clips are read, never above their own, and files "
                                               "are written (default: training's, else the clips' own, else 12)")
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument("--gif", action="store_true", help="write gif in place of mp4 (default: mp4)")
    kind.add_argument("--png", action="store_true", help="write a folder of png files in place of each mp4 (default: mp4)")
    sub.add_argument("--seed", type=int, default=0,
                     help="seed of the first sample's noise, the next have the next numbers (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")

    sub = command("eval", _eval, "judge a trained VAE or DiT: reconstruction, loss over timesteps, samples, a report",
                  "A VAE:  sora-fast eval runs/vae --data clips/\n"
                  "A DiT:  sora-fast eval runs/dit --data clips/ --prompt 'a rabbit' --size 9x96x160 --size 1x128x128\n"
                  "With a distance of features of your own:\n"
                  "        sora-fast eval runs/vae --data clips/ --features my_package.features:clip_features\n\n"
                  "A VAE: PSNR, SSIM, PSNR of the differences of neighbouring frames and of the worst frame, for each file\n"
                  "and in all, in memory that does not grow with the clips' length. A DiT, with its averaged weights: the\n"
                  "loss over timesteps with fixed noise, and a sheet of samples, prompts by sizes. Writes OUT/eval.json,\n"
                  "eval.png and report.html. The function of --features takes a clip, uint8 (T, H, W, 3), and gives D\n"
                  "numbers; the Frechet distance is between their Gaussians, real against reconstructed or generated.")
    sub.add_argument("model", help="run folder of sora-fast train-vae or train, or weights of Wan 2.1's VAE")
    sub.add_argument("--data", metavar="FOLDER", help="clips and images to judge it on (default: the files that the run "
                                                      "held out from its training)")
    sub.add_argument("--out", default="out/eval", help="folder for figures, report and samples (default: %(default)s)")
    sub.add_argument("--files", type=int, default=64, metavar="N", help="no more than N files, evenly spread; 0: all "
                                                                        "(default: %(default)s)")
    sub.add_argument("--short-side", type=int, default=0, metavar="PIXELS",
                     help="VAE: clips and images are made this small, never larger; 0: as in training, else 256 "
                          "(default: %(default)s)")
    sub.add_argument("--frames", type=int, default=0, metavar="N", help="VAE: the first N frames of each clip; 0: all "
                                                                        "(default: %(default)s)")
    sub.add_argument("--fps", type=float, default=0.0, help="VAE: frames per second read from clips; 0: as in training, "
                                                            "else the clips' own (default: %(default)s)")
    sub.add_argument("--strata", type=int, default=10, metavar="N", help="DiT: equal parts of the timesteps, each met once "
                                                                         "by every window (default: %(default)s)")
    sub.add_argument("--prompt", type=typed, action="append",
                     help="DiT: a caption of the sheet; repeat for more rows (default: the first three of the data)")
    sub.add_argument("--size", action="append", metavar="TxHxW", help="DiT: a size of the sheet; repeat for more columns "
                                                                      "(default: that of a window, and an image)")
    sub.add_argument("--steps", type=int, default=25, help="DiT: sampling steps (default: %(default)s)")
    sub.add_argument("--guidance", type=float, default=1.0, help="DiT: classifier-free guidance, 1: none "
                                                                 "(default: %(default)s)")
    sub.add_argument("--gif", action="store_true", help="DiT: a gif of the sheet in place of mp4 (default: mp4)")
    sub.add_argument("--features", metavar="PKG.MOD:FN", help="your function of features, for a Frechet distance "
                                                              "(default: none)")
    sub.add_argument("--feature-frames", type=int, default=16, metavar="N",
                     help="VAE: features are those of windows of N frames, shorter clips as they are (default: %(default)s)")
    sub.add_argument("--feature-batch", type=int, default=0, metavar="B",
                     help="your function takes up to B clips of one size, (B, T, H, W, 3), and gives (B, D); 0: one clip "
                          "(default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed of noise, timesteps and samples (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")

    command("info", _info, "what is installed, and which backend runs what")
    sub = command("explain", _explain, "which backend each op takes on a device, and why",
                  "Example: sora-fast explain dit --device cuda:sm90")
    sub.add_argument("what", nargs="?", default="all", help="all, dit, vae, a family or an op (default: all)")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, or an architecture as in cuda:sm90 (default: %(default)s)")
    sub.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="(default: %(default)s)")
    sub.add_argument("--no-grad", action="store_true", help="forward only (default: with the backward)")
    sub.add_argument("--assume-validated", action="store_true",
                     help="as if every kernel had its validation record (default: only the records there are)")

    sub = command("validate", _validate, "check ops, or a function of yours, against the reference in float64",
                  "Ours:  sora-fast validate --op norm_modulate --backend torch\n"
                  "Yours: sora-fast validate --op norm_modulate --impl my_package.kernels:norm_modulate\n"
                  "Your function takes the op's keyword arguments and returns what it returns.\n"
                  "Without a GPU: --device emulated:sm90 executes the PTX of Triton kernels, yours too, for that GPU.\n"
                  "A whole model of diffusers beside its accelerated self, layer by layer:\n"
                  "       sora-fast validate --model AutoencoderKLWan      (tiny and random)\n"
                  "       sora-fast validate --model path/to/vae           (a folder of save_pretrained)")
    sub.add_argument("--op", action="append", help="op to check; repeat for several (default: all)")
    sub.add_argument("--impl", metavar="PKG.MOD:FN", help="your function, for one --op")
    sub.add_argument("--model", metavar="CLASS|FOLDER", help="a model of diffusers, plain and accelerated, in place of ops "
                                                             "(default: ops)")
    sub.add_argument("--backend", action="append", help="backend of ours; repeat for several (default: all there are)")
    sub.add_argument("--dtype", action="append", choices=DTYPES, help="repeat for several (default: the last three)")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, or a GPU that is emulated, as in emulated:sm90 "
                                                     "(default: %(default)s)")
    sub.add_argument("--schedules", type=int, metavar="N", help="emulated: each launch under N schedules: asynchronous "
                                                                "copies late, early, at random times (default: late alone)")
    sub.add_argument("--race", action="store_true", help="emulated: look for races and missing fences too (default: not)")
    sub.add_argument("--counters", action="store_true", help="emulated: what each kernel executed and moved (default: not)")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="emulated: N processes (default: %(default)s)")
    sub.add_argument("--jsonl", metavar="FILE", help="also write a line of JSON per op, backend, dtype and direction")
    sub = command("bench", _bench("run"), "measure every op beside every peer that is installed: gate, then time",
                  "Measures ops (families patches, modulation, rotary, attention, convolution, normalization, latents)\n"
                  "and whole models (model). Only what agrees with the reference in float64 gets a time. Writes\n"
                  "OUT/bench.jsonl and OUT/report.html; the same command goes on where a run was stopped. Exits with 1 if\n"
                  "one of our backends failed, with 3 if --minutes left cases for the next call.\n\n"
                  "  sora-fast bench attention --suite full --device cuda\n"
                  "  sora-fast bench --op norm_modulate --impl my_package.kernels:norm_modulate_fast\n"
                  "  sora-fast bench compare old/bench.jsonl new/bench.jsonl --fail-slower 5%%\n"
                  "  sora-fast bench report h100/bench.jsonl h200/bench.jsonl --out both")
    sub.add_argument("families", nargs="*", metavar="FAMILY", help="families to measure (default: all, and model)")
    sub.add_argument("--suite", choices=("quick", "full", "model"), default="quick",
                     help="quick: small sizes, minutes on a CPU; full: real models' sizes, for a GPU; model: whole steps of "
                          "real models (default: %(default)s)")
    sub.add_argument("--quick", action="store_true", help="the same as --suite quick (default: as --suite says)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    sub.add_argument("--l2", choices=("cold", "hot"), help="whether inputs have left the GPU's L2 when they are read "
                                                           "(default: cold on a GPU, hot on a CPU)")
    sub.add_argument("--providers", nargs="+", metavar="NAME", help="only these (default: all)")
    sub.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT (default: all)")
    sub.add_argument("--op", metavar="OP", help="only cases of this op (default: all)")
    sub.add_argument("--impl", metavar="PKG.MOD:FN", help="your function for --op, measured beside all others: it takes the "
                                                          "op's keyword arguments (default: none)")
    sub.add_argument("--list", action="store_true", help="print the cases and their providers (default: measure)")
    sub.add_argument("--minutes", type=float, default=0.0, help="begin no case after so long; 0: never stop "
                                                                "(default: %(default)s)")
    sub.add_argument("--fresh", action="store_true", help="begin again (default: go on with OUT/bench.jsonl)")
    sub.add_argument("--out", default="out/bench", help="folder for rows and report (default: %(default)s)")

    sub = command("predict", _predict, "what the kernels would take on a GPU, from their machine code; no GPU is needed",
                  "Compiles kernels for a GPU, reads their machine code and issues it to the units of one SM, cycle by\n"
                  "cycle. Per kernel, tile and direction: cycles by unit and the one that binds, blocks per SM and what\n"
                  "limits them, predicted TFLOP/s or share of the copy rate, and what the code says for certain: how far\n"
                  "ahead copies are issued, divisions and local memory in a main loop. Beside every figure stands how far\n"
                  "the model was off on published times. Writes OUT/report.html and OUT/predictions.json. Takes seconds\n"
                  "for each kernel.\n\n"
                  "  sora-fast predict attention --gpu h200 --case '128 bfloat16'\n"
                  "  sora-fast predict --impl my_kernels:launch --gpu a100\n"
                  "  sora-fast predict --impl kernel.cubin --warps 8 --gpu h100")
    sub.add_argument("families", nargs="*", metavar="FAMILY", help="families of kernels (default: all)")
    sub.add_argument("--gpu", choices=("h200", "h100", "a100", "l40s", "4090"), default="h200",
                     help="what to predict for (default: %(default)s)")
    sub.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT; of a cubin, functions "
                                                                "(default: all)")
    sub.add_argument("--candidates", action="store_true", help="every tile that the tuner would try too (default: the "
                                                               "heuristic's)")
    sub.add_argument("--impl", metavar="MOD:FN", help="your own: a function without arguments that launches Triton kernels "
                                                      "on tensors of the device meta, or a .cubin's path (default: ours)")
    sub.add_argument("--warps", type=int, default=0, metavar="N", help="warps of a block of a .cubin, which does not say it "
                                                                       "(default: none)")
    sub.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory of a block of a .cubin "
                                                                            "(default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print JSON, not text (default: text)")
    sub.add_argument("--out", default="out/predict", metavar="DIR", help="folder for the report (default: %(default)s)")

    sub = command("tune", _tune, "find the fastest launches of the Triton kernels on this GPU, and keep them",
                  "Goes through the benchmark's cases on a GPU. What a kernel may be launched with passes the benchmark's\n"
                  "gate or is out; the rest is timed beside the heuristic, on the same inputs, in turns. What is faster by\n"
                  "more than the noise is kept with its figures in SORA_FAST_CACHE (default ~/.cache/sora_fast): launches\n"
                  "on this GPU find it, for exactly this problem, kernel source and Triton. The same command goes on where\n"
                  "a run was stopped. Exits with 1 if a case could not be tuned, with 3 if --minutes left cases for the\n"
                  "next call. With TRITON_INTERPRET=1 and --device cpu the tuner itself can be tried without a GPU.\n\n"
                  "  sora-fast tune --minutes 20\n"
                  "  sora-fast tune modulation --case 'Wan 14B'\n"
                  "  sora-fast tune --from benchmarks/results/nvidia-h200/tune.jsonl --ship")
    sub.add_argument("families", nargs="*", metavar="FAMILY", help="families to tune (default: all)")
    sub.add_argument("--suite", choices=("quick", "full"), default="full",
                     help="whose cases: full has real models' sizes, quick small ones (default: %(default)s)")
    sub.add_argument("--quick", action="store_true", help="the same as --suite quick (default: as --suite says)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    sub.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT (default: all)")
    sub.add_argument("--candidates", type=int, default=0, metavar="N",
                     help="try no more than the first N of a kernel's; 0: all (default: %(default)s)")
    sub.add_argument("--minutes", type=float, default=0.0, help="begin nothing after so long; 0: never stop "
                                                                "(default: %(default)s)")
    sub.add_argument("--fresh", action="store_true", help="measure again what is in --out (default: go on)")
    sub.add_argument("--out", default="out/tune.jsonl", metavar="FILE", help="a row for each lookup (default: %(default)s)")
    sub.add_argument("--ship", action="store_true", help="keep winners in this checkout's sora_fast/tuning/configs "
                                                         "(default: in your cache)")
    sub.add_argument("--from", dest="source", metavar="FILE", help="measure nothing: keep the winners in FILE, the --out of "
                                                                   "another run (default: measure)")

    sub = command("bench compare", _bench("compare"), "SAME, FAST, SLOW or UNDECIDED for every row of two runs")
    sub.add_argument("base", help="bench.jsonl of the run to compare with")
    sub.add_argument("new", help="bench.jsonl of the other run, on the same GPU")
    sub.add_argument("--fail-slower", default="5%", metavar="SHARE",
                     help="exit with 1 if a row is slower by more than this (default: 5%%)")
    sub = command("bench report", _bench("report"), "report.html, report.md and report.csv of one run, or of several side "
                                                    "by side")
    sub.add_argument("files", nargs="+", metavar="BENCH.JSONL", help="runs, of the same or of different GPUs")
    sub.add_argument("--out", default="out/report", help="folder for the report (default: %(default)s)")
    sub = command("bench collect", _bench("collect"), "keep a GPU run's result files in benchmarks/results/<gpu>/")
    sub.add_argument("folder", help="the output folder of benchmarks/gpu_run.sh")
    sub = command("bench readme", _bench("readme"), "write README.md's measured tables from the committed results")
    sub.add_argument("--file", default="README.md", help="(default: %(default)s)")
    sub.add_argument("--check", action="store_true", help="fail if the tables differ (default: write them)")
    return top


def typed(text: str) -> str:
    """A flag's text as it was typed, also where Python took its bytes for no letters of the system's encoding."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def join_words(argv: list[str]) -> list[str]:
    """``bench compare a b`` names the command "bench compare"; argparse takes one word for a command.

    What is near one of these is joined too, so that it is reported as a command and not as a family.
    """
    second = ("compare", "report", "collect", "readme")
    two = argv[:1] == ["bench"] and argv[1:2] and difflib.get_close_matches(argv[1], second, 1, 0.75)
    return [" ".join(argv[:2]), *argv[2:]] if two else argv


def is_sentence(error: BaseException) -> bool:
    """Whether ``error`` is a sentence made for people: from a raise statement of ours, not from a slip of the code."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    from .. import benchmarks, kernels  # in a checkout their files lie outside the package

    ours = any(Path(code.co_filename).is_relative_to(room)
               for room in (Path(__file__).parents[1], *benchmarks.__path__, *kernels.__path__))
    return ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit: 0, 1 for a failed validation, 2 with one sentence for what is wrong, 130 for Ctrl-C."""
    _print_anything()
    arguments = parser().parse_args(join_words(sys.argv[1:] if argv is None else argv))
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as in: sora-fast info | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError, FloatingPointError) as error:
        # A missing package or file is no bug of ours; everything else that no raise statement of ours made keeps its
        # traceback.
        foreign = isinstance(error, OSError) or isinstance(error, ImportError) and not _is_ours(error.name)
        if not foreign and not is_sentence(error):
            raise
        print(f"sora-fast: {_told(error)}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _print_anything() -> None:
    """Captions and file names hold letters, and bytes, that the encoding of the output may lack: no reason to stop.

    Names go out with the bytes that they came with, other letters escaped.
    """
    codecs.register_error("sora_fast.shown", _shown)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="sora_fast.shown")


def _shown(error: UnicodeError):
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _told(error: BaseException) -> str:
    """An error's own words; what to do besides where they do not say it."""
    if isinstance(error, ModuleNotFoundError) and not is_sentence(error):
        return f"{error}; run pip install 'sora_fast[train]'"
    if isinstance(error, OSError) and error.errno in FULL:
        return (f"expected room for {error.filename or 'what is written'}, got {error.strerror!r}; free some, or write to "
                f"another disk")
    return str(error)


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "sora_fast"


if __name__ == "__main__":
    main()
