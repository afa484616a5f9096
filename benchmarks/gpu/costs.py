"""What a merge's life costs on the device, at LLaVA-1.5-7B's size: collecting, merging, calling, generating."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_many import collect_statistics, merge_adapter_files

from .checks import deltas
from .lab import Lab
from .meters import Noted
from .model import Batch, adapted, save_adapter
from .steps import Record, SkippedError, Step

STRENGTH = 0.01
# Of a decoder layer, the kinds of linear layers of one shape each, and how many there are of it.
SHAPES = {"self_attn.q_proj": 4, "mlp.gate_proj": 2, "mlp.down_proj": 1}
MERGED = {"merge": {}, "gated": {"gate_lora": True, "router": "gaussian"}}


def collecting(lab: Lab, record: Record) -> None:
    """Collecting over the same forward passes, for each batch: of three times the batches, less of once."""
    meter, sizes = lab.meter, lab.sizes
    batches = [lab.batch(0, seed) for seed in range(sizes.batches)]
    with lab.base() as base:
        model = adapted(base, 0, sizes.r, STRENGTH)

        def forward(given: list[Batch] = batches) -> None:
            with torch.no_grad():
                for batch in given:
                    model(**batch)

        def collect(given: Any = batches) -> None:
            collect_statistics(model, given, max_samples=None, progress=False)

        plain = meter.seconds(forward, repeats=2, warm=1)
        record.number("forward passes", plain)
        record.number("collecting, first", meter.seconds(collect))
        once = meter.seconds(collect, repeats=3)
        record.number("collecting", once)
        record.number("collecting, three times the batches", meter.seconds(lambda: collect(batches * 3)))
        thrice = record.numbers["collecting, three times the batches"]
        record.number("over forward passes", (thrice - once) / (2 * min(plain, meter.seconds(forward))))
        noted = Noted(batches, meter)
        collect(noted)
        meter.wait()
        record.number("finishing", time.perf_counter() - noted.ended)
        if meter.is_cuda:
            alone = meter.peak(forward)
            record.number("memory added", meter.peak(collect) - alone)
        else:
            record.skip("memory added", "needs CUDA")
        _count_collecting(lab, record, model, batches)
        record.number("saving", meter.seconds(lambda: model.save_pretrained(lab.adapters[0])))
        model.unload()


def _count_collecting(lab: Lab, record: Record, model: PeftModel, batches: list[Batch]) -> None:
    """Kernels and waits that each further batch adds to its forward pass, by measured input."""

    def collect(count: int) -> None:
        found = collect_statistics(model, batches[:1] * count, max_samples=None, progress=False)
        inputs.append(len(found.tasks[0].inputs))

    def forward() -> None:
        with torch.no_grad():
            model(**batches[0])

    inputs: list[int] = []
    alone, two, three = (lab.meter.counted(call) for call in (forward, lambda: collect(2), lambda: collect(3)))
    record.number("kernels of a forward pass", alone["kernels"])
    record.number("kernels for an input and batch", (three["kernels"] - two["kernels"] - alone["kernels"]) / inputs[0])
    record.number("waits for a batch", three["waits"] - two["waits"] - alone["waits"])
    if lab.meter.is_cuda:
        two, three = (lab.meter.waited(lambda count=count: collect(count)) for count in (2, 3))
        record.number("CUDA's waits", {"for a batch": three["waits"] - two["waits"], "of three batches": three})


def others(lab: Lab, record: Record) -> None:
    """The other tasks' adapters, on few batches."""
    with lab.base() as base:
        for task, folder in list(enumerate(lab.adapters))[1:]:
            batches = [lab.batch(task, seed) for seed in range(lab.sizes.few_batches)]
            save_adapter(base, folder, task, batches, lab.sizes.r, STRENGTH)


def merging(lab: Lab, record: Record) -> None:
    """From disk to disk: the second run, and the gated merge's."""
    _need(lab.adapters)
    for name, options, again in (("merge", MERGED["merge"], True), ("gated", MERGED["gated"], False)):
        folder = lab.scratch / name

        def merge(folder: Path = folder, options: dict[str, Any] = options) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            merge_adapter_files(lab.adapters, folder, device=lab.device, progress=False, **options)

        record.number(f"{name}, first", lab.meter.seconds(merge))
        if again:
            record.number(name, lab.meter.seconds(merge))
            record.number("bytes read", _bytes(*lab.adapters))
            record.number("bytes written", _bytes(folder))
            if lab.meter.is_cuda:
                record.number("memory", lab.meter.peak(merge))


def merging_on_cpu(lab: Lab, record: Record) -> None:
    """The same merge on this machine's CPU: how long it takes, and whether it is the same."""
    _need([*lab.adapters, lab.scratch / "merge"])
    output = lab.scratch / "merge on the CPU"
    record.number("seconds", lab.meter.seconds(lambda: merge_adapter_files(lab.adapters, output, progress=False)))
    last = lab.sizes.model.text["num_hidden_layers"] - 1
    few = (".layers.0.", f".layers.{last}.")
    record.check("deltas", deltas(lab.scratch / "merge", few), deltas(output, few), 1e-5)
    shutil.rmtree(output)


def peft_svd(lab: Lab, record: Record) -> None:
    """PEFT's `svd` on one layer of each shape, times how many there are; only of what is used."""
    total = 0.0
    with lab.base() as base:
        for kind, count in SHAPES.items():
            target = rf".*language_model\.layers\.0\.{kind}"
            config = LoraConfig(r=lab.sizes.r, init_lora_weights=False, target_modules=target)
            model = get_peft_model(base, config, "task_0")
            names = [f"task_{task}" for task in range(lab.sizes.tasks)]
            for name in names[1:]:
                model.add_adapter(name, config)
            weights = [1.0] * len(names)
            seconds = lab.meter.seconds(
                lambda: model.add_weighted_adapter(names, weights, "merged", "svd", svd_full_matrices=False)  # noqa: B023
            )
            record.number(kind, seconds)
            total += seconds * count * lab.sizes.model.text["num_hidden_layers"]
            model.unload()
    record.number("all layers, extrapolated", total)


def calling(lab: Lab, record: Record) -> None:
    """A forward pass, and some tokens of `generate`, of a merge over those of one adapter."""
    sizes, meter = lab.sizes, lab.meter
    batch = lab.batch(0, seed=7)
    two_rows = {name: tensor[:2] for name, tensor in batch.items()}
    tokens = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens, "do_sample": False}
    folders = {"one adapter": lab.adapters[0], "merge": lab.scratch / "merge", "gated": lab.scratch / "gated"}
    _need(list(folders.values()))
    for name, folder in [*folders.items(), ("one adapter, again", lab.adapters[0])]:
        start = time.perf_counter()
        with lab.with_adapter(folder) as model:
            record.number(f"loading, {name}", time.perf_counter() - start)

            def forward(model: PeftModel = model) -> None:
                with torch.no_grad():
                    model(**batch)

            def generate(model: PeftModel = model) -> None:
                model.generate(**two_rows, **tokens)

            record.number(f"forward, {name}", meter.seconds(forward, sizes.repeats, warm=2))
            record.number(f"generate, {name}", meter.seconds(generate, sizes.repeats, warm=1))
            record.number(f"forward, {name}, counted", meter.counted(forward))
            record.number(f"generate, {name}, counted", meter.counted(generate))
            if meter.is_cuda:
                record.number(f"forward, {name}, CUDA's waits", meter.waited(forward))
    for what in ("forward", "generate"):
        # Measured before and after, so that a GPU that has become warm, and slow, is no merge's fault.
        least = min(record.numbers[f"{what}, {name}"] for name in ("one adapter", "one adapter, again"))
        for name in ("merge", "gated"):
            record.number(f"{what}, {name} over one adapter", record.numbers[f"{what}, {name}"] / least)


def _need(folders: list[Path]) -> None:
    missing = next((folder.name for folder in folders if not (folder / "adapter_model.safetensors").is_file()), None)
    if missing is not None:
        raise SkippedError(f"it needs '{missing}', which a step before should have made")


def _bytes(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


STEPS = (
    Step("collecting", collecting, 100),
    Step("other adapters", others, 60),
    Step("merging at full size", merging, 50),
    Step("calling", calling, 60),
)
COMPARISONS = (Step("PEFT's svd", peft_svd, 30), Step("merging on the CPU", merging_on_cpu, 40))
