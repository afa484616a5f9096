"""Pre-trains one of the benchmark's tiny models from scratch, as the checkpoint in benchmarks/mini_ucit was.

    python scripts/pretrain_model.py llava --output llava                # half an hour on two CPU cores
    python scripts/pretrain_model.py llava --steps 200 --output /tmp/try

Everything is drawn from seeds; there is nothing to download.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.mini_ucit.model import MODELS
from benchmarks.mini_ucit.pretraining import examine, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", choices=MODELS, help="; ".join(f"{model.name}: {model.about}" for model in MODELS.values())
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tiny = MODELS[given.model]
    model = pretrain(tiny, given.output, given.steps, given.batch_size, given.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, written to {given.output}")
    for kind, score in examine(model, tiny, seed=given.seed + 1).items():
        print(f"  {kind:<16} {score:5.1f} % right")


if __name__ == "__main__":
    main()
