"""Adapters of other PEFT methods: their deltas are what their layers do, and their merge is the dense optimum."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.files import peft_methods
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.tensor_file import TensorFile
from tests.adapters import (
    PROJECTOR,
    STATISTICS,
    WEIGHTS,
    Made,
    base,
    batches,
    distance,
    logits,
    make,
    merged_deltas,
    recorded,
    reference,
)
from tests.places import shared_folder

RIDGE = 1e-4
TARGETS = ["q_proj", "down_proj"]  # one square, one not


@dataclass(frozen=True)
class Case:
    """A PEFT method: the name of its config, options for tiny layers, and the family to try it on."""

    config: str
    options: dict[str, Any]
    family: str = "llama"

    def make(self) -> PeftConfig:
        targets = ["c_attn", "c_proj"] if self.family == "gpt2" else TARGETS
        return getattr(peft, self.config)(**{"target_modules": targets, **self.options})


# Deltas that the files tell with the layers' sizes.
ALONE = {
    "ADALORA": Case("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10}),
    "C3A": Case("C3AConfig", {"block_size": 8}),
    "DELORA": Case("DeloraConfig", {"r": 3}),
    "FOURIERFT": Case("FourierFTConfig", {"n_frequency": 10}),
    "FOURIERFT on Conv1D": Case("FourierFTConfig", {"n_frequency": 10}, "gpt2"),
    "GRALORA": Case("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 2}),
    "LOHA": Case("LoHaConfig", {"r": 2, "alpha": 4}),
    "LOKR": Case("LoKrConfig", {"r": 2, "decompose_both": True}),
    "LOKR of whole factors": Case("LoKrConfig", {"r": 32}),
    "LORA with VeLoRA": Case("LoraConfig", {"velora_config": {}}),
    "PVERA": Case("PveraConfig", {"r": 4}),
    "RANDLORA": Case("RandLoraConfig", {"r": 4}),
    "SHIRA": Case("ShiraConfig", {"r": 2}),
    "SUPERTUNING": Case("SupertuningConfig", {}),
    "UNILORA": Case("UniLoraConfig", {"r": 2}),
    "VBLORA": Case("VBLoRAConfig", {"r": 2, "vector_length": 8, "num_vectors": 10, "topk": 2}),
    "VERA": Case("VeraConfig", {"r": 4}),
    "VERA on Conv1D": Case("VeraConfig", {"r": 4, "target_modules": ["c_attn"]}, "gpt2"),
    "VERA without its projection": Case("VeraConfig", {"r": 4, "save_projection": False}),
    "WAVEFT": Case("WaveFTConfig", {"n_frequency": 10}),
}
# Deltas that depend on the base weights.
ON_BASE = {
    "LORA with DoRA": Case("LoraConfig", {"r": 4, "use_dora": True}),
    "LORA with DoRA on Conv1D": Case("LoraConfig", {"r": 4, "use_dora": True, "fan_in_fan_out": True}, "gpt2"),
}
CASES = ALONE | ON_BASE


def train(case: Case, seed: int) -> PeftModel:
    """The adapter with random values for what training would change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base(case.family), case.make())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model.eval()


def effects(model: PeftModel, before: nn.Module) -> dict[str, Tensor]:
    """What each layer does beyond the base model's, as a matrix `(out, in)`: seen by running it on the identity."""
    found = {}
    model, before = copy.deepcopy(model).double(), copy.deepcopy(before).double()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "base_layer"):
            plain = before.get_submodule(name)
            rows = torch.eye(plain.weight.shape[0 if hasattr(plain, "nx") else 1], dtype=torch.float64)
            with torch.no_grad():
                found[name] = (layer(rows) - plain(rows)).T
    return found


@functools.cache
def measured(name: str, seed: int) -> Made:
    """A measured adapter of a method, made once; tests only read it."""
    case, folder = CASES[name], shared_folder("adapter-")
    model = train(case, seed)
    with recorded(model) as inputs:
        statistics = collect_statistics(model, batches(model, case.family, seed), energy=1.0, progress=False)
    model.save_pretrained(folder)
    assert statistics.tasks[0].shapes
    return Made(folder, effects(model, base(case.family)), {name: torch.cat(rows) for name, rows in inputs.items()})


@functools.cache
def lora(family: str, targets: tuple[str, ...]) -> Made:
    folder = shared_folder("lora-")
    return make(folder, family, seed=7, kind=LoraConfig, r=2, target_modules=list(targets))


def tasks_with(name: str) -> list[Made]:
    """Two tasks of a method, and one of plain LoRA."""
    case = CASES[name]
    return [measured(name, 1), measured(name, 2), lora(case.family, tuple(sorted(case.make().target_modules)))]


def assert_optimum(found: dict[str, Tensor], tasks: list[Made]) -> None:
    assert found.keys() == tasks[0].deltas.keys()
    for layer, delta in found.items():
        assert distance(delta, reference(tasks, layer, RIDGE, [1.0] * len(tasks))) < 2e-6, layer


def deltas_in(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


@pytest.mark.parametrize("name", ALONE)
def test_the_merge_of_files_is_the_dense_optimum(name, tmp_path):
    tasks = tasks_with(name)
    folders = [task.folder for task in tasks]
    merged = merge_adapter_files(folders, tmp_path / "merged", ridge=RIDGE, progress=False)
    assert_optimum(merged_deltas(merged), tasks)


@pytest.mark.parametrize("name", CASES)
def test_the_merge_on_a_model_is_the_dense_optimum(name):
    tasks, model = tasks_with(name), base(CASES[name].family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = merge_adapter_sequence(model, [task.folder for task in tasks], ridge=RIDGE, progress=False)
    assert_optimum(deltas_in(merged), tasks)
    left = merged.unload().state_dict()
    assert left.keys() == before.keys()
    assert all(torch.equal(left[name], before[name]) for name in before)


@pytest.mark.parametrize("name", CASES)
def test_a_single_adapter_keeps_its_outputs(name):
    family, folder = CASES[name].family, measured(name, 1).folder
    alone = PeftModel.from_pretrained(base(family), folder).eval()
    merged = merge_adapter_sequence(base(family), [folder], progress=False)
    torch.testing.assert_close(logits(merged, family), logits(alone, family), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ON_BASE)
def test_deltas_on_the_base_weights_are_refused_without_them(name, tmp_path):
    with pytest.raises(UnmergeableAdapterError, match=r"depends on the base weights.*`merge_adapter_sequence`"):
        merge_adapter_files([measured(name, 1).folder], tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


# With the reason, where it is one that people may not expect.
REFUSED = {
    **dict.fromkeys(("BOFT", "IA3", "OFT"), "multiplies weights or activations"),
    **dict.fromkeys(("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), "adds virtual tokens"),
    "TRAINABLE_TOKENS": "trains rows of the embedding",
    **dict.fromkeys(
        [
            "ADAMSS",
            "ADAPTION_PROMPT",
            "BEFT",
            "CARTRIDGE",
            "CPT",
            "DEFT",
            "FROD",
            "GLORA",
            "HIRA",
            "HRA",
            "LILY",
            "LN_TUNING",
            "MISS",
            "MULTITASK_PROMPT_TUNING",
            "OSF",
            "PEANUT",
            "POLY",
            "PSOFT",
            "ROAD",
            "SHADOW",
            "TINYLORA",
            "XLORA",
        ],
        "is not known to add a delta to linear layers",
    ),
}


def test_every_peft_method_is_merged_or_refused():
    """A new release of PEFT with new methods fails here, until someone has looked at them."""
    known = {kind.value if hasattr(kind, "value") else kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"MANY"}
    tested = {name.split()[0] for name in CASES}
    assert {kind for kind in peft_methods.RANKS if kind.isupper()} == tested - {"LORA"}
    assert known - tested == set(REFUSED)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_others_are_refused_by_name(kind, tmp_path):
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x": torch.zeros(1)}, tmp_path / WEIGHTS)
    reason = re.escape(f"is of PEFT type {kind}, which {REFUSED[kind]}") + ".*; it cannot be merged\\."
    with pytest.raises(UnmergeableAdapterError, match=reason):
        merge_adapter_sequence(base("llama"), [tmp_path], progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alora_invocation_tokens": [1]}, "uses `alora_invocation_tokens`, which is not known to"),
        ({"use_dora": True, "velora_config": {}}, "uses `use_dora` and `velora_config`, which is not known to"),
    ],
)
def test_other_variants_of_lora_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        peft_methods.check_method(LoraConfig(**options), "x")


# ------------------------------------------------------------------------------------------------ more of the same


def refused(folder: Path, *words: str, on_model: bool = False) -> None:
    model, place = base("llama"), folder.parent / "merged"
    of_files = functools.partial(merge_adapter_files, output_dir=place)
    merge = functools.partial(merge_adapter_sequence, model) if on_model else of_files
    with pytest.raises(UnmergeableAdapterError) as caught:
        merge(adapters=[folder], progress=False)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


@pytest.fixture
def damaged(tmp_path):
    """A copy of an adapter with other tensors."""

    def make_copy(name: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = Path(shutil.copytree(measured(name, 1).folder, tmp_path / "damaged"))
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        return folder

    return make_copy


@pytest.mark.parametrize("name", ["LOHA", "VERA", "UNILORA", "LORA with DoRA"])
def test_an_adapter_that_was_trained_further_is_found_out(name, damaged):
    trained = {"LOHA": "hada_w1_a", "VERA": "vera_lambda_d", "UNILORA": "theta_d"}

    def train_on(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if trained.get(name, "lora_magnitude_vector") in key)
        tensors[key] += 0.05 * tensors[key].norm() / tensors[key].numel() ** 0.5

    refused(damaged(name, train_on), "was trained further", "_proj'", on_model=True)


def test_rounding_to_half_precision_is_no_training(damaged, tmp_path):
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors |= {key: tensor.bfloat16() for key, tensor in tensors.items()}

    merged = merge_adapter_files([damaged("LOHA", halve)], tmp_path / "merged", progress=False)
    for layer, delta in merged_deltas(merged).items():
        assert 1e-5 < distance(delta, measured("LOHA", 1).deltas[layer]) < 1e-2


def test_tensors_that_do_not_fit(damaged):
    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[next(key for key in sorted(tensors) if key.endswith("q_proj.hada_w2_a"))]

    refused(damaged("LOHA", lose), "LOHA", "q_proj.hada_w2_a' is missing")


def test_a_tensor_of_another_shape(damaged):
    def cut(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if key.endswith("q_proj.hada_w2_a"))
        tensors[key] = tensors[key][1:].clone()

    refused(damaged("LOHA", cut), "LOHA", "q_proj.hada_w2_a", "size mismatch")


def test_a_tensor_of_no_layer(damaged):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.9.self_attn.q_proj.hada_w1_a"] = torch.zeros(4, 4)

    refused(damaged("LOHA", add), "LOHA", "'model.layers.9.self_attn.q_proj'")


def test_numbers_that_are_none(damaged):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[next(key for key in sorted(tensors) if key.endswith("q_proj.hada_w2_a"))][0, 0] = torch.nan

    refused(damaged("LOHA", spoil), "q_proj.hada_w2_a", "NaN or Inf")


@pytest.mark.parametrize("size", [1 << 40, 0, -1])
def test_sizes_that_no_layer_has(size, tmp_path):
    folder = Path(shutil.copytree(measured("FOURIERFT", 1).folder, tmp_path / "hostile"))
    file = TensorFile(folder / STATISTICS)
    header = json.loads(file.metadata["peft_many"])
    shapes = header["tasks"][0]["shapes"]
    shapes[next(iter(shapes))][0] = size
    save_file({key: file[key].clone() for key in file}, folder / STATISTICS, {"peft_many": json.dumps(header)})
    refused(folder, "by its statistics", f"is {size} x")


@pytest.mark.parametrize(("name", "option"), [("VERA", "r"), ("ADALORA", "init_r"), ("VBLORA", "num_vectors")])
def test_configs_that_would_fill_the_memory(name, option, tmp_path):
    folder = Path(shutil.copytree(measured(name, 1).folder, tmp_path / "hostile"))
    config = json.loads((folder / "adapter_config.json").read_text()) | {option: 10**9}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(folder, f"`{option}` as 1000000000")


def test_adalora_with_the_ranks_that_training_left(tmp_path):
    options = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 6, "deltaT": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base("llama"), peft.AdaLoraConfig(**options, target_modules=TARGETS))
        batch = batches(model, "llama", 0)[0]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_E" in name or "lora_B" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    for step in range(8):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.base_model.update_and_allocate(step)
    model.eval()
    collect_statistics(model, [batch], energy=1.0, progress=False)
    model.save_pretrained(tmp_path / "pruned")
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / "pruned" / WEIGHTS).items() if "lora_A" in key}
    assert len(ranks) > 1
    merged = merge_adapter_sequence(base("llama"), [tmp_path / "pruned"], progress=False)
    again = PeftModel.from_pretrained(base("llama"), tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(merged, "llama"), logits(again, "llama"), atol=1e-4, rtol=1e-4)


def test_a_tensor_that_adalora_lacks(damaged):
    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[next(key for key in sorted(tensors) if key.endswith("q_proj.lora_E"))]

    refused(damaged("ADALORA", lose), "ADALORA", "q_proj.lora_E")


def test_without_statistics_the_base_model_tells_the_sizes(tmp_path):
    folder = Path(shutil.copytree(measured("LOHA", 1).folder, tmp_path / "unmeasured"))
    (folder / STATISTICS).unlink()
    refused(folder, "LOHA", "does not tell how large", "`collect_statistics`")
    merged = merge_adapter_sequence(base("llama"), [folder], method="average", progress=False)
    for layer, delta in deltas_in(merged).items():
        assert distance(delta, measured("LOHA", 1).deltas[layer]) < 1e-6


def test_a_merge_goes_on_without_the_adapters(tmp_path):
    tasks = [*tasks_with("LOHA"), measured("LORA with DoRA", 3)]
    folders = [task.folder for task in tasks]
    merge_adapter_sequence(base("llama"), folders[:2], ridge=RIDGE, progress=False).save_pretrained(tmp_path / "two")
    merged = merge_adapter_sequence(base("llama"), [tmp_path / "two", *folders[2:]], ridge=RIDGE, progress=False)
    assert_optimum(deltas_in(merged), tasks)


def test_the_merged_rank_is_no_larger_than_the_layer(tmp_path):
    """Three tasks whose deltas have full rank: `Σ r_t` would be three times that."""
    folders = [measured("RANDLORA", seed).folder for seed in (1, 2, 3)]
    merged = merge_adapter_files(folders, tmp_path / "merged", ridge=RIDGE, progress=False)
    assert_optimum(merged_deltas(merged), [measured("RANDLORA", seed) for seed in (1, 2, 3)])
    for key, tensor in load_file(merged / WEIGHTS).items():
        assert min(tensor.shape) == 32, key


def test_another_model_is_named(tmp_path):
    with pytest.raises(UnmergeableAdapterError, match=r"'base_model\.model\..*' matches no module of GPT2LMHead"):
        merge_adapter_sequence(base("gpt2"), [measured("LOHA", 1).folder], progress=False)


def test_collecting_refuses_what_merging_would():
    model = get_peft_model(base("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="IA3, which multiplies weights or activations"):
        collect_statistics(model, batches(model, "llama", 0), progress=False)
    model = get_peft_model(base("llama"), CASES["LOHA"].make())
    with pytest.raises(ValueError, match=r"`error_budget` reads LoRA matrices, but .* is of PEFT type LOHA"):
        collect_statistics(model, batches(model, "llama", 0), error_budget=0.1, progress=False)


@pytest.mark.parametrize(
    "config",
    [
        MAnyConfig(r=2, use_dora=True, task_name="dora"),
        peft.LoHaConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"]),
    ],
    ids=["MANY with DoRA", "LOHA"],
)
def test_multimodal_adapters_keep_their_projector(config, tmp_path):
    model = get_peft_model(base("llava"), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    collect_statistics(model, batches(model, "llava", 3), energy=1.0, progress=False)
    model.save_pretrained(tmp_path / "one")
    other = make(tmp_path / "other", seed=5, task_name="other", projector_modules=[]).folder
    alone = merge_adapter_sequence(base("llava"), [tmp_path / "one"], progress=False)
    torch.testing.assert_close(logits(alone, "llava"), logits(model, "llava"), atol=1e-4, rtol=1e-4)
    both = merge_adapter_sequence(base("llava"), [tmp_path / "one", other], progress=False)
    assert both.peft_config["default"].merge.routing[PROJECTOR].tasks[0].trained is not None
