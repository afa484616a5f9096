"""Train one task's adapter with transformers' Trainer; it is measured at the end, and ready to be merged.

    python train_with_trainer.py --data clevr.jsonl --task-name clevr --output adapters/clevr

The file has lines like {"image": "images/1.png", "question": "How many cubes?", "answer": "3"}.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from question_data import Collator, Questions
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from peft_many import MAnyCallback, MAnyConfig


def arguments_parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the task's questions, as JSON lines")
    parser.add_argument("--task-name", required=True, help="what to call the task in merges")
    parser.add_argument("--output", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="the base model, by Hub id or folder")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's r; alpha is twice that")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="questions in one pass on one device")
    parser.add_argument("--samples", type=int, default=256, help="questions that the trained adapter is measured on")
    parser.add_argument("--cpu", action="store_true", help="use no accelerator even if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Train, measure and save."""
    args = arguments_parser().parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not args.cpu
    processor = AutoProcessor.from_pretrained(args.model)
    base = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model = get_peft_model(base, MAnyConfig(r=args.rank, lora_alpha=2 * args.rank, task_name=args.task_name))
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{args.output}-run",
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,  # the collator needs the images and the questions
            bf16=on_gpu,
            use_cpu=args.cpu,
        ),
        train_dataset=Questions(args.data),
        data_collator=Collator(processor),
        callbacks=[MAnyCallback(max_samples=args.samples)],
    )
    trainer.train()
    trainer.save_model(str(args.output))
    return trainer


if __name__ == "__main__":
    main()
