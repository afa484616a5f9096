"""Pre-trains the demo's tiny LLaVA from scratch and writes the checkpoint that ships with the package.

    python scripts/pretrain_demo_model.py                      # about 20 minutes on two CPU cores
    python scripts/pretrain_demo_model.py --steps 200 --output /tmp/try

Everything is drawn from seeds; there is nothing to download.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from peft_many.demo.model import CHECKPOINT, Collator, build_config, build_tokenizer
from peft_many.demo.tasks import Example, pretraining_examples
from peft_many.demo.training import accuracy, train


def batches(collate: Collator, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields batches of pre-training conversations without end, each of about equal lengths: less padding."""
    stream = pretraining_examples(seed)
    rng = np.random.default_rng(seed)
    while True:
        pool = sorted(islice(stream, 16 * size), key=lambda example: sum(len(f"{q} {a}") for q, a in example.turns))
        for chunk in rng.permutation(16):
            yield collate(pool[chunk * size : (chunk + 1) * size])


def examine(model: LlavaForConditionalGeneration, collate: Collator, seed: int, count: int = 1500) -> dict[str, float]:
    """Returns exact-match accuracy in per cent for each kind of pre-training question, on fresh pictures."""
    kinds: dict[str, list[Example]] = {}
    for example in islice(pretraining_examples(seed), count):
        first = example.question.split()
        kinds.setdefault(" ".join(first[:2]) if first[0] != "what" else "what is shown", []).append(example)
    return {kind: accuracy(model, collate.tokenizer, found) for kind, found in sorted(kinds.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    collate = Collator(tokenizer)
    model = LlavaForConditionalGeneration(build_config(tokenizer))
    print(f"A LLaVA with {sum(parameter.numel() for parameter in model.parameters()):,} parameters, from scratch.")
    losses = train(
        model,
        batches(collate, arguments.batch_size, arguments.seed),
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        weight_decay=0.05,
        label="pre-training",
    )
    print(f"loss of the last hundred steps: {sum(losses[-100:]) / len(losses[-100:]):.4f}")
    for kind, score in examine(model, collate, seed=arguments.seed + 1).items():
        print(f"  {kind:<16} {score:5.1f} % right")

    model.half().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
