"""The demo's command line: `python -m peft_many.demo --help`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from transformers.utils import logging

from .run import run


def main() -> None:
    """Read the arguments and run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_many.demo",
        description="Teach a tiny LLaVA four conflicting image-question tasks, one adapter each, merge the adapters "
        "without training, and see who remembers what. Under four minutes on two CPU cores.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("many-demo"), help="where adapters, demo.png and results.json go"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures and weights")
    parser.add_argument(
        "--steps", type=int, default=450, help="training steps for each task, the same for all methods"
    )
    parser.add_argument("--tests", type=int, default=300, help="test pictures for each task")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    run(arguments.output, seed=arguments.seed, steps=arguments.steps, tests=arguments.tests)


if __name__ == "__main__":
    main()
