"""sora-fast explain."""

from .parsing import DTYPES

DESCRIPTION = "Example: sora-fast explain dit --device cuda:sm90"


def add_arguments(parser) -> None:
    parser.add_argument("what", nargs="?", default="all", help="all, dit, vae, a family or an op (default: all)")
    parser.add_argument("--device", default="auto",
                        help="auto (a GPU where there is one), cpu, cuda, or an architecture as in cuda:sm90")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="(default: %(default)s)")
    parser.add_argument("--no-grad", action="store_true", help="forward only (default: with the backward)")
    parser.add_argument("--assume-validated", action="store_true",
                        help="as if every kernel had its validation record (default: only the records there are)")
    parser.add_argument("--all", action="store_true", help="a line per backend, with its reasons (default: one per op)")


def run(arguments) -> int:
    import torch

    from ..explanation import explain

    print(explain(arguments.what, device=arguments.device, dtype=getattr(torch, arguments.dtype),
                  grad=not arguments.no_grad, assume_validated=arguments.assume_validated, every=arguments.all))
    return 0
