"""A training step of a small model with `MAnyConfig`, beside PEFT's LoRA on the same layers and projector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from peft_many import MAnyConfig

from .lab import Lab
from .model import batch, build, with_labels
from .steps import Record, Step

TURNS = 3
LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def training(lab: Lab, record: Record) -> None:
    """Both models' steps in turns, so that a slow spell hits both."""
    r = lab.sizes.r
    peft = LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEARS, modules_to_save=["multi_modal_projector"])
    steps = {"MAny": _step(lab, MAnyConfig(r=r, lora_alpha=2 * r)), "PEFT LoRA": _step(lab, peft)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        lab.meter.seconds(step, warm=2)
        record.number(f"{name}, counted", lab.meter.counted(step))
        if lab.meter.is_cuda:
            record.number(f"{name}, CUDA's waits", lab.meter.waited(step))
    for turn in range(TURNS):
        for name, step in list(steps.items())[:: -1 if turn % 2 else 1]:

            def several(step: Callable[[], None] = step) -> None:
                for _ in range(lab.sizes.steps):
                    step()

            seconds[name].append(lab.meter.seconds(several) / lab.sizes.steps)
    for name, found in seconds.items():
        record.number(name, min(found))
    record.number("over PEFT LoRA", record.numbers["MAny"] / record.numbers["PEFT LoRA"])


def _step(lab: Lab, config: PeftConfig) -> Callable[[], None]:
    """A training step of a model of its own, with autocast as `Trainer(bf16=True)` has it."""
    sizes = lab.sizes.trained
    model = get_peft_model(build(sizes, lab.device, torch.float32), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    given = with_labels(batch(sizes, lab.device, torch.float32, 0))

    def step() -> None:
        with torch.autocast(lab.device.type, torch.bfloat16):
            loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = (Step("training", training, 40),)
