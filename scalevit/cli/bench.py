"""`scalevit bench`: measures speed, one benchmark at a time. Each has arguments of its own."""

import argparse

from scalevit.cli.parsing import run_module
from scalevit.errors import UserError, nearest_hint

# Name -> (module with `add_arguments` and `run`, purpose). The kernels' also runs without the rest of scalevit.
_BENCHMARKS = {
    "data": ("scalevit.cli.bench_data", "measure loaders: images per second of one core, ours and others'"),
    "kernels": ("scalevit.kernels.bench", "measure the fused MLP; without a GPU show what its kernels need"),
    "train": ("scalevit.cli.bench_train", "measure training steps: each reduction with eager and fused MLPs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "scalevit bench [-h] BENCHMARK ..."
    parser.epilog = (
        "benchmarks:\n"
        + "\n".join(f"  {name:10}{purpose}" for name, (_, purpose) in _BENCHMARKS.items())
        + "\n\n`scalevit bench BENCHMARK --help` lists the arguments of a benchmark."
    )
    parser.add_argument("benchmark", metavar="BENCHMARK", help=argparse.SUPPRESS)
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # or a missing name is reported with this one


def run(arguments: argparse.Namespace) -> None:
    """Runs one benchmark.

    Raises:
        UserError: an unknown benchmark, or what the benchmark raises.
    """
    name = arguments.benchmark
    if name not in _BENCHMARKS:
        hint = nearest_hint(name, _BENCHMARKS)
        raise UserError(f"scalevit bench has no benchmark {name!r}{hint} (benchmarks: {', '.join(_BENCHMARKS)})")
    module, purpose = _BENCHMARKS[name]
    run_module(module, f"scalevit bench {name}", purpose, arguments.rest)
