"""Measure an adapter that was trained elsewhere, so that it can be merged: an imported LLaVA checkpoint, a plain LoRA.

python measure.py imported/IconQA --task IconQA --data UCIT --output adapters/IconQA
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from collate import Collator
from data import Examples, training_examples
from models import LLAVA, load_base, processes
from peft import PeftModel
from tasks import TASKS, find_task
from torch import Generator
from torch.utils.data import DataLoader, RandomSampler

from peft_many import collect_statistics


def main(
    adapter: Annotated[str, typer.Argument(help="The adapter, by folder or Hub id.")],
    task: Annotated[str, typer.Option(help=f"The task that it was trained on: {', '.join(TASKS)}.")],
    data: Annotated[Path, typer.Option(help="The benchmark's folder.")],
    output: Annotated[Path, typer.Option(help="Where to save the adapter with its statistics.")],
    images: Annotated[Path | None, typer.Option(help="Where the image names begin.")] = None,
    model: Annotated[str, typer.Option(help="The base model, by Hub id or folder.")] = LLAVA,
    samples: Annotated[int, typer.Option(help="How many training examples to measure on.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Examples in one pass.")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the base model.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Fixes which examples.")] = 0,
) -> None:
    """Run the adapter over some of its task's training data and save it with its statistics."""
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"'{output}' exists and is not empty.", param_hint="--output")
    examples = Examples(training_examples(find_task(task), data, images))
    base, processor = load_base(model, dtype)
    adapted = PeftModel.from_pretrained(base.to(processes().device), adapter)
    loader = DataLoader(
        examples,
        batch_size=batch_size,
        sampler=RandomSampler(examples, generator=Generator().manual_seed(seed)),
        collate_fn=Collator(processor, base.config.model_type).training,
    )
    collect_statistics(adapted, loader, max_samples=samples)
    adapted.save_pretrained(str(output))
    typer.echo(f"Measured '{adapter}'; it is saved with its statistics in '{output}'.")


if __name__ == "__main__":
    typer.run(main)
