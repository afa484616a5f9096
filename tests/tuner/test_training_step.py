"""A training step launches what one of PEFT's own LoRA does; and what a merge computes is not attention's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from benchmarks.gpu.launches import Launches, launches
from peft_many import MAnyConfig
from tests import tiny
from tests.adapters import PROJECTOR
from tests.files import making
from tests.routing.test_gates import HARD, inputs_of, logits

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_LANGUAGE_MODEL = rf".*language_model.*\.({'|'.join(LAYERS)})"


def step(config: PeftConfig, dtype: torch.dtype, autocast: bool, checkpointing: bool) -> Launches:
    """What the second step of a training launches."""
    model = get_peft_model(tiny.build("llava", dtype=dtype), config).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable()
    batch = tiny.batch(model, "llava", [[tiny.random_image("llava", row, style=row)] for row in range(2)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()

    run()
    return launches(run)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_launches_what_peft_launches(dtype: torch.dtype, autocast: bool, checkpointing: bool) -> None:
    of_peft = LoraConfig(r=4, target_modules=OF_LANGUAGE_MODEL, modules_to_save=[PROJECTOR])
    ours, theirs = (step(config, dtype, autocast, checkpointing) for config in (MAnyConfig(r=4), of_peft))
    assert ours.waits == theirs.waits
    if dtype == torch.float32:
        assert ours.kernels == theirs.kernels
    else:  # PEFT trains the projector in bfloat16; ours is cast to float32 and back, once in each direction
        assert ours.kernels.total() - theirs.kernels.total() <= 12
        assert set(ours.kernels - theirs.kernels) <= {"_to_copy", "addmm"}


def merged(gate: bool, **options: Any) -> nn.Module:
    return making.merge("llava", temperature=HARD, gate_lora=gate, **options)


@pytest.mark.parametrize("gate", [False, True])
def test_attention_of_all_kinds(gate: bool) -> None:
    inputs, found = inputs_of("llava"), []
    for kind in ("eager", "sdpa"):
        model = merged(gate)
        model.get_base_model().set_attn_implementation(kind)
        assert model.get_base_model().config.text_config._attn_implementation == kind
        found.append(logits(model, inputs)[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_through_a_routed_merge(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = merged(gate=False).train(), inputs_of("llava")
        inputs["pixel_values"].requires_grad_()
        if checkpointing:
            base = model.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).logits.square().mean().backward()
        gradients.append(inputs["pixel_values"].grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)
