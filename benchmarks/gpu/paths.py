"""The other ways through a model: other attention kernels, compiled, in CUDA graphs, offloaded, checkpointed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig

from peft_many import collect_statistics

from .lab import CHECKED_R, CPU, MERGES, STRENGTH, TOLERANCES, Checked, Lab, covariances, logits
from .model import Batch, adapted, with_labels
from .steps import Record, SkippedError, Step

LANGUAGE_MODEL = r"model\.language_model\..*_proj"
PROJECTOR = "model.multi_modal_projector"
NEW_TOKENS = 8


def attention(lab: Lab, record: Record) -> None:
    """Merges, and what is measured, by all attention kernels there are; without a mask, which flash cannot have."""
    checked = lab.checked
    dtype = torch.bfloat16 if lab.meter.is_cuda else torch.float32
    given = _without_mask(checked.batches(0)[0])

    def found(device: torch.device, dtype: torch.dtype, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in given.items()}
        merged = checked.merged("gated", checked.base(device, dtype, attn_implementation=kind))
        with torch.no_grad():
            said = merged(**inputs).logits.float()
        one = PeftModel.from_pretrained(checked.base(device, dtype, attn_implementation=kind), checked.folders[0])
        return said, covariances(collect_statistics(one, [inputs], energy=1.0, progress=False))

    expected = found(CPU, torch.float32, "eager")
    kernels = {"sdpa, math": SDPBackend.MATH, "sdpa, flash": SDPBackend.FLASH_ATTENTION}
    for name, kernel in {"eager": None, **kernels, "flash_attention_2": None}.items():
        if name == "flash_attention_2" and (not lab.meter.is_cuda or importlib.util.find_spec("flash_attn") is None):
            record.skip(name, "needs CUDA and the package flash_attn")
            continue
        if kernel is None:
            of_kernel = found(lab.device, dtype, name)
        else:
            with sdpa_kernel(kernel):
                of_kernel = found(lab.device, dtype, "sdpa")
        record.check(f"{name}, gated merge", of_kernel[0], expected[0], TOLERANCES[dtype])
        record.check(f"{name}, statistics", of_kernel[1], expected[1], TOLERANCES[dtype])


def compiled(lab: Lab, record: Record) -> None:
    """Compiled merges say the same; into how many graphs they break, beside PEFT's LoRA on the same layers."""
    checked, given = lab.checked, lab.checked.mixed()
    lora = get_peft_model(checked.base(), LoraConfig(r=4, target_modules=LANGUAGE_MODEL)).eval()
    merges = {name: checked.merged(name, checked.base()) for name in ("plain", "gated")}
    for name, model in {"PEFT LoRA": lora, **merges}.items():
        graphs: list[Any] = []

        def note(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        found = _compiled(model, given, note)
        reasons = sorted({reason.strip().splitlines()[0][:100] for reason in counters["graph_break"]})
        record.number(f"{name}, graphs", {"count": len(graphs), "why": reasons})
        if name in merges:
            extra = len(graphs) - record.numbers["PEFT LoRA, graphs"]["count"]
            record.number(f"{name}, further graphs", extra)
            record.check(name, found, checked.expected[name], TOLERANCES[torch.float32])


def _compiled(model: nn.Module, given: Batch, backend: Any) -> Tensor:
    torch._dynamo.reset()
    counters.clear()
    try:
        return logits(torch.compile(model, backend=backend), given)
    finally:
        torch._dynamo.reset()


def generating(lab: Lab, record: Record) -> None:
    """Tokens of `generate`: on the device, with a static cache, and decoded by CUDA graphs."""
    checked, given = lab.checked, lab.checked.mixed()
    if not lab.meter.is_cuda:
        record.skip("CUDA graphs", "needs CUDA")
    backend = "cudagraphs" if lab.meter.is_cuda else "eager"
    for name in ("plain", "gated"):
        expected = _generated(checked.merged(name, checked.base(CPU), CPU), checked.mixed(CPU))
        merged = checked.merged(name, checked.base())
        record.check(name, _generated(merged, given), expected, 0.0)
        found = _generated(merged, given, cache_implementation="static", disable_compile=True)
        record.check(f"{name}, static cache", found, expected, 0.0)
        config = CompileConfig(backend=backend, mode="default")
        _generate_compiled(lab, record, f"{name}, {backend}", merged, config, expected)


def _generate_compiled(
    lab: Lab, record: Record, name: str, merged: PeftModel, config: CompileConfig, expected: Tensor
) -> None:
    """Twice, since the first may record a graph that the second replays; then how many graphs were launched."""
    config._compile_all_devices = True
    torch._dynamo.reset()

    def call() -> Tensor:
        return _generated(merged, lab.checked.mixed(), cache_implementation="static", compile_config=config)

    for turn in ("first", "again"):
        record.check(f"{name}, {turn}", call(), expected, 0.0)
    if lab.meter.is_cuda:
        record.number(name, lab.meter.profiled(call))
    torch._dynamo.reset()


def by_inductor(lab: Lab, record: Record) -> None:
    """The same by PyTorch's own compiler, as transformers compiles by default; this takes long."""
    if not lab.meter.is_cuda:
        raise SkippedError("needs CUDA")
    compilers = filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))
    if not any(map(shutil.which, compilers)) or importlib.util.find_spec("triton") is None:
        raise SkippedError("needs Triton and a C compiler")
    checked = lab.checked
    for name in ("plain", "gated"):
        merged = checked.merged(name, checked.base())
        record.check(name, _compiled(merged, checked.mixed(), "inductor"), checked.expected[name], 1e-3)
        expected = _generated(checked.merged(name, checked.base(CPU), CPU), checked.mixed(CPU))
        _generate_compiled(lab, record, f"{name}, generating", merged, CompileConfig(), expected)


def offloaded(lab: Lab, record: Record) -> None:
    """A model of which one part is on the device and the language model elsewhere: on the CPU, here on disk."""
    checked = lab.checked
    main: Any = lab.device if not lab.meter.is_cuda else lab.device.index or 0
    away = "cpu" if lab.meter.is_cuda else "disk"
    places = {"model.vision_tower": main, PROJECTOR: main, "model.language_model": away, "lm_head": main}

    def dispatched(name: str) -> nn.Module:
        folder = checked.scratch / "offloaded" / name
        return dispatch_model(checked.base(CPU), places, main_device=main, offload_dir=str(folder))

    for name in MERGES:
        merged = checked.merged(name, dispatched(name))
        record.check(name, logits(merged, checked.mixed()), checked.expected[name], TOLERANCES[torch.float32])
    found, expected = (
        covariances(
            collect_statistics(
                PeftModel.from_pretrained(model, checked.folders[0]), batches, energy=1.0, progress=False
            )
        )
        for model, batches in (
            (dispatched("statistics"), checked.batches(0)),
            (checked.base(CPU), checked.batches(0, CPU)),
        )
    )
    record.check("statistics", found, expected, TOLERANCES[torch.float32])


def checkpointed(lab: Lab, record: Record) -> None:
    """Gradients of a training step, with and without gradient checkpointing."""
    expected = gradients(adapter_to_train(lab.checked, CPU), lab.checked.batches(0, CPU)[0])
    model, given = adapter_to_train(lab.checked, lab.device), lab.checked.batches(0)[0]
    record.check("whole", gradients(model, given), expected, 1e-3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    record.check("checkpointed", gradients(model, given), expected, 1e-3)


def adapter_to_train(checked: Checked, device: torch.device) -> PeftModel:
    """The first task's, in training mode; the models have no dropout."""
    return adapted(checked.base(device), 0, CHECKED_R, STRENGTH).train()


def gradients(model: nn.Module, given: Batch) -> dict[str, Tensor]:
    """Of all that is trained, after a step on a batch."""
    model.zero_grad()
    model(**with_labels(given)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _without_mask(given: Batch) -> Batch:
    return {name: tensor for name, tensor in given.items() if name != "attention_mask"}


def _generated(model: Any, given: Batch, **options: Any) -> Tensor:
    tokens = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(**given, **tokens, **options)[:, -NEW_TOKENS:]


STEPS = (
    Step("attention", attention, 15),
    Step("compiled", compiled, 30),
    Step("generating", generating, 40),
    Step("offloaded", offloaded, 15),
    Step("checkpointed", checkpointed, 5),
)
LAST = (Step("compiled by inductor", by_inductor, 80),)
