"""A pass over a model leaves the random states alone, and those of devices that it does not use untouched."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_many.statistics.forward import state_kept


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["cpu"], []),
        (["meta", "cpu"], []),
        (["cuda:3"], [3]),
        (["cuda:2", "cpu", "cuda:0", "meta", "cuda:2"], [0, 2]),
    ],
)
def test_random_states_of_the_models_own_devices_are_kept(monkeypatch, places, expected):
    kept = []

    @contextlib.contextmanager
    def fork_rng(devices, device_type):
        kept.append((device_type, list(devices)))
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with FakeTensorMode():  # as if there were GPUs
        model = nn.Module()
        model.weights = nn.ParameterList([nn.Parameter(torch.empty(1, device=place)) for place in places])
        with state_kept(model):
            pass
    assert kept == [("cuda", expected)]
