"""Batch norms: those of the frozen base model stay as they are in training, so that all tasks share one base model."""

import copy
import io
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import PeftWarning
from torch import nn

from peft_many import MAnyConfig, collect_statistics
from tests.adapters import scatter


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


def remade(model, how):
    """Copies keep their norms too."""
    if how == "pickled":
        file = io.BytesIO()
        torch.save(model, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    return copy.deepcopy(model) if how == "copied" else model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("how", ["itself", "copied", "pickled"])
def test_whoever_calls_train(affine, how):
    model = remade(adapted(affine), how)
    for inner in (model.get_base_model(), model.get_base_model().head, model.get_base_model().norm):
        inner.train()
        assert moved(model) == set()
    in_place = Tower(affine)
    inject_adapter_in_model(MAnyConfig(target_modules=["head.0"]), in_place)  # as transformers' `add_adapter` does
    assert moved(remade(in_place, how).train()) == set()


@pytest.mark.parametrize("how", ["itself", "copied", "pickled"])
def test_without_adapters_they_move_again(how):
    model = remade(adapted(), how)
    base = model.get_base_model()
    model.add_adapter("other", MAnyConfig(target_modules=["head.0"]))
    model.delete_adapter("default")
    assert moved(model.train()) == set()
    model.delete_adapter("other")
    for left in (base, remade(adapted(), how).unload(), remade(adapted(), how).merge_and_unload()):
        left.requires_grad_(True)
        assert moved(left.train()) == {"norm", "head.1"}
        assert vars(left.norm).keys() == vars(Tower().norm).keys()
        assert not left.norm._forward_pre_hooks


def test_a_copy_of_a_second_adapter_moves_too():
    model = adapted(affine=False)
    model.add_adapter("other", MAnyConfig(target_modules=["head.0"], modules_to_save=["norm"]))
    model.set_adapter("other")
    assert moved(model.train()) == {"base_model.model.norm.modules_to_save.other"}


def test_a_compiled_model_keeps_them_in_one_graph():
    model = adapted()
    expected = model.eval()(torch.ones(8, 3, 5))
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    model.get_base_model().dropout.eval()
    assert moved(compiled) == set()
    assert torch.allclose(compiled(torch.ones(8, 3, 5)), expected)


def test_statistics_that_moved_are_noticed_when_measured():
    """Adapters of other types leave the batch norms in training mode."""
    model = get_peft_model(Tower(), LoraConfig(target_modules=["head.0"])).train()
    assert moved(model) == {"base_model.model.norm", "base_model.model.head.1"}
    with pytest.warns(PeftWarning, match="frozen batch norm 'norm' is in training mode"):
        collect_statistics(model, [torch.randn(8, 3, 5)], progress=False)
    for quiet in (model.eval(), adapted().train()):
        scatter(quiet, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            collect_statistics(quiet, [torch.randn(8, 3, 5)], progress=False)
