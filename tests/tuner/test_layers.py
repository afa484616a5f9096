"""Batch norms: those of the frozen base model stay as they are in training, so that all tasks share one base model."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftWarning
from torch import nn

from peft_many import MAnyConfig, collect_statistics


class Tower(nn.Module):
    def __init__(self, affine=True):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.norm = nn.BatchNorm1d(3, affine=affine)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.dropout(self.norm(self.conv(x))).mean(-1))


def adapted(affine=True, **options):
    return get_peft_model(Tower(affine), MAnyConfig(target_modules=["head.0", "head.2"], **options))


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "num_" in name}


def moved(model, steps=3):
    """The batch norms whose statistics training moves."""
    before = statistics(model)
    for _ in range(steps):
        model(torch.randn(8, 3, 5) + 2).sum().backward()
    return {
        name.rpartition(".")[0] for name, buffer in statistics(model).items() if not torch.equal(buffer, before[name])
    }


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("by_train", [True, False])
def test_frozen_statistics_stay(affine, by_train):
    model = adapted(affine)
    if by_train:
        model = model.eval().train()
    assert model.training
    assert model.get_base_model().dropout.training
    assert moved(model) == set()


@pytest.mark.parametrize("affine", [True, False])
def test_those_of_a_trained_copy_move(affine, tmp_path):
    model = adapted(affine, modules_to_save=["norm"]).train()
    assert moved(model) == {"base_model.model.norm.modules_to_save.default"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Tower(affine), tmp_path)
    expected = model.eval().get_base_model().norm.modules_to_save["default"].running_mean
    assert torch.equal(loaded.get_base_model().norm.modules_to_save["default"].running_mean, expected)
    assert not loaded.training


def test_those_whose_bias_is_trained_move():
    model = adapted()
    model.get_base_model().norm.bias.requires_grad_(True)
    assert moved(model.train()) == {"base_model.model.norm"}


def test_a_wrapped_model_is_kept_too():
    """As `Trainer` calls `train` on whatever it has wrapped the model in."""
    model = adapted()
    assert moved(nn.Sequential(model).train()) == set()
    model.add_adapter("other", MAnyConfig(target_modules=["head.0"]))
    assert moved(model.train()) == set()


def test_statistics_that_moved_are_noticed_when_measured():
    """Adapters of other types leave the batch norms in training mode."""
    model = get_peft_model(Tower(), LoraConfig(target_modules=["head.0"])).train()
    assert moved(model) == {"base_model.model.norm", "base_model.model.head.1"}
    with pytest.warns(PeftWarning, match="frozen batch norm 'norm' is in training mode"):
        collect_statistics(model, [torch.randn(8, 3, 5)], progress=False)
    for quiet in (model.eval(), adapted().train()):
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            collect_statistics(quiet, [torch.randn(8, 3, 5)], progress=False)
