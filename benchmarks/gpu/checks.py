"""Is a merge on the device what it is on the CPU? Statistics, merging, routing and gates, by dtype and autocast."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from peft_many import collect_statistics, merge_adapter_files

from .lab import CPU, MERGES, TOLERANCES, Lab, covariances, logits, short
from .model import one_by_one
from .steps import Record, Step

# Statistics to check, by name. A sketch multiplies in less than float32, and is kept in half precision.
WAYS = {"whole": {"energy": 1.0}, "a sketch": {"rank": 24}}
ROUNDED = 1e-2


def deltas(folder: Path, among: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """By layer `B A` of an adapter's file, float64; of those layers whose names have one of these parts."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        pairs = [key for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118  # it is no mapping
        layers = [key for key in pairs if any(part in key for part in among)]
        get = file.get_tensor
        return {A: get(A.replace("lora_A", "lora_B")).double() @ get(A).double() for A in layers}


def merging(lab: Lab, record: Record) -> None:
    """Merging on the device gives what merging on the CPU does."""
    checked = lab.checked
    for name, options in {**MERGES, "of rank 12": {"rank": 12}, "by TIES": {"method": "ties"}}.items():
        found = []
        for device in (lab.device, CPU):
            output = checked.scratch / "checked" / f"{name} on {device.type}{len(found)}"
            merge_adapter_files(checked.folders, output, device=device, progress=False, **options)
            found.append(deltas(output))
        record.check(name, *found, most=1e-4 if "method" in options else 1e-5)


def statistics(lab: Lab, record: Record) -> None:
    """Collecting on the device, in models of every dtype and under autocast, gives what the CPU does in float32."""
    checked = lab.checked
    for way, options in WAYS.items():

        def collected(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
            model = PeftModel.from_pretrained(checked.base(device, dtype), checked.folders[0]).eval()
            batches = checked.batches(0, device, dtype)
            return covariances(collect_statistics(model, batches, progress=False, **options))  # noqa: B023

        expected = collected(CPU)
        for dtype, most in TOLERANCES.items():
            limit = max(most, ROUNDED if way == "a sketch" else 0.0)
            record.check(f"{way}, {short(dtype)}", collected(lab.device, dtype), expected, limit)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(lab.device.type, dtype):
                found = collected(lab.device)
            record.check(f"{way}, autocast to {short(dtype)}", found, expected, TOLERANCES[dtype])


def outputs(lab: Lab, record: Record) -> None:
    """A merge says on the device what it does on the CPU in float32: of rows together, and of each row alone."""
    checked = lab.checked
    for dtype, most in TOLERANCES.items():
        for name in MERGES:
            model, given = checked.merged(name, checked.base(dtype=dtype)), checked.mixed(dtype=dtype)
            record.check(f"{name}, {short(dtype)}", logits(model, given), checked.expected[name], most)
            alone = torch.cat([logits(model, row) for row in one_by_one(given)])
            record.check(f"{name}, {short(dtype)}, row by row", alone, checked.expected[name], most)


def autocast(lab: Lab, record: Record) -> None:
    """Merging under autocast changes nothing in the merge, and its outputs by rounding only."""
    checked = lab.checked
    for dtype in (torch.bfloat16, torch.float16):
        for name in MERGES:
            with torch.autocast(lab.device.type, dtype):
                model = checked.merged(name, checked.base())
                found = logits(model, checked.mixed())
            record.check(f"{name}, {short(dtype)}", found, checked.expected[name], TOLERANCES[dtype])
            outside = logits(model, checked.mixed())
            record.check(f"{name}, merged in {short(dtype)}", outside, checked.expected[name], 1e-4)


STEPS = (
    Step("merging", merging, 15),
    Step("statistics", statistics, 20),
    Step("outputs", outputs, 25),
    Step("autocast", autocast, 20),
)
