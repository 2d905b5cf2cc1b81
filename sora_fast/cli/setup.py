"""sora-fast setup."""

from .parsing import DTYPES

DESCRIPTION = """\
Once on a machine with a GPU, in minutes: every kernel is compiled and judged against the reference, and every backend that
can run (ours, PyTorch's, installed peers) is timed at the sizes of published models. What comes of it is in your cache
(SORA_FAST_CACHE), and auto takes the fastest from then on. It may be stopped; the same command goes on. For one model:

  sora-fast setup --model path/to/transformer      (a folder of save_pretrained)

or sora_fast.setup(model) in Python, for a model of yours."""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--model", metavar="CLASS|FOLDER",
        help="what this model of diffusers calls at 480 x 832, and no more (default: the sizes of published models)")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of the model")
    add("--training", action="store_true", help="the model with its gradients too (default: without)")
    add("--quick", action="store_true", help="without a model: a few small sizes, to try it (default: those of models)")
    add("--device", default="cuda", help="a CUDA device")
    add("--plan", action="store_true", help="say what would be done and how long it would take (default: do it)")
    add("--gpu", choices=("h200", "h100", "a100", "l40s", "4090"),
        help="with --plan: a GPU that need not be here (default: this machine's)")
    add("--jobs", type=int, metavar="N", help="processes that compile (default: one for each core, up to 16)")


def run(arguments) -> int:
    """Set up and print what was found; 1 where something could not be measured."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs: expected 1 or more processes, got {arguments.jobs}; pass how many there are cores")
    if arguments.gpu and not arguments.plan:
        raise ValueError("--gpu: expected it beside --plan, got it alone: a setup is of this machine's GPU; leave it out")
    from ..tuning.setting_up import setup

    suite = "quick" if arguments.quick else "full"
    model = None if arguments.model is None else _model(arguments)
    if arguments.plan:
        return _plan(arguments, model, suite)
    found = setup(model, device=arguments.device, jobs=arguments.jobs, suite=suite,
                  tell=lambda line: print(line, flush=True))
    print(f"{found}\nset up in {found.seconds:.0f} s; sora-fast explain --device cuda shows what auto takes")
    return 1 if found.failed else 0


def _model(arguments):
    import torch

    from ..integrations import accelerate
    from ..integrations.comparison import open_model

    model = open_model(arguments.model).to(getattr(torch, arguments.dtype)).train(arguments.training)
    accelerate(model)
    return model


def _plan(arguments, model, suite: str) -> int:
    from ..cyclemodel import GPUS
    from ..tuning import plan, setting_up, walk, workers

    name = f"cuda:sm{GPUS[arguments.gpu].cc}" if arguments.gpu else setting_up.gpu(arguments.device)
    found = plan.make(walk.common(name, suite) if model is None else walk.of_model(model, name))
    print(*found.lines(arguments.jobs or workers.usual_jobs()), sep="\n")
    return 0
