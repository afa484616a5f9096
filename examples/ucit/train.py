"""Train one task's adapter by MCITlib's recipe, measure it, and save it.

Run it on as many GPUs as there are; the recipe's batch of 64 is kept by accumulating gradients:

    accelerate launch train.py --task ImageNet-R --data UCIT --output adapters/ImageNet-R
    accelerate launch train.py --task Flickr30k --data UCIT --output adapters/Flickr30k \\
        --model OpenGVLab/InternVL3-8B-hf --learning-rate 1e-4 --batch-size 2

A run that was interrupted goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from collate import Collator
from data import Examples, training_examples
from models import LLAVA, load_base, processes
from peft import PeftModel, get_peft_model
from tasks import TASKS, find_task
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_many import MAnyCallback, MAnyConfig

# MCITlib's scripts/CoIN/Train_UCIT/Task1.sh and llava/train/train.py.
PROJECTOR_LEARNING_RATE = 2e-5
BATCH = 64  # 8 GPUs of 4 examples, accumulated twice
LORA_DROPOUT = 0.05
WARM_UP = 0.03  # of all steps


def main(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
    data: Annotated[Path, typer.Option(help="The benchmark's folder; the README shows how it is laid out.")],
    output: Annotated[Path, typer.Option(help="The adapter's folder; it must not exist.")],
    images: Annotated[
        Path | None, typer.Option(help="Where the image names begin. Found under --data if not given.")
    ] = None,
    model: Annotated[str, typer.Option(help="The base model, by Hub id or folder.")] = LLAVA,
    rank: Annotated[int | None, typer.Option(help="LoRA's r; alpha is twice that. The recipe's if not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="LoRA's. The recipe's if not given.")] = None,
    projector_learning_rate: Annotated[float, typer.Option(help="The projector's.")] = PROJECTOR_LEARNING_RATE,
    epochs: Annotated[float | None, typer.Option(help="The recipe's if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one pass on one device.")] = 4,
    total_batch_size: Annotated[int, typer.Option(help="Examples to a step, over all devices.")] = BATCH,
    dtype: Annotated[str, typer.Option(help="Of the base model: bfloat16 or float32.")] = "bfloat16",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations twice, to save memory.")] = True,
    max_length: Annotated[int, typer.Option(help="Tokens kept of an example, image included.")] = 2048,
    statistics_samples: Annotated[int, typer.Option(help="Examples that the trained adapter is measured on.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Use the first examples only, to try things out.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that load images, for each device.")] = 4,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    seed: Annotated[int, typer.Option(help="Fixes the order of the data and LoRA's initialisation.")] = 0,
) -> None:
    """Train, measure and save the adapter of one task. Start it by `accelerate launch`."""
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"'{output}' exists and is not empty.", param_hint="--output")
    recipe = find_task(task)
    examples = training_examples(recipe, data, images)[:limit]
    accumulation = accumulated(total_batch_size, batch_size)
    rank = rank or recipe.rank
    set_seed(seed)
    base, processor = load_base(model, dtype)
    config = MAnyConfig(r=rank, lora_alpha=2 * rank, lora_dropout=LORA_DROPOUT, task_name=recipe.name)
    adapted = get_peft_model(base, config)
    run = output.with_name(f"{output.name}-run")
    rate = learning_rate or recipe.learning_rate
    arguments = TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs or recipe.epochs,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARM_UP,
        weight_decay=0.0,
        bf16=dtype == "bfloat16",
        use_cpu=processes().device.type == "cpu",
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        logging_steps=10,
        save_steps=checkpoint_steps,
        save_total_limit=1,
        report_to=[],
        seed=seed,
    )
    trainer = Trainer(
        adapted,
        arguments,
        train_dataset=Examples(examples),
        data_collator=Collator(processor, base.config.model_type, max_length=max_length).training,
        callbacks=[MAnyCallback(max_samples=statistics_samples)],
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": parameter_groups(adapted, projector_learning_rate), "lr": rate},
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run) if run.is_dir() else None)
    # Not `trainer.save_model`, which adds a pickle of its arguments.
    adapted.save_pretrained(str(output), is_main_process=trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(run, ignore_errors=True)
        typer.echo(f"Trained {recipe.name} on {len(examples)} examples; the adapter is in '{output}'.")


def accumulated(total: int, batch_size: int) -> int:
    """How many passes make a step."""
    devices = processes().num_processes
    if total % (batch_size * devices):
        raise typer.BadParameter(
            f"{total} examples to a step cannot be made of passes of {batch_size * devices} ({batch_size} on each of "
            f"{devices} devices).",
            param_hint="--total-batch-size",
        )
    return total // (batch_size * devices)


def parameter_groups(model: PeftModel, projector_learning_rate: float) -> list[dict[str, object]]:
    """What is trained, by learning rate."""
    names = [f".{name}." for name in model.peft_config["default"].projector_modules or []]
    lora, projector = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (projector if any(part in f".{name}" for part in names) else lora).append(parameter)
    groups: list[dict[str, object]] = [{"params": lora}]
    return [*groups, {"params": projector, "lr": projector_learning_rate}] if projector else groups


if __name__ == "__main__":
    typer.run(main)
