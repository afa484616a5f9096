"""Replicas as `nn.DataParallel` makes them, into which `Trainer` wraps a model where there are several GPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_many import merge_adapter_sequence
from tests.adapters import base, batches, make


def replica_of(model: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` does for each GPU, with copies on the CPU, for which it does nothing."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, child and copies[child])
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            setattr(replica, name, tensor if tensor is None else tensor.detach().clone())
    return copies[model]


@pytest.mark.parametrize("gate_lora", [False, True])
@pytest.mark.parametrize("router", ["cosine", "gaussian"])
@torch.no_grad()
def test_replicas_route_with_their_own_projectors(tmp_path: Path, router: str, gate_lora: bool) -> None:
    adapters = [make(tmp_path / name, seed=seed, task_name=name).folder for seed, name in enumerate("abc")]
    options = {"router": router, "gate_lora": gate_lora, "progress": False}
    model = merge_adapter_sequence(base("llava"), adapters, **options).eval()
    shares = [batches(model, "llava", task)[0] for task in range(3)]
    expected = [model(**share).logits for share in shares]
    replicas = [replica_of(model) for _ in shares]
    for parameter in model.parameters():
        parameter.zero_()

    def answer(replica: nn.Module, share: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return replica(**share).logits

    with ThreadPoolExecutor() as threads:
        assert all(map(torch.equal, threads.map(answer, replicas, shares), expected))
