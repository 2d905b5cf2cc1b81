"""sora-fast predict."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ..cyclemodel import GPU, GPUS, Kernel, Prediction, cubins, predict
from ..files import check_folder, save_text
from . import predict_measured, predict_report

DESCRIPTION = """\
Compiles Triton kernels for a GPU, reads their machine code (and that of csrc's kernels, where the CUDA extension was
built) and issues it to the units of one SM, cycle by cycle. Per kernel, tile and direction: cycles by unit and the one
that binds, blocks per SM and what limits them, predicted TFLOP/s or share of the copy rate, and what the code says for
certain: how far ahead copies are issued, divisions and local memory in a main loop. Beside every figure stands how far
the model was off on published times, and what sora-fast bench measured of it, if anything. Writes
OUT/report.html and OUT/predictions.json. Takes seconds for each kernel; a compiled one is kept in SORA_FAST_CACHE/predict
(default ~/.cache/sora_fast), and compiled again only when it, Triton or ptxas has changed.

  sora-fast predict attention --gpu h200 --case '128 bfloat16'
  sora-fast predict --model wan-block
  sora-fast predict --impl my_kernels:launch --gpu a100
  sora-fast predict --impl kernel.cubin --warps 8 --gpu h100"""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help="families of kernels (default: all)")
    add("--gpu", choices=("h200", "h100", "a100", "l40s", "4090"), default="h200",
        help="what to predict for (default: %(default)s)")
    add("--case", default="", metavar="TEXT",
        help="only cases whose name contains TEXT; of a cubin, functions (default: all)")
    add("--candidates", action="store_true",
        help="every tile that the tuner would try too (default: the heuristic's)")
    add("--impl", metavar="MOD:FN", help="your own: a function without arguments that launches Triton kernels on tensors of "
                                         "the device meta, or a .cubin's path (default: ours)")
    add("--model", choices=("wan-vae", "wan-block"),
        help="a whole model in place of kernels, summed from all that it launches, beside its floor: Wan 2.1's decode of 81 "
             "frames of 480 x 832, or a block of Wan 14B at as many, forward and backward (default: none)")
    add("--warps", type=int, default=0, metavar="N",
        help="warps of a block of a .cubin, which does not say it (default: none)")
    add("--shared", type=int, default=0, metavar="BYTES",
        help="dynamic shared memory of a block of a .cubin (default: %(default)s)")
    add("--tokens", type=int, default=8192, metavar="N",
        help="tokens of a sample, of attention: how long its main loops are (default: %(default)s)")
    add("--turns", type=float, default=0, metavar="N",
        help="turns of a block's main loop, of your own kernel (default: its prologue and epilogue are left out)")
    add("--emulate", action="store_true",
        help="execute a program of each Triton kernel with matrix products in the emulator, on zeros, and take the bank "
             "conflicts that it counts in shared memory (default: none are assumed)")
    add("--lines", type=int, default=0, metavar="N",
        help="the N lines of a kernel's source that most instructions of its main loop come from, with those instructions; "
             "kernels are compiled anew for it (default: %(default)s)")
    add("--results", metavar="DIR",
        help="folder with a folder of sora-fast bench's rows for each GPU; measured figures of the same GPU and case stand "
             "beside the predicted ones (default: the results that the package ships)")
    add("--json", action="store_true", help="print JSON, not text (default: text)")
    add("--out", default="out/predict", metavar="DIR", help="folder for the report (default: %(default)s)")


def run(arguments) -> int:
    """Print a prediction per kernel, tile and direction, and write report.html and predictions.json.

    Returns 1 if a kernel could not be predicted (it does not compile, or its blocks do not fit), else 0.
    """
    gpu = GPUS[arguments.gpu]
    for flag, number, least in (("--tokens", arguments.tokens, 1), ("--turns", arguments.turns, 0),
                                ("--lines", arguments.lines, 0)):
        if not least <= number < 2**31:
            raise ValueError(f"{flag}: expected a number from {least} to 2^31, got {number:g}; pass one")
    if arguments.turns and not arguments.impl:
        raise ValueError("--turns: expected it beside --impl, got none: of our kernels they are known; leave it out")
    if arguments.model:
        return _model(arguments, gpu)
    out = Path(arguments.out)
    check_folder("--out", out)
    if arguments.results and not Path(arguments.results).is_dir():
        raise ValueError(f"--results: expected a folder, got none at {arguments.results}; check the path")
    found: list[tuple[Prediction, list[predict_measured.Measured]]] = []
    failed = 0
    rows = predict_measured.read(Path(arguments.results or predict_measured.RESULTS), gpu)
    for name, make, call in _work(arguments, gpu):
        try:
            prediction = predict(make(), gpu)
            found.append((prediction, predict_measured.beside(prediction, call, rows)))
        except Exception as error:  # a compiler's too: the other kernels still count
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print(f"predict: {name}: {lines[-1]}", file=sys.stderr, flush=True)
            failed += 1
            continue
        if not arguments.json:
            print(predict_report.line(*found[-1]), flush=True)
            for line in predict_report.source_lines(prediction, arguments.lines):
                print(line, flush=True)
    if not found and not failed:
        raise ValueError(f"predict: expected --case to leave a kernel on {gpu.name}, got {arguments.case!r}; leave it out "
                         f"to see their names")
    told = [prediction.to_dict() | dict(measured=[each.to_dict() for each in measured]) for prediction, measured in found]
    if arguments.json:
        print(json.dumps(told, indent=1))
    out.mkdir(parents=True, exist_ok=True)
    save_text(out / "predictions.json", json.dumps(told, indent=1) + "\n")
    save_text(out / "report.html", predict_report.html(found, gpu))
    print(f"wrote {out / 'report.html'}", file=sys.stderr if arguments.json else sys.stdout)
    return 1 if failed else 0


def _model(arguments, gpu: GPU) -> int:
    """Print a model's layers and their sum; writes nothing."""
    if arguments.families or arguments.impl or arguments.case:
        raise ValueError("--model: expected it alone, got kernels beside it; leave out FAMILY, --case and --impl")
    from . import predict_models

    tell = lambda line: print(f"predict: {line}", file=sys.stderr, flush=True)
    found = predict_models.layers(predict_models.MODELS[arguments.model], gpu, tell)
    if arguments.json:
        print(json.dumps([asdict(layer) for layer in found], indent=1))
    else:
        print(*predict_models.report(arguments.model, gpu, found), sep="\n")
    return 0


def _work(arguments, gpu: GPU) -> Iterator[tuple[str, object, predict_measured.Call | None]]:
    """(name, function that makes the Kernel, what a measured row must be of) of all that is asked for."""
    if arguments.impl and arguments.impl.endswith(".cubin"):
        yield from _cubin(arguments, gpu)
        return
    from . import predict_csrc, predict_kernels

    check_folder("SORA_FAST_CACHE", predict_kernels.cache())
    if arguments.impl:
        work = predict_kernels.works_of("yours", _launcher(arguments.impl), arguments.impl)
    else:
        from ..testing.launches import FAMILIES

        unknown = [name for name in arguments.families if name not in FAMILIES]
        if unknown:
            raise ValueError(f"predict: expected families among {', '.join(FAMILIES)}, got {', '.join(unknown)}; check the "
                             f"name")
        tell = lambda line: print(f"predict: {line}", file=sys.stderr, flush=True)
        work = (each for family in arguments.families or FAMILIES
                for each in (*predict_kernels.ours(family, gpu, arguments.case, arguments.candidates),
                             *predict_csrc.ours(family, gpu, arguments.case, tell)))
    for each in work:
        yield each.name, lambda each=each: _kernel(each, gpu, arguments), each.call


def _kernel(work, gpu: GPU, arguments) -> Kernel:
    """With what the flags say of it."""
    kernel = work.kernel(gpu, arguments.tokens, arguments.emulate)
    if arguments.lines:
        kernel = replace(kernel, lines=work.source_lines(gpu))
    return replace(kernel, turns=arguments.turns or None) if arguments.impl else kernel


def _launcher(path: str):
    """A user's function that launches; not the kernel, whose arguments nobody here knows."""
    from ..named import load_function

    found = load_function(path, "--impl")
    if hasattr(found, "arg_names") and hasattr(found, "run"):
        raise ValueError(f"--impl: expected a function without arguments that launches your kernel on tensors of the device "
                         f"'meta', got the kernel {path} itself; write one: def launch(): kernel[grid](torch.empty(..., "
                         f"device='meta'), ...)")
    return found


def _cubin(arguments, gpu: GPU) -> Iterator[tuple[str, object, None]]:
    path = Path(arguments.impl)
    if not path.is_file():
        raise ValueError(f"--impl: expected a file, got none at {path}; check the path")
    if not arguments.warps:
        raise ValueError(f"--impl: expected --warps beside {path.name}, got none: a cubin does not say how many warps a "
                         f"block has; pass it, and --shared for dynamic shared memory")
    if arguments.emulate:
        raise ValueError(f"--emulate: expected Triton kernels, which can be launched, got {path.name}; leave it out")
    for each in cubins.functions(path, arguments.case):
        if each.cc != gpu.cc:
            raise ValueError(f"--gpu: expected a GPU of sm_{each.cc}, for which {path.name} is compiled, got {gpu.name}, sm_"
                             f"{gpu.cc}; choose another")
        yield each.name, lambda each=each: Kernel(
            each.name, each.sass, each.registers, each.shared + arguments.shared, arguments.warps, case=path.name,
            tile=f"w{arguments.warps}", turns=arguments.turns or None,
            lines=cubins.source_lines(path, each.name) if arguments.lines else {}), None
