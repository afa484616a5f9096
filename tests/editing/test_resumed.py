"""Passes that begin where the last one ended: they see what whole passes see, and run each block a few times."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import recursively_apply
from peft import get_peft_model
from torch import nn

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence, refit_merge
from peft_many.editing import resumed
from peft_many.editing.resumed import ResumedPasses
from tests import tiny
from tests.adapters import base, batches, scatter

# Blocks of towers too; LLaVA and its kin read what comes out of the last block but one.
EVERYWHERE = r".*\.\d+\..*(q_proj|qkv|fc1|up_proj|down_proj|linear_fc1)"


def made(folder, family, seed, **options):
    torch.manual_seed(seed)
    model = get_peft_model(base(family), MAnyConfig(r=4, task_name=f"task {seed}", **options))
    scatter(model, seed)
    collect_statistics(model, batches(model, family, seed, rows=4), progress=False)
    model.save_pretrained(folder)
    return folder


def refitted(folders, family):
    model = merge_adapter_sequence(base(family), folders, progress=False)
    refit_merge(model, {f"task {seed}": batches(model, family, seed, rows=4) for seed in (0, 1)}, progress=False)
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize(
    ("family", "where"),
    [*((family, {}) for family in (*tiny.FAMILIES, "llama")), *((f, EVERYWHERE) for f in ("llava", "qwen3_vl"))],
)
def test_a_refit_is_that_of_whole_passes(tmp_path, monkeypatch, family, where):
    options = {"target_modules": where} if where else {}
    folders = [made(tmp_path / str(seed), family, seed, **options) for seed in (0, 1)]
    found = refitted(folders, family)
    monkeypatch.setattr(ResumedPasses, "over", lambda self, key: contextlib.nullcontext())
    expected = refitted(folders, family)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x + self.two(torch.tanh(self.one(x)))


class Model(nn.Module):
    """Blocks behind a tower. Those of some models read outputs of earlier blocks again."""

    def __init__(self, rereads: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.blocks, self.rereads = Block(), nn.ModuleList(Block() for _ in range(4)), rereads

    def forward(self, x):
        x, first = self.tower(x), None
        for block in self.blocks:
            x = block(x)
            if self.rereads:
                first = x[:, :3] if first is None else first
                x = torch.cat([first, x[:, 3:]], dim=1)
        return x


def layers_of(model):
    return {path: layer for path, layer in model.named_modules() if path[-3:] in ("one", "two") and "blocks" in path}


@torch.no_grad()
def arriving(model, path, passes=None):
    """What goes into a layer, in a pass like the last one, or in a whole one."""
    arrived = []
    begun = contextlib.nullcontext() if passes is None else passes.over("a batch")
    with model.get_submodule(path).register_forward_pre_hook(lambda _, args: arrived.append(args[0].clone())), begun:
        model(torch.linspace(-1, 1, 12).view(3, 4))
    return arrived[0]


def gone_through(model, passes):
    """As a refit does."""
    for path, layer in layers_of(model).items():
        assert torch.equal(arriving(model, path, passes), arriving(model, path))
        with torch.no_grad():
            layer.weight.mul_(1.1)
        passes.settle([path])


@pytest.mark.parametrize("rereads", [False, True])
def test_every_layer_sees_what_it_sees_in_a_whole_pass(rereads):
    model = Model(rereads)
    gone_through(model, ResumedPasses(model, layers_of(model)))
    assert not any("forward" in vars(module) for module in model.modules()), "nothing is left behind"
    whole = len(layers_of(model))
    assert model.tower.runs == whole + 1
    assert model.blocks[0].runs == whole + 3, "while each of its two layers changed, and once afterwards"


@pytest.mark.parametrize(
    ("rereads", "kept"), [(False, ["tower", "blocks.2"]), (True, ["tower", "blocks.0", "blocks.2"])]
)
def test_of_blocks_only_outputs_that_are_read_again_are_kept(rereads, kept):
    model = Model(rereads)
    passes = ResumedPasses(model, layers_of(model))
    gone_through(model, passes)
    (calls,) = passes._calls.values()
    assert [call.unit for call in calls if call._kept.untyped_storage().nbytes() > 4] == kept


def test_with_too_little_memory_passes_are_whole(monkeypatch):
    monkeypatch.setattr(resumed.psutil, "virtual_memory", lambda: SimpleNamespace(available=1, total=100))
    model = Model()
    gone_through(model, ResumedPasses(model, layers_of(model)))
    assert model.tower.runs == 2 * len(layers_of(model))


def test_a_pass_that_goes_another_way_runs_what_it_needs():
    model = Model()
    passes = ResumedPasses(model, layers_of(model))
    arriving(model, "blocks.0.one", passes)
    model.tower = nn.Identity()
    assert torch.equal(arriving(model, "blocks.0.one", passes), arriving(model, "blocks.0.one"))


def test_a_pass_that_needs_what_was_not_kept_is_an_error():
    class Turning(Model):
        def forward(self, x):
            for number in (3, 0, 1, 2) if self.rereads else (3, 2, 1, 0):
                x = self.blocks[number](x)
            return x

    model = Turning()
    passes = ResumedPasses(model, layers := layers_of(model))
    for path in [*layers][::-1][:5]:
        arriving(model, path, passes)
        passes.settle([path])
    model.rereads = True
    with pytest.raises(RuntimeError, match=r"did not run 'blocks\.0' at this place"):
        arriving(model, "blocks.0.one", passes)


def test_blocks_that_are_not_called_as_such_change_all_the_same():
    class Inside(Model):
        def forward(self, x):
            for block in self.blocks:
                x = x + block.two(torch.tanh(block.one(self.tower(x))))
            return x

    model = Inside()
    gone_through(model, ResumedPasses(model, layers_of(model)))


def test_what_a_projector_has_read_of_a_tower_is_dropped():
    model = base("llava")
    (batch,) = batches(model, "llava", 0, rows=1)
    layers = {path: layer for path, layer in model.named_modules() if path.endswith("layers.0.self_attn.q_proj")}
    path = next(path for path in layers if "language_model" in path)
    passes = ResumedPasses(model, {path: layers[path]})
    with passes.over("a batch"), torch.no_grad():
        model(**batch)
    sizes = {}
    for call in passes._calls["a batch"]:
        recursively_apply(lambda kept, unit=call.unit: sizes.update({unit: kept.untyped_storage().size()}), call._kept)
    assert sizes["model.vision_tower"] <= 8
    assert sizes["model.multi_modal_projector"] > 1_000
