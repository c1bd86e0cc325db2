"""Figures of kseg, most beside those of its peers: `python -m tools.benchmark PART`."""

from __future__ import annotations

import tyro

from kseg.errors import Failure, UserError
from tools.benchmarks.crf import Crf, benchmark_crf
from tools.benchmarks.export import Export, benchmark_export
from tools.benchmarks.input import Input, benchmark_input
from tools.benchmarks.memory import Memory, benchmark_memory
from tools.benchmarks.metrics import Metrics, benchmark_metrics
from tools.benchmarks.quantize import Quantize, benchmark_quantize
from tools.benchmarks.train import Train, benchmark_train

PARTS = {
    Input: benchmark_input,
    Crf: benchmark_crf,
    Memory: benchmark_memory,
    Metrics: benchmark_metrics,
    Train: benchmark_train,
    Export: benchmark_export,
    Quantize: benchmark_quantize,
}


def main() -> int:
    """Run the part of the benchmark named on the command line."""
    names = {kind.__name__.lower(): kind for kind in PARTS}
    options = tyro.extras.subcommand_cli_from_dict(names, prog="tools.benchmark")
    return PARTS[type(options)](options)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (UserError, Failure) as error:
        raise SystemExit(f"error: {error}") from error
