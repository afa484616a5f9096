"""`collect_statistics` in whole models: the numbers are right, and nothing else about the model has changed."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.sketch import CovarianceAccumulator
from peft_many.algebra.total import FiniteCheck
from peft_many.families.parts import find_projectors
from peft_many.files.statistics import STATISTICS_NAME, AdapterStatistics
from peft_many.routing.watching import IMAGE_METHODS
from peft_many.statistics.measurable import weights_of
from peft_many.statistics.projectors import projector_shapes, unmoved_projectors
from peft_many.tuner.layers import adapted_layers, lora_layers
from tests import tiny
from tests.adapters import covariances, scatter
from tests.files import making
from tests.files.making import PROJECTORS, perturb, pictures

family = pytest.mark.parametrize("family", tiny.FAMILIES)


def adapted(family: str = "llava", **options: Any) -> PeftModel:
    if family not in tiny.FAMILIES:
        base, options = tiny.build_text(family), {"target_modules": "all-linear", **options}  # type: ignore[arg-type]
    else:
        base = tiny.build(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, MAnyConfig(**{"r": 4, **options}))
    perturb(model, "default", seed=0)
    return model


def collect(model: nn.Module, batches: Any, **options: Any) -> AdapterStatistics:
    """Whole covariances where a test does not say how much of them to keep."""
    whole = {} if {"rank", "energy", "error_budget", "dtype"} & {*options} else {"energy": 1.0}
    return collect_statistics(model, batches, **{"progress": False, **whole, **options})


def text_batches(kind: str = "llama", count: int = 2, rows: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(count):
        ids = torch.randint(3, 100, (rows, 7), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):  # left and right in turn, of different lengths
            padding = slice(0, row) if number % 2 == 0 else slice(7 - row, 7)
            ids[row, padding], mask[row, padding] = tiny.PAD, 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@contextlib.contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of layers in each call; the test's own hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handles = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].clone()))
        for name in names
    ]
    yield seen
    for handle in handles:
        handle.remove()


def second_moment(rows: list[Tensor]) -> Tensor:
    together = torch.cat(rows).double()
    return together.T @ together / len(together)


def layer_names(model: PeftModel) -> list[str]:
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that measuring must leave as it is."""
    switches = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    state = np.random.get_state()
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "active": [(list(m.active_adapters), m.disable_adapters) for m in switches],
        "methods": [[name in vars(module) for name in (*IMAGE_METHODS, "generate")] for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": [state[0], torch.as_tensor(state[1].astype(np.int64)), *state[2:]],
        "python": random.getstate(),
    }


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert [key for key in before if not equal(before[key], after[key])] == []


# The numbers


@family
def test_covariances_are_second_moments_of_real_tokens(family: str) -> None:
    model = adapted(family)
    batches = list(making.task_batches(model, family, style=0))
    names = layer_names(model)
    with recorded(model.eval(), names) as seen, torch.no_grad():
        for batch in batches:
            model(**batch)
    (task,) = collect(model, batches).tasks
    masks = [batch["attention_mask"].bool() for batch in batches]
    assert any(not mask.all() for mask in masks)
    assert set(task.input_of) == set(names)
    for name in names:
        expected = second_moment([rows[mask] for rows, mask in zip(seen[name], masks, strict=True)])
        assert task.tokens_of(name) == sum(int(mask.sum()) for mask in masks)
        torch.testing.assert_close(task.covariance_of(name).dense(), expected, atol=1e-5, rtol=1e-4)


@family
def test_prototypes_are_means_over_images_of_pooled_projector_inputs(family: str) -> None:
    model = adapted(family)
    rows = [[pictures(family, 0, 1)[0]], pictures(family, 3, 3), [], pictures(family, 5, 2, seed=1)]
    batches = [tiny.batch(model, family, rows), tiny.batch(model, family, rows[2:])]
    (task,) = collect(model, batches).tasks
    images = [image for row in [*rows, *rows[2:]] for image in row]
    assert set(task.projectors) == set(PROJECTORS[family])
    base = making.shared_base(family)
    for projector in PROJECTORS[family]:
        pooled = []
        for image in images:  # one at a time: no boundaries to be found
            with recorded(base, [projector]) as seen, torch.no_grad():
                base(**tiny.batch(base, family, [[image]]))
            (features,) = seen[projector]
            pooled.append(features.double().reshape(-1, features.shape[-1]).mean(0))
        expected = torch.stack(pooled).mean(0)
        assert task.projectors[projector].prototype.dtype == torch.float32
        torch.testing.assert_close(task.projectors[projector].prototype.double(), expected, atol=1e-5, rtol=1e-4)
        assert task.images == len(pooled)
    assert task.samples == 4 + 2


def test_layers_with_one_input_hold_one_object() -> None:
    model = adapted("llava")
    (task,) = collect(model, making.task_batches(model, "llava", 0)).tasks
    for index in (0, 1):
        layer = f"model.language_model.layers.{index}"
        qkv = [task.covariance_of(f"{layer}.self_attn.{name}_proj") for name in "qkv"]
        gate, up = (task.covariance_of(f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        assert qkv[0] is qkv[1] is qkv[2]
        assert gate is up
    assert len({id(covariance) for covariance in covariances(task).values()}) == 2 * 4
    attention = model.get_base_model().model.language_model.layers[0].self_attn
    assert attention.q_proj.covariance["default"] is attention.k_proj.covariance["default"]
    assert attention.q_proj.covariance["default"] is task.covariance_of(
        "model.language_model.layers.0.self_attn.q_proj"
    )


def test_sharing_can_be_turned_off_and_gives_the_same_numbers() -> None:
    model = adapted("llama")
    (shared,) = collect(model, text_batches()).tasks
    (apart,) = collect(model, text_batches(), share_inputs=False).tasks
    assert len({id(covariance) for covariance in covariances(apart).values()}) == 14
    for name, covariance in covariances(shared).items():
        assert torch.equal(covariance.dense(), apart.covariance_of(name).dense())


@pytest.mark.parametrize(("max_samples", "batches"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (None, 5), (100, 5)])
def test_max_samples_stops_after_the_batch_that_reaches_it(max_samples: int | None, batches: int) -> None:
    taken = []

    def dataloader() -> Iterator[dict[str, Tensor]]:
        for batch in text_batches(count=5):
            taken.append(batch)
            yield batch

    (task,) = collect(adapted("llama"), dataloader(), max_samples=max_samples).tasks
    assert task.samples == 3 * batches
    assert len(taken) == batches
    tokens = sum(int(batch["attention_mask"].sum()) for batch in taken)
    assert {measured.tokens for measured in task.inputs.values()} == {tokens}


def test_unadapted_layers_with_the_input_of_an_adapted_one_are_covered() -> None:
    model = adapted("llava", target_modules=r".*language_model.*q_proj")
    (task,) = collect(model, making.task_batches(model, "llava", 0)).tasks
    expected = {f"model.language_model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkv"}
    assert set(task.input_of) == expected


@pytest.mark.parametrize(
    ("wanted", "names"),
    [(["up_proj"], ["gate", "up"]), ("all-linear", ["gate", "up", "down"]), (r".*\.mlp\.down_proj", ["down"])],
)
def test_also_measure_adds_layers(wanted: Any, names: list[str]) -> None:
    model = adapted("llama", target_modules=["q_proj"])
    batches = text_batches()
    (task,) = collect(model, batches, also_measure=wanted).tasks
    mlp = {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in names}
    qkv = {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkv"}
    output = {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)} if wanted == "all-linear" else set()
    assert set(task.input_of) == mlp | qkv | output
    with recorded(model.eval(), sorted(mlp)) as seen, torch.no_grad():
        for batch in batches:
            model(**batch)
    for name in mlp:
        rows = [r[batch["attention_mask"].bool()] for r, batch in zip(seen[name], batches, strict=True)]
        torch.testing.assert_close(task.covariance_of(name).dense(), second_moment(rows), atol=1e-5, rtol=1e-4)


def test_also_measure_may_name_conv1d_layers() -> None:
    model = adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    (task,) = collect(model, text_batches(), also_measure="all-linear").tasks
    assert {name.rpartition("h.0.")[2] for name in task.input_of if "h.0." in name} == {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    }
    assert task.covariance_of("transformer.h.0.mlp.c_proj").width == 128


@pytest.mark.parametrize("length", [7, 5])  # as long as the source, and not
@pytest.mark.parametrize("masked_by", ["mask", "labels"])
def test_an_encoder_decoder_has_two_masks(length: int, masked_by: str) -> None:
    model = adapted("t5")
    source = text_batches(count=1)[0]
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(3, 100, (3, length), generator=generator)
    target_mask = torch.ones_like(target).bool()
    target_mask[0, 2:], target_mask[1, 4:] = False, False
    if masked_by == "mask":
        batch = source | {"decoder_input_ids": target, "decoder_attention_mask": target_mask.long()}
    else:
        batch = source | {"labels": target.masked_fill(~target_mask, -100)}
    names = layer_names(model)
    with recorded(model.eval(), names) as seen, torch.no_grad():
        model(**batch)
    (task,) = collect(model, [batch]).tasks
    assert set(task.input_of) == set(names)
    for name in names:
        from_encoder = name.startswith("encoder.") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        mask = source["attention_mask"].bool() if from_encoder else target_mask
        assert task.tokens_of(name) == mask.sum(), name
        expected = second_moment([seen[name][0][mask]])
        torch.testing.assert_close(task.covariance_of(name).dense(), expected, atol=1e-5, rtol=1e-4)
    cross = {id(c) for n, c in covariances(task).items() if n.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert len(cross) == 1  # all decoder layers read the same encoder output


def test_fewer_tokens_than_features() -> None:
    model = adapted("llama")
    (task,) = collect(model, [{"input_ids": torch.tensor([[5, 6, 7]])}]).tasks
    covariance = task.covariance_of("model.layers.0.mlp.down_proj")
    assert task.tokens_of("model.layers.0.mlp.down_proj") == 3 < covariance.width == 48
    assert torch.linalg.matrix_rank(covariance.dense()) == 3
    covariance.check()


def test_text_only_data_gives_no_prototype() -> None:
    model = adapted("llava")
    (task,) = collect(model, [tiny.batch(model, "llava", [[], []])]).tasks
    assert task.images == 0
    assert task.projectors == {}


def test_an_overridden_projector_gets_a_prototype() -> None:
    model = adapted("llava", projector_modules=["multi_modal_projector.linear_2"])
    (task,) = collect(model, making.task_batches(model, "llava", 0)).tasks
    assert set(task.projectors) == {"model.multi_modal_projector", "model.multi_modal_projector.linear_2"}
    assert task.projectors["model.multi_modal_projector.linear_2"].prototype.shape == (tiny.TEXT_WIDTH,)


def test_adapters_in_the_vision_tower_see_no_text_masks(recwarn: pytest.WarningsRecorder) -> None:
    base = tiny.build("llava")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "linear_1"]))
    scatter(model, 0)
    image = pictures("llava", 0, 1)[0]
    # Padded to 17 positions, the number of patches and the class token of the vision tower
    batch = tiny.batch(model, "llava", [[image]] * 2, [[5], [6, 7]])
    tower, projector = "model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"
    batch["attention_mask"][0, 0] = 0
    (task,) = collect(model, [batch]).tasks
    assert task.tokens_of(tower) == 2 * 17
    assert task.tokens_of(projector) == 2 * 16
    language = "model.language_model.layers.0.self_attn.q_proj"
    assert task.tokens_of(language) == batch["attention_mask"].sum()
    said = [str(warning.message) for warning in recwarn if issubclass(warning.category, PeftWarning)]
    assert all("have no `labels`" in one for one in said)


@pytest.mark.parametrize("kind", [MAnyConfig, LoraConfig])
def test_an_adapter_that_was_not_trained_is_remarked_on(kind, recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(tiny.build_text("llama"), kind(r=2, target_modules=["q_proj", "v_proj"]))
    collect(model, text_batches())
    assert any("LoRA is zero in all layers" in str(warning.message) for warning in recwarn)
    recwarn.clear()
    scatter(model, 0)
    collect(model, text_batches())
    assert not any("LoRA is zero in all layers" in str(warning.message) for warning in recwarn)


def test_dropout_and_its_randomness_are_off() -> None:
    model = adapted("llama", lora_dropout=0.5).train()
    (one,) = collect(model, text_batches()).tasks
    (two,) = collect(model, text_batches()).tasks
    for name, covariance in covariances(one).items():
        assert torch.equal(covariance.dense(), two.covariance_of(name).dense())


# The state


@family
def test_the_model_is_as_before(family: str) -> None:
    model = adapted(family)
    model.train()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 0
    model(**tiny.batch(model, family, [[pictures(family, 0, 1)[0]]])).logits.sum().backward()
    next(model.parameters()).requires_grad_(True)
    assert any(parameter.grad is not None for parameter in model.parameters())
    before = state_of(model)
    collect(model, making.task_batches(model, family, 0))
    assert_unchanged(model, before)


@pytest.mark.parametrize("where", ["dataloader", "tower", "projector", "layer", "interrupt"])
def test_the_model_is_as_before_if_the_pass_fails(where: str) -> None:
    model = adapted("qwen2_5_vl").train()
    model.get_base_model().model.language_model.layers[0].eval()
    base = model.get_base_model().model
    parts = {"tower": base.visual, "projector": base.visual.merger.modules_to_save["default"]}
    parts |= {"layer": base.language_model.layers[1].mlp, "interrupt": base.language_model.norm}

    def fail(*_: Any) -> None:
        torch.rand(1), np.random.rand(), random.random()
        raise KeyboardInterrupt if where == "interrupt" else RuntimeError("half-way")

    def batches() -> Iterator[dict[str, Tensor]]:
        yield from making.task_batches(model, "qwen2_5_vl", 0, 1)
        if where == "dataloader":
            fail()
        parts[where].register_forward_pre_hook(fail)
        yield from making.task_batches(model, "qwen2_5_vl", 0, 1)

    before = state_of(model)
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else RuntimeError):
        collect(model, batches())
    if where != "dataloader":
        parts[where]._forward_pre_hooks.popitem()
    assert_unchanged(model, before)
    assert model.peft_config["default"].statistics is None
    assert not hasattr(base.language_model.layers[0].mlp.up_proj, "covariance")


def test_random_states_are_kept_from_a_pass_that_draws() -> None:
    model = adapted("llama")

    def forward(model: nn.Module, batch: Any) -> None:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        model(**batch)

    before = state_of(model)
    collect(model, text_batches(), forward_fn=forward)
    assert_unchanged(model, before)


def test_an_adapter_that_is_not_active_is_measured_alone() -> None:
    model = adapted("llava")
    model.add_adapter("other", MAnyConfig(r=4))
    perturb(model, "other", seed=9)
    batches = list(making.task_batches(model, "llava", 0))
    model.set_adapter("other")
    (expected,) = collect(model, batches).tasks
    model.set_adapter("default")
    before = state_of(model)
    (task,) = collect(model, batches, adapter_name="other").tasks
    assert_unchanged(model, before)
    (default,) = collect(model, batches).tasks
    name = "model.language_model.layers.1.mlp.down_proj"
    assert torch.equal(task.covariance_of(name).dense(), expected.covariance_of(name).dense())
    assert not torch.allclose(task.covariance_of(name).dense(), default.covariance_of(name).dense(), rtol=1e-2)
    layer = model.get_base_model().get_submodule(name)
    assert set(layer.covariance) == {"default", "other"}
    assert model.peft_config["other"].statistics.tasks[0] is task


def test_disabled_adapters_are_enabled_for_the_pass() -> None:
    model = adapted("llava")
    batches = list(making.task_batches(model, "llava", 0))
    (expected,) = collect(model, batches).tasks
    with model.disable_adapter():
        before = state_of(model)
        (task,) = collect(model, batches).tasks
        assert_unchanged(model, before)
    for name, covariance in covariances(expected).items():
        assert torch.equal(task.covariance_of(name).dense(), covariance.dense())


def test_an_adapter_merged_into_the_weights_measures_alike() -> None:
    model = adapted("llama")
    (expected,) = collect(model, text_batches()).tasks
    model.merge_adapter()
    before = state_of(model)
    (task,) = collect(model, text_batches()).tasks
    assert_unchanged(model, before)
    for name, covariance in covariances(expected).items():
        torch.testing.assert_close(task.covariance_of(name).dense(), covariance.dense(), atol=1e-5, rtol=1e-4)


# Errors


def test_there_must_be_such_an_adapter() -> None:
    with pytest.raises(ValueError, match=r"no adapter 'nope'; the model has \['default'\]"):
        collect(adapted("llama"), text_batches(), adapter_name="nope")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters; wrap it with `get_peft_model`"):
        collect(tiny.build_text("llama"), text_batches())


def test_one_adapter_at_a_time() -> None:
    model = adapted("llama")
    model.add_adapter("other", MAnyConfig(r=4))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Exactly one adapter is measured at a time"):
        collect(model, text_batches())
    before = state_of(model)
    collect(model, text_batches(), adapter_name="other")
    assert_unchanged(model, before)


def test_a_merge_cannot_be_measured() -> None:
    merged = making.shared_merge("llava")
    with pytest.raises(ValueError, match="'default' is a merge; it carries the statistics"):
        collect(merged, making.task_batches(merged, "llava", 0))


@pytest.mark.parametrize("batches", [[], iter([])])
def test_an_empty_dataloader_is_an_error(batches: Any) -> None:
    model = adapted("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match="dataloader gave no batch"):
        collect(model, batches)
    assert_unchanged(model, before)


def test_nan_activations_are_an_error() -> None:
    model = adapted("llava")
    batch = tiny.batch(model, "llava", [[pictures("llava", 0, 1)[0]]])
    with pytest.raises(RuntimeError, match=r"vision features at 'model.multi_modal_projector' hold NaN or Inf"):
        collect(model, [batch | {"pixel_values": batch["pixel_values"] * torch.nan}])
    text = adapted("llama")
    with torch.no_grad():
        text.get_input_embeddings().weight[5] = torch.inf
    with pytest.raises(RuntimeError, match=r"'model.layers.0.self_attn.q_proj' holds NaN or Inf"):
        collect(text, [{"input_ids": torch.tensor([[5, 6]])}])


@pytest.mark.parametrize("of_first", [True, False])
def test_a_device_that_answers_late_is_asked_a_batch_later(of_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiniteCheck, "arrived", False)
    model = adapted("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.inf
    broken, fine = ({"input_ids": torch.tensor([[token, 6]])} for token in (5, 7))
    given: list[Any] = []
    batches = (given.append(batch) or batch for batch in ([broken, fine, fine] if of_first else [fine, broken]))
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        collect(model, batches)
    assert len(given) == 2


class Assorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.line = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.conv, self.map = nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor, factor: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.line(self.table(ids) * (1 if factor is None else factor))
        hidden = self.map(self.conv(hidden.transpose(1, 2))[..., None])[..., 0].transpose(1, 2)
        return self.attention(hidden, hidden, hidden)[0]


@pytest.mark.parametrize("name", ["table", "conv", "map", "attention"])
def test_only_linear_layers_have_an_input_covariance(name: str) -> None:
    model = get_peft_model(Assorted(), LoraConfig(target_modules=["line", name]))
    with pytest.raises(ValueError, match=rf"adapts '[\w.]*{name}', which is no linear layer .*only linear layers"):
        collect(model, [torch.tensor([[1, 2, 3]])])


def test_parameters_are_no_linear_layers() -> None:
    model = get_peft_model(Assorted(), LoraConfig(target_modules=[], target_parameters=["line.weight"]))
    with pytest.raises(ValueError, match="`target_parameters`, so its effect on 'line' is no plain low-rank delta"):
        collect(model, [torch.tensor([[1, 2, 3]])])


def test_other_kinds_of_adapters_are_an_error() -> None:
    model = get_peft_model(tiny.build_text("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is of PEFT type IA3, which multiplies weights or activations"):
        collect(model, text_batches())


def test_other_adapters_must_not_be_merged_into_the_weights() -> None:
    model = adapted("llama", target_modules=["q_proj"])
    model.add_adapter("other", MAnyConfig(r=4, target_modules=["up_proj"]))  # not even in other layers
    perturb(model, "other", seed=1)
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"Other adapters are merged into '.*up_proj'; call `unmerge_adapter"):
        collect(model, text_batches())


def test_layers_that_no_token_reached_are_warned_of() -> None:
    model = get_peft_model(Assorted(), LoraConfig(target_modules=["line"]))

    def embed_only(model: Any, batch: Tensor) -> None:
        model.get_base_model().table(batch)

    with pytest.warns(PeftWarning, match="No token reached 1 adapted layer while measuring, among them 'line'"):
        collect(model, [torch.tensor([[1, 2, 3]])], forward_fn=embed_only)


# Kinds of models and batches


def test_a_plain_lora_adapter_with_a_trained_projector(tmp_path: Path) -> None:
    folders = []
    for task in (0, 1):
        config = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
        model = get_peft_model(tiny.build("llava"), config)
        perturb(model, "default", seed=task)
        (measured,) = collect(model, making.task_batches(model, "llava", making.STYLES[task])).tasks
        assert set(measured.projectors) == {"model.multi_modal_projector"}
        assert len(measured.input_of) == 14
        folders.append(tmp_path / f"task-{task}")
        model.save_pretrained(str(folders[-1]))
        assert (folders[-1] / STATISTICS_NAME).is_file()
    merged = merge_adapter_sequence(tiny.build("llava"), folders, progress=False)
    assert merged.peft_config["default"].merge.routing["model.multi_modal_projector"].width == tiny.VISION_WIDTH


@pytest.mark.parametrize("kind", [MAnyConfig, LoraConfig])
def test_a_transformers_model_with_add_adapter(kind: type, tmp_path: Path) -> None:
    model = tiny.build("llava")
    targets = None if kind is MAnyConfig else r".*language_model.*q_proj"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(kind(r=4, target_modules=targets), adapter_name="task")
    batches = list(making.task_batches(model, "llava", 0))
    model(**batches[0])  # at the first forward pass transformers sets hooks of its own
    before = state_of(model)
    (task,) = collect(model, batches).tasks
    assert_unchanged(model, before)
    assert "model.language_model.layers.0.self_attn.q_proj" in task.input_of
    assert set(task.projectors) == {"model.multi_modal_projector"}
    assert model.model.language_model.layers[0].self_attn.q_proj.covariance["task"].trace > 0
    model.save_pretrained(str(tmp_path))
    assert AdapterStatistics.load(tmp_path / STATISTICS_NAME).tasks[0].samples == task.samples


def test_a_model_wrapped_by_ddp(tmp_path: Path) -> None:
    model = adapted("llava")
    batches = list(making.task_batches(model, "llava", 0))
    (expected,) = collect(model, batches).tasks
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        (task,) = collect(wrapped, batches).tasks
        assert wrapped.training
        assert wrapped.module.training
    finally:
        torch.distributed.destroy_process_group()
    for name, covariance in covariances(expected).items():
        assert torch.equal(task.covariance_of(name).dense(), covariance.dense())


def test_a_bf16_base() -> None:
    base = tiny.build("qwen3_vl", dtype=torch.bfloat16)
    model = get_peft_model(base, MAnyConfig(r=4))
    perturb(model, "default", seed=0)
    batches = list(making.task_batches(model, "qwen3_vl", 0))
    names = layer_names(model)
    with recorded(model.eval(), names) as seen, torch.no_grad():
        for batch in batches:
            model(**batch)
    (task,) = collect(model, batches).tasks
    masks = [batch["attention_mask"].bool() for batch in batches]
    for name in names:
        rows = [rows[mask] for rows, mask in zip(seen[name], masks, strict=True)]
        assert task.covariance_of(name).matrix.dtype == torch.float64  # type: ignore[attr-defined]
        torch.testing.assert_close(task.covariance_of(name).dense(), second_moment(rows), atol=1e-9, rtol=1e-9)
    assert all(seen.prototype.dtype == torch.float32 for seen in task.projectors.values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_counts_nothing_twice() -> None:
    model = adapted("llava")
    batches = list(making.task_batches(model, "llava", 0))
    (expected,) = collect(model, batches).tasks
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    before = state_of(model)
    (task,) = collect(model, batches).tasks
    assert_unchanged(model, before)
    assert model.get_base_model().is_gradient_checkpointing
    for name, covariance in covariances(expected).items():
        assert torch.equal(task.covariance_of(name).dense(), covariance.dense())
        assert task.tokens_of(name) == expected.tokens_of(name)


def test_a_forward_function_of_the_users() -> None:
    model = adapted("llama")
    calls = []

    def forward(model: nn.Module, batch: tuple[dict[str, Tensor], str]) -> None:
        calls.append(batch[1])
        model(**batch[0])

    inputs = text_batches()
    (task,) = collect(model, [(batch, "note") for batch in inputs], forward_fn=forward).tasks
    assert calls == ["note"] * 2
    tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs)
    assert tokens < 2 * 3 * 7
    assert {measured.tokens for measured in task.inputs.values()} == {tokens}  # by the mask that the model gets


@pytest.mark.parametrize("make", [lambda ids: (ids,), lambda ids: [ids, torch.ones(1)], lambda ids: ids])
def test_batches_of_positional_arguments(make: Callable[[Tensor], Any]) -> None:
    model = get_peft_model(Assorted(), MAnyConfig(r=2, target_modules=["line"]))
    dataset = torch.arange(8).reshape(4, 2)
    (task,) = collect(model, [make(dataset[:2]), make(dataset[2:])]).tasks
    assert task.samples == 4
    assert set(task.input_of) == {"line"}
    expected = second_moment([model.get_base_model().table(dataset).detach().reshape(-1, 8)])
    torch.testing.assert_close(task.covariance_of("line").dense(), expected)


def test_a_shuffling_dataloader_is_left_where_it_was() -> None:
    model = adapted("llama")
    loader = DataLoader([{"input_ids": torch.tensor([5 + i, 6])} for i in range(6)], batch_size=2, shuffle=True)
    before = state_of(model)
    (task,) = collect(model, loader).tasks
    assert task.samples == 6
    assert_unchanged(model, before)


# What becomes of the statistics


def test_statistics_are_plain_objects_on_the_layers() -> None:
    model = adapted("llava")
    keys, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    (task,) = collect(model, making.task_batches(model, "llava", 0)).tasks
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == buffers
    layer = model.get_base_model().model.language_model.layers[0].mlp.down_proj
    before = layer.covariance["default"].dense()
    model.half()
    assert torch.equal(layer.covariance["default"].dense(), before)
    assert layer.covariance["default"].dense().dtype == torch.float64
    twin = copy.deepcopy(model)
    twin_layer = twin.get_base_model().model.language_model.layers[0].mlp.down_proj
    assert torch.equal(twin_layer.covariance["default"].dense(), before)
    assert twin.peft_config["default"].statistics.tasks[0].samples == task.samples


def test_deleting_an_adapter_drops_its_statistics() -> None:
    model = adapted("llama")
    model.add_adapter("other", MAnyConfig(r=4, target_modules="all-linear"))
    collect(model, text_batches())
    collect(model, text_batches(), adapter_name="other")
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert set(layer.covariance) == {"default", "other"}
    model.delete_adapter("other")
    assert set(layer.covariance) == {"default"}
    model.delete_adapter("default")
    assert set(layer.covariance) == set()


def test_measuring_again_replaces_what_was_measured() -> None:
    model = adapted("llama")
    (first,) = collect(model, text_batches()).tasks
    (second,) = collect(model, text_batches(count=1)).tasks
    assert second.samples < first.samples
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert layer.covariance["default"] is second.covariance_of("model.layers.0.mlp.down_proj")
    assert model.peft_config["default"].statistics.tasks == (second,)


def test_fingerprints_and_names_are_recorded() -> None:
    model = adapted("llama", task_name="clevr")
    (task,) = collect(model, text_batches()).tasks
    assert task.name == "clevr"
    assert set(task.fingerprints) == set(layer_names(model))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert task.fingerprints["model.layers.0.mlp.down_proj"][0] == pytest.approx(
        layer.lora_B["default"].weight.norm().item()
    )


def test_weights_in_shards_are_an_error_that_says_what_to_do() -> None:
    """As FSDP1 (flattened) and ZeRO-3 (empty) leave them."""
    model = adapted("llama")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match=r"'model.layers.0.self_attn.q_proj' are sharded over processes.*FSDP2"):
        collect(model, text_batches())


@pytest.fixture
def zero_3(monkeypatch) -> Callable[[list[nn.Parameter]], None]:
    """Takes parameters away as ZeRO-3 does; they are there while they are gathered."""

    def partition(parameters: list[nn.Parameter]) -> None:
        kept = {parameter: parameter.data for parameter in parameters}

        @contextlib.contextmanager
        def gathered(asked: Any, modifier_rank: int | None) -> Iterator[None]:
            assert modifier_rank is None
            assert {*asked} == {*kept}
            for parameter in asked:
                parameter.data = kept[parameter]
            yield
            take()

        def take() -> None:
            for parameter in kept:
                parameter.data, parameter.ds_id = torch.empty(0), 1

        take()
        for place in ("measurable", "projectors"):
            monkeypatch.setattr(f"peft_many.statistics.{place}.gather_params_ctx", gathered)

    return partition


@pytest.mark.parametrize("kind", [MAnyConfig, LoHaConfig])
def test_weights_that_zero_3_has_taken_away_are_gathered_to_be_read(kind, zero_3) -> None:
    """And weights in shards take all processes, wherever they are."""
    options = {"init_weights": False} if kind is LoHaConfig else {"init_lora_weights": False}
    model = get_peft_model(tiny.build_text("llama"), kind(target_modules=["q_proj"], r=2, **options))
    layers = adapted_layers(model, "default")
    expected = weights_of(model, "default", layers).fingerprints
    zero_3([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert weights_of(model, "default", layers).fingerprints == expected
    with pytest.raises(ValueError, match=r"sharded over processes.*let all of them make this call"):
        collect(model, text_batches(), across_processes=False)


@pytest.mark.parametrize("moved", [False, True])
def test_whether_a_projector_has_moved_is_seen_though_zero_3_has_taken_it_away(moved, zero_3) -> None:
    base = get_peft_model(tiny.build("llava"), MAnyConfig(r=2)).get_base_model()
    (name,) = find_projectors(base)
    if moved:
        next(base.get_submodule(name).modules_to_save["default"].parameters()).data += 1
    zero_3(list(base.get_submodule(name).parameters()))
    with pytest.warns(PeftWarning, match="no image passed") if moved else contextlib.nullcontext():
        assert [*unmoved_projectors(base, "default", [name])] == ([] if moved else [name])


@pytest.mark.parametrize(
    ("batch", "words", "rows"),
    [
        ("hello", "type str", 1),
        (["hello", "you"], "type list, of str, without a tensor", 2),
        ([{"prompt": "hello", "solution": 5}], "type list, of dict", 1),  # rows, as of GRPO's data sets
        ({"text": ["hello"], "label": [1]}, "type dict, of 'text', 'label', without a tensor", 1),
        ({"input_ids": [[1, 2], [3]]}, "of 'input_ids'", 1),
        ({"input_ids": np.ones((2, 3), dtype=np.int64)}, "of 'input_ids'", 1),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, "type dict, a single row", 3),
        (None, "type NoneType", 1),
        (7, "type int", 1),
        ([], "type list", 1),
        ({}, "type dict", 1),
    ],
)
def test_what_is_no_batch(batch, words, rows) -> None:
    model = adapted("llama")
    for batches in ([batch], iter([batch]), [*text_batches(), batch]):
        with pytest.raises(ValueError, match=rf"A batch is what the model is called with.*{words}.*`forward_fn`"):
            collect(model, batches)
    read = collect(model, [batch], forward_fn=lambda model, batch: model(**text_batches()[0]))
    assert read.tasks[0].samples == rows


@pytest.mark.parametrize("moved", [False, True])
def test_whether_a_projector_has_moved_is_seen_though_it_is_offloaded(moved) -> None:
    base = get_peft_model(tiny.build("llava"), MAnyConfig(r=2)).get_base_model()
    (name,) = find_projectors(base)
    shapes = projector_shapes(base, "default", [name])
    if moved:
        next(base.get_submodule(name).modules_to_save["default"].parameters()).data += 1
    cpu_offload(base.get_submodule(name), execution_device="cpu")
    assert all(parameter.is_meta for parameter in base.get_submodule(name).parameters())
    with pytest.warns(PeftWarning, match="trained the projector") if moved else contextlib.nullcontext():
        assert [*unmoved_projectors(base, "default", [name])] == ([] if moved else [name])
    assert projector_shapes(base, "default", [name]) == shapes


def test_a_projector_whose_weights_are_nowhere_is_not_said_to_be_trained() -> None:
    base = get_peft_model(tiny.build("llava"), MAnyConfig(r=2)).get_base_model()
    (name,) = find_projectors(base)
    base.get_submodule(name).to("meta")
    with pytest.warns(PeftWarning, match="whether the adapter's projector .* was trained cannot be told"):
        assert not unmoved_projectors(base, "default", [name])


def test_inputs_are_shared_though_earlier_hooks_give_each_layer_a_view_of_its_own() -> None:
    """As DeepSpeed's do."""
    model = adapted("llama", target_modules=["q_proj", "v_proj"])
    expected = collect(model, text_batches()).tasks[0].input_of
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: tuple(one.view_as(one) for one in args))
    found = collect(model, text_batches()).tasks[0].input_of
    assert found == expected
    assert len({*found.values()}) < len(found)


def test_wide_inputs_are_sketched_and_all_are_truncated() -> None:
    model = adapted("llama")
    (whole,) = collect(model, text_batches(count=5)).tasks
    widths = sorted({covariance.width for covariance in covariances(whole).values()})
    rank = widths[0]  # those of this width are summed up whole
    (task,) = collect(model, text_batches(count=5), rank=rank).tasks
    for name, covariance in covariances(task).items():
        exact = whole.covariance_of(name)
        assert task.tokens_of(name) == whole.tokens_of(name)
        assert covariance.trace == pytest.approx(exact.trace, rel=1e-3)
        assert isinstance(covariance, LowRankCovariance)
        assert covariance.factor.shape[0] <= rank
        assert covariance.factor.dtype == torch.float16
        error = torch.linalg.matrix_norm(covariance.dense() - exact.dense(), 2)
        assert error < (0.001 if covariance.width == rank else 0.02) * exact.trace
    assert task.input_of == whole.input_of


def test_what_is_saved_is_what_hangs_on_the_layers(tmp_path: Path) -> None:
    """However it was truncated: to the config's share of the energy, to another one, or not at all."""
    for number, (options, energy) in enumerate([({}, None), ({"energy": 0.9}, None), ({}, 0.9), ({}, 1.0)]):
        model = adapted("llama", **options)
        (task,) = collect(model, text_batches(count=5), energy=energy).tasks
        model.save_pretrained(tmp_path / f"{number}")
        (saved,) = AdapterStatistics.load(tmp_path / f"{number}" / STATISTICS_NAME).tasks
        for name, layer in lora_layers(model.get_base_model(), "default").items():
            assert layer.covariance["default"] is task.covariance_of(name)
            assert torch.equal(saved.covariance_of(name).dense(), task.covariance_of(name).dense())
        kept = {covariance.is_factored for covariance in covariances(task).values()}
        assert kept == {energy != 1.0}
        assert model.peft_config["default"].energy == options.get("energy", 0.9999)


def test_the_configs_energy_is_what_is_kept_unless_one_says_otherwise() -> None:
    by_config, by_call = adapted("llama", energy=0.9), adapted("llama")
    (one,) = collect(by_config, text_batches(), energy=None).tasks
    (two,) = collect(by_call, text_batches(), energy=0.9).tasks
    (more,) = collect(by_call, text_batches(), energy=None).tasks
    for name, covariance in covariances(one).items():
        assert torch.equal(covariance.factor, two.covariance_of(name).factor)  # type: ignore[attr-defined]
    assert sum(c.rank for c in covariances(more).values()) > sum(c.rank for c in covariances(one).values())


def test_no_matrix_of_the_inputs_width_is_held_while_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = CovarianceAccumulator.__init__
    monkeypatch.setattr(
        CovarianceAccumulator, "__init__", lambda self, width, *rest: made.append(width) or real(self, width, *rest)
    )
    collect(adapted("llama"), text_batches(), rank=4)
    assert made == []
    collect(adapted("llama"), text_batches(), energy=1.0)
    assert made


def test_an_error_budget_chooses_the_rank_of_each_input() -> None:
    model = adapted("llama")
    perturb(model, "default", seed=1)
    loose, tight = (
        covariances(collect(model, text_batches(count=5), error_budget=budget).tasks[0]) for budget in (0.3, 0.01)
    )
    (whole,) = collect(model, text_batches(count=5), energy=1.0).tasks
    assert all(len(loose[name].factor) <= len(tight[name].factor) for name in loose)
    assert sum(len(c.factor) for c in loose.values()) < sum(len(c.factor) for c in tight.values())
    for name, layer in lora_layers(model.get_base_model(), "default").items():
        delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        exact, found = whole.covariance_of(name).dense(), tight[name].dense()
        gap = ((delta @ (found - exact)) @ delta.T).trace().abs()
        assert gap < 0.02 * ((delta @ exact) @ delta.T).trace()


def test_an_error_budget_counts_also_where_the_config_keeps_all_energy() -> None:
    plain, whole = adapted("llama"), adapted("llama", energy=1.0)
    for model in (plain, whole):
        perturb(model, "default", seed=1)
    (expected,), (found,) = (collect(m, text_batches(), error_budget=0.3).tasks for m in (plain, whole))
    for name, covariance in covariances(found).items():
        assert torch.equal(covariance.factor, expected.covariance_of(name).factor)


def test_eight_bits_are_half_the_bytes_and_as_good_a_merge(tmp_path: Path) -> None:
    model = adapted("llama")
    perturb(model, "default", seed=1)
    (half,) = collect(model, text_batches(count=5), rank=12).tasks
    (eight,) = collect(model, text_batches(count=5), rank=12, dtype=torch.int8).tasks
    for name, covariance in covariances(eight).items():
        assert covariance.factor.dtype == torch.int8
        assert covariance.remainder == half.covariance_of(name).remainder
        error = torch.linalg.matrix_norm(covariance.dense() - half.covariance_of(name).dense(), 2)
        assert error < 0.01 * covariance.trace
    sizes = [sum(one.covariance.factor.nbytes for one in kept.inputs.values()) for kept in (eight, half)]
    assert sizes[0] == sizes[1] / 2
    model.save_pretrained(tmp_path)
    saved = AdapterStatistics.load(tmp_path / STATISTICS_NAME).tasks[0]
    merged = merge_adapter_files([tmp_path], tmp_path / "merged", progress=False)
    for kept in (saved, AdapterStatistics.load(merged / STATISTICS_NAME).tasks[0]):
        for name, covariance in covariances(eight).items():
            assert torch.equal(kept.covariance_of(name).dense(), covariance.dense())


def test_narrow_inputs_are_in_eight_bits_too() -> None:
    (task,) = collect(adapted("llama"), text_batches(), dtype=torch.int8).tasks
    assert {covariance.factor.dtype for covariance in covariances(task).values()} == {torch.int8}


@pytest.mark.parametrize("wrong", [{"dtype": torch.float32}, {"dtype": torch.int8, "energy": 1.0}])
def test_dtypes_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`dtype"):
        collect(adapted("llama"), text_batches(), **wrong)


@pytest.mark.parametrize("option", [{"rank": 0}, {"error_budget": 0.0}, {"error_budget": -1.0}, {"energy": 0.0}])
def test_options_out_of_range_are_errors_that_name_them(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(option))}`"):
        collect(adapted("llama"), text_batches(), **option)
