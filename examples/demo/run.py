"""The demo's story, from top to bottom: learn, measure, merge, ask, tell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from benchmarks.mini_ucit.model import MODELS, Collator
from benchmarks.mini_ucit.parts import with_parts
from benchmarks.mini_ucit.training import accuracy, batches_of, shuffled_batches, train
from benchmarks.mini_ucit.world import Task
from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence

from .picture import draw
from .tasks import TASKS

LLAVA = MODELS["llava"]
BATCH_SIZE = 32
LEARNING_RATE = 4e-3
RANK = 8
MEASURED = 128  # samples for covariances and prototypes

# Accuracy in per cent by method and task.
Scores = dict[str, dict[str, float]]


def run(output: Path, seed: int = 0, steps: int = 450, tests: int = 300) -> Scores:
    """Run the demo and write adapters, `results.json` and `demo.png` into `output`.

    Every method gets the same budget: `steps` batches for each task, the same learning rate, the same rank.

    Args:
        output (`Path`): Where to write; made if need be, and older results in it are replaced.
        seed (`int`): Draws the pictures and the initial weights.
        steps (`int`): Training steps for each task.
        tests (`int`): Test pictures for each task, drawn anew and, for digits, of digits that nobody trained on.

    Returns:
        `dict[str, dict[str, float]]`: Exact-match accuracy in per cent, by method and task.
    """
    started = time.perf_counter()
    console = Console()
    torch.manual_seed(seed)
    collate, prompts = Collator(LLAVA), Collator(LLAVA, prompts_only=True)
    questions = {task.name: task.examples(tests, "test", seed + 1) for task in TASKS}

    def examine(model: nn.Module, task: Task) -> float:
        return accuracy(model, prompts, questions[task.name])

    names = ", ".join(task.name for task in TASKS)
    console.print(f"[bold]1.[/] A tiny LLaVA learns {len(TASKS)} tasks, one adapter each: {names}.")
    alone: dict[str, float] = {}
    for task in TASKS:
        model = get_peft_model(LLAVA.load(), MAnyConfig(r=RANK, lora_alpha=2 * RANK, task_name=task.name))
        train(model, _batches(task, collate, seed), steps, LEARNING_RATE, label=f"learning {task.name}")
        loader = batches_of(task.examples(MEASURED, "train", seed + 2), collate, BATCH_SIZE)
        collect_statistics(model, loader, max_samples=MEASURED, progress=False)
        alone[task.name] = examine(model, task)
        model.save_pretrained(output / "adapters" / task.name)

    console.print("[bold]2.[/] The same model learns them one after the other, with one adapter, and forgets.")
    model = get_peft_model(LLAVA.load(), MAnyConfig(r=RANK, lora_alpha=2 * RANK))
    for task in TASKS:
        train(model, _batches(task, collate, seed), steps, LEARNING_RATE, label=f"then learning {task.name}")
    model.save_pretrained(output / "adapters" / "sequential")

    console.print("[bold]3.[/] The adapters are merged: no training, no data.")
    folders = {task.name: output / "adapters" / task.name for task in TASKS}
    sequential = output / "adapters" / "sequential"
    merged = merge_adapter_sequence(LLAVA.load(), list(folders.values()))
    merged.save_pretrained(output / "adapters" / "merged")

    console.print("[bold]4.[/] Everyone is asked about new pictures of all tasks.")
    base = LLAVA.load()
    mean = merge_adapter_sequence(LLAVA.load(), list(folders.values()), method="average", projectors="mean")
    methods: dict[str, Callable[[Task], nn.Module]] = {
        "zero-shot": lambda task: base,
        "sequential fine-tuning": lambda task: model,
        "  reasoning collapse": lambda task: with_parts(LLAVA.load, lora=sequential, projectors=folders[task.name]),
        "  perception drift": lambda task: with_parts(LLAVA.load, lora=folders[task.name], projectors=sequential),
        "averaging": lambda task: mean,
        "MAny": lambda task: merged,
    }
    scores: Scores = {
        method: {task.name: examine(model_for(task), task) for task in TASKS}
        for method, model_for in tqdm(methods.items(), desc="asking", unit="method", leave=False)
    }
    scores["each task alone"] = alone
    seconds = time.perf_counter() - started

    console.print(_table(scores))
    console.print(
        "Sequential fine-tuning forgets in two ways. Reasoning collapse: given each task's own projector, its LoRA "
        "still answers wrongly. Perception drift: given each task's own LoRA, its projector still sees wrongly. MAny "
        "is one adapter, merged without training from those that were trained each alone."
    )
    examples = {task.name: task.examples(3, "test", seed + 1) for task in TASKS}
    draw(output / "demo.png", examples, scores)
    results = {"seed": seed, "steps": steps, "tests": tests, "seconds": round(seconds, 1), "accuracy": scores}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(
        f"{seconds:.0f} seconds. Picture: [bold]{output / 'demo.png'}[/]  Numbers: {output / 'results.json'}"
    )
    return scores


def load_merged(output: Path) -> PeftModel:
    """The merge that an earlier run wrote, on a fresh base model."""
    return PeftModel.from_pretrained(LLAVA.load(), output / "adapters" / "merged")


def _batches(task: Task, collate: Collator, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    return shuffled_batches(task.examples(80 * BATCH_SIZE, "train", seed), collate, BATCH_SIZE, seed)


def _table(scores: Scores) -> Table:
    table = Table(title="Exact-match accuracy, %")
    table.add_column("")
    for task in TASKS:
        table.add_column(task.name, justify="right")
    table.add_column("mean", justify="right", style="bold")
    for method, by_task in scores.items():
        cells = [f"{by_task[task.name]:.0f}" for task in TASKS]
        style = "green" if method == "MAny" else "dim" if method.startswith(" ") else None
        table.add_row(method, *cells, f"{sum(by_task.values()) / len(by_task):.1f}", style=style)
    return table
