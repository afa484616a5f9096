"""Merge task adapters into one, without the base model or any data.

python merge.py adapters/ImageNet-R adapters/ArxivQA adapters/VizWiz --output merged
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_many import merge_adapter_files


def main(
    adapters: Annotated[list[str], typer.Argument(help="The task adapters, by folder or Hub id; merges too.")],
    output: Annotated[Path, typer.Option(help="The folder of the merge; it must not exist.")],
    rank: Annotated[int | None, typer.Option(help="The largest rank of a merged layer; the sum if not given.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute; it must know float64.")] = "cpu",
) -> None:
    """Merge task adapters into one folder, which loads with PEFT like any adapter."""
    typer.echo(f"The merge is in '{merge_adapter_files(adapters, output, rank=rank, device=device)}'.")


if __name__ == "__main__":
    typer.run(main)
