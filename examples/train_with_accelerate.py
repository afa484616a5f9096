"""Train one task's adapter in a loop of your own, on as many devices as there are; measure and save it.

    accelerate launch train_with_accelerate.py --data clevr.jsonl --task-name clevr --output adapters/clevr

The file has lines like {"image": "images/1.png", "question": "How many cubes?", "answer": "3"}.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from question_data import Collator, Questions
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_many import MAnyConfig, collect_statistics


def arguments_parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the task's questions, as JSON lines")
    parser.add_argument("--task-name", required=True, help="what to call the task in merges")
    parser.add_argument("--output", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="the base model, by Hub id or folder")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's r; alpha is twice that")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="questions in one pass on one device")
    parser.add_argument("--samples", type=int, default=256, help="questions that the trained adapter is measured on")
    parser.add_argument("--cpu", action="store_true", help="use no accelerator even if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and save."""
    args = arguments_parser().parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not args.cpu
    accelerator = Accelerator(cpu=args.cpu, mixed_precision="bf16" if on_gpu else "no")
    set_seed(0)  # the same initial LoRA in every process
    processor = AutoProcessor.from_pretrained(args.model)
    base = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model = get_peft_model(base, MAnyConfig(r=args.rank, lora_alpha=2 * args.rank, task_name=args.task_name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    loader = DataLoader(Questions(args.data), args.batch_size, shuffle=True, collate_fn=Collator(processor))
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for epoch in range(args.epochs):
        progress = tqdm(loader, desc=f"epoch {epoch}", disable=not accelerator.is_main_process)
        for batch in progress:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")

    # Every process measures its share of the questions, and all get the statistics of all.
    collect_statistics(model, loader, max_samples=args.samples)
    accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
