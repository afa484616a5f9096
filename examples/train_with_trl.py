"""Train one task's adapter with TRL's SFTTrainer; it is measured at the end, and ready to be merged.

    python train_with_trl.py --data clevr.jsonl --task-name clevr --output adapters/clevr

The file has lines like {"image": "images/1.png", "question": "How many cubes?", "answer": "3"}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from question_data import Questions
from train_with_trainer import arguments_parser
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from peft_many import MAnyCallback, MAnyConfig


def end_of_answers(processor: Any) -> str:
    """What an answer has to end with, or the adapter never stops; nothing where the chat template writes it itself."""
    end: str = processor.tokenizer.eos_token
    said = {"user": "?", "assistant": "!"}
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
    return "" if end in processor.apply_chat_template(chat).rpartition("!")[2] else end


def conversations(questions: Questions, end: str) -> Dataset:
    """Rows as TRL wants them; only completions are learnt."""

    def row(one: dict[str, Any]) -> dict[str, Any]:
        asked, answered = [{"role": "user", "content": one["question"]}], f"{one['answer']}{end}"
        return {
            "images": [one["image"]],
            "prompt": asked,
            "completion": [{"role": "assistant", "content": answered}],
        }

    return Dataset.from_list([row(questions[place]) for place in range(len(questions))])


def main(arguments: Sequence[str] | None = None) -> SFTTrainer:
    """Train, measure and save."""
    parser = arguments_parser()
    parser.description = __doc__
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not args.cpu
    processor = AutoProcessor.from_pretrained(args.model)
    trainer = SFTTrainer(
        args.model,
        SFTConfig(
            output_dir=f"{args.output}-run",
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=5,
            max_length=None,  # which would cut off image tokens
            save_strategy="no",
            report_to=[],
            bf16=on_gpu,
            use_cpu=args.cpu,
        ),
        train_dataset=conversations(Questions(args.data), end_of_answers(processor)),
        processing_class=processor,
        peft_config=MAnyConfig(r=args.rank, lora_alpha=2 * args.rank, task_name=args.task_name),
        callbacks=[MAnyCallback(max_samples=args.samples)],
    )
    trainer.train()
    trainer.save_model(str(args.output))
    return trainer


if __name__ == "__main__":
    main()
