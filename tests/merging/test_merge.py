"""Merging adapters: the numbers against an independent reference, and every way to use what comes out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from tests import tiny
from tests.adapters import (
    PROJECTOR,
    STATISTICS,
    WEIGHTS,
    Made,
    base,
    batches,
    but_operations,
    distance,
    files,
    logits,
    make,
    merged_deltas,
    reference,
)

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Makes adapters on request, once each; at the end they must be what they were, whatever merged them."""
    root = tmp_path_factory.mktemp("shelf")
    made: dict[str, Made] = {}
    before: dict[str, dict[str, bytes]] = {}

    def get(name: str) -> Made:
        if name not in made:
            family, options = RECIPES[name]
            made[name] = make(root / name, family, seed=list(RECIPES).index(name), **options)
            before[name] = files(made[name].folder)
        return made[name]

    yield get
    for name, content in before.items():
        assert files(made[name].folder) == content, f"merging changed its input {name}"
    assert sorted(path.name for path in root.iterdir()) == sorted(made)


RECIPES = {
    "a": ("llava", {"task_name": "a"}),
    "b": ("llava", {"task_name": "b", "r": 2, "lora_alpha": 5, "use_rslora": True}),
    "c": (
        "llava",
        {
            "task_name": "c",
            "r": 6,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5},
            "alpha_pattern": {"q_proj": 7, "up_proj": 1},
        },
    ),
    "d": ("llava", {"task_name": "d", "r": 1, "init_lora_weights": "gaussian"}),
    "only q": (
        "llava",
        {"task_name": "only q", "target_modules": r".*language_model.*q_proj", "projector_modules": []},
    ),
    "only v and down": ("llava", {"task_name": "v, down", "target_modules": r".*language_model.*(v|down)_proj"}),
    "only q, all measured": (
        "llava",
        {"task_name": "q, all", "target_modules": r".*language_model.*q_proj", "measure": "all-linear"},
    ),
    "text only": ("llava", {"task_name": "text only", "images": False, "projector_modules": []}),
    "projector untrained": ("llava", {"task_name": "no projector", "projector_modules": []}),
    "lora": (
        "llava",
        {
            "kind": LoraConfig,
            "target_modules": r".*language_model.*(q|v|down)_proj",
            "modules_to_save": ["multi_modal_projector"],
        },
    ),
    "lora too": ("llava", {"kind": LoraConfig, "target_modules": r".*language_model.*(q|v|down)_proj", "r": 3}),
    "llama a": ("llama", {"task_name": "a", "task_type": "CAUSAL_LM"}),
    "llama b": ("llama", {"task_name": "b", "task_type": "CAUSAL_LM", "r": 2}),
    "llama one row": ("llama", {"task_name": "one row", "rows": 1}),
    "llama layer 1": (
        "llama",
        {"task_name": "l1", "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    ),
    "llama also layer 1": (
        "llama",
        {"task_name": "also l1", "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    ),
    "llama without o": ("llama", {"task_name": "no o", "target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "gpt2 a": ("gpt2", {"task_name": "a", "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 b": (
        "gpt2",
        {"task_name": "b", "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "qwen a": ("qwen2_5_vl", {"task_name": "a"}),
    "qwen b": ("qwen2_5_vl", {"task_name": "b"}),
    "truncated a": ("llava", {"task_name": "truncated a", "energy": 0.999}),
}


def merge(tmp_path: Path, *adapters: Path, name: str = "merged", **options) -> Path:
    return merge_adapter_files(adapters, tmp_path / name, progress=False, **options)


def assert_optimal(folder: Path, tasks: list[Made], ridge: float = 1e-4, weights: list[float] | None = None) -> None:
    """Every layer's merged delta is the reference's, over exactly the layers that any task trained."""
    found = merged_deltas(folder)
    assert set(found) == {layer for task in tasks for layer in task.deltas}
    for layer, delta in found.items():
        expected = reference(tasks, layer, ridge, weights or [1.0] * len(tasks))
        assert distance(delta, expected) < 1e-5, layer


# ---------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d"), ("llama a", "llama b"), ("gpt2 a", "gpt2 b")])
@pytest.mark.parametrize("ridge", [1e-2, 1e-6])
def test_merge_is_the_least_squares_optimum(shelf, tmp_path, names, ridge):
    tasks = [shelf(name) for name in names]
    if names[0].startswith("gpt2"):  # b did not train c_proj, and its input was not measured: no say there
        found = merged_deltas(merge(tmp_path, *(task.folder for task in tasks), ridge=ridge))
        for layer, delta in found.items():
            known = tasks[:1] if layer.endswith("c_proj") else tasks
            assert distance(delta, reference(known, layer, ridge, [1.0] * len(known))) < 1e-5, layer
        return
    assert_optimal(merge(tmp_path, *(task.folder for task in tasks), ridge=ridge), tasks, ridge)


def test_weights_enter_the_optimum(shelf, tmp_path):
    tasks = [shelf(name) for name in ("a", "b", "c")]
    weights = [0.3, 2.0, 0.0]
    folder = merge(tmp_path, *(task.folder for task in tasks), weights=weights)
    assert_optimal(folder, tasks, weights=weights)
    assert distance(merged_deltas(folder)[LAYER], reference(tasks, LAYER, 1e-4, [1.0, 1.0, 0.0])) > 0.01


LAYER = "model.language_model.layers.0.self_attn.q_proj"


def test_fewer_tokens_than_input_dimensions(shelf, tmp_path):
    tasks = [shelf("llama one row"), shelf("llama a")]
    tokens = sum(len(task.inputs["model.layers.0.self_attn.q_proj"]) for task in tasks)
    assert tokens < tiny.TEXT_WIDTH, "this test is about singular covariances"
    for ridge in (1e-2, 1e-6):
        folder = merge(tmp_path, *(task.folder for task in tasks), ridge=ridge, name=f"{ridge}")
        assert_optimal(folder, tasks, ridge)


def test_singular_without_ridge_is_an_error_that_names_the_layer(shelf, tmp_path):
    with pytest.raises(UnmergeableAdapterError, match=r"'model.layers.0.*ridge"):
        merge(tmp_path, shelf("llama one row").folder, ridge=0.0)
    assert list(tmp_path.iterdir()) == []


def test_untrained_layers_count_as_zero_where_their_input_was_measured(shelf, tmp_path):
    """q shares its input with k and v, so `only q` has a say of zero at v, but none at down."""
    q, other = shelf("only q"), shelf("only v and down")
    found = merged_deltas(merge(tmp_path, q.folder, other.folder))
    assert {layer.rpartition(".")[2] for layer in found} == {"q_proj", "v_proj", "down_proj"}
    for layer, delta in found.items():
        tasks = [other] if layer.endswith("down_proj") else [q, other]
        assert distance(delta, reference(tasks, layer, 1e-4, [1.0] * len(tasks))) < 1e-5, layer


def test_measuring_all_layers_gives_a_say_in_all(shelf, tmp_path):
    q, other = shelf("only q, all measured"), shelf("only v and down")
    assert_optimal(merge(tmp_path, q.folder, other.folder), [q, other])


def test_truncated_statistics_come_close(shelf, tmp_path):
    """0.999 of the energy: near the optimum in the metric of the inputs, and not the average."""
    made = shelf("truncated a")
    tasks = [made, shelf("b")]
    factor = AdapterStatistics.load(made.folder / STATISTICS).tasks[0].covariance_of(LAYER).factor
    assert factor.shape[0] < factor.shape[1]
    found = merged_deltas(merge(tmp_path, *(task.folder for task in tasks)))
    for layer, delta in found.items():
        inputs = torch.cat([task.inputs[layer] for task in tasks])
        best = reference(tasks, layer, 1e-4, [1.0, 1.0])
        average = sum(task.deltas[layer] for task in tasks) / 2
        error, average_error = (((d - best) @ inputs.T).norm() / (best @ inputs.T).norm() for d in (delta, average))
        assert error < 0.1, layer
        assert error < average_error / 4, layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_merged_from_what_they_hold(shelf, tmp_path, dtype):
    tasks = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files(shelf(name).folder).items():
            (folder / file).write_bytes(content)
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        held = {
            layer: tensors[f"base_model.model.{layer}.lora_B.weight"].double()
            @ tensors[f"base_model.model.{layer}.lora_A.weight"].double()
            * {"a": 8 / 4, "b": 5 / 2**0.5}[name]
            for layer in shelf(name).deltas
        }
        tasks.append(Made(folder, held, shelf(name).inputs))
    merged = merge(tmp_path, *(task.folder for task in tasks))
    assert_optimal(merged, tasks)
    experts = {key: tensor for key, tensor in load_file(merged / WEIGHTS).items() if ".experts." in key}
    assert {tensor.dtype for tensor in experts.values()} == {dtype}
    half = tiny.build("llava", dtype=dtype)
    model = merge_adapter_sequence(half, [task.folder for task in tasks], progress=False)
    assert torch.isfinite(logits(model, "llava")).all()
    assert distance(logits(model, "llava"), logits(PeftModel.from_pretrained(base("llava"), merged), "llava")) < 0.1


def test_projectors_and_prototypes_are_carried_over_to_the_bit(shelf, tmp_path):
    """Sorted by task name; a task that trained none takes part with the base model's, one without images not."""
    names = ["text only", "projector untrained", "c", "a"]
    folder = merge(tmp_path, *(shelf(name).folder for name in names))
    tensors = load_file(folder / WEIGHTS)
    routing = json.loads((folder / "adapter_config.json").read_text())["merge"]["routing"][PROJECTOR]
    assert routing["tasks"] == [
        {"name": "a", "trained": True},
        {"name": "c", "trained": True},
        {"name": "no projector", "trained": False},
    ]
    expected = {}
    for place, name in ((0, "a"), (1, "c")):
        for key, tensor in load_file(shelf(name).folder / WEIGHTS).items():
            if PROJECTOR in key:
                weight = key.removeprefix(f"base_model.model.{PROJECTOR}.")
                expected[f"base_model.model.{PROJECTOR}.experts.task_{place}.{weight}"] = tensor
    assert len(expected) == 8
    found = {key: tensor for key, tensor in tensors.items() if ".experts." in key}
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for place, name in enumerate(("a", "c", "projector untrained")):
        own = load_file(shelf(name).folder / STATISTICS)[f"0.prototype.{PROJECTOR}"]
        assert torch.equal(tensors[f"base_model.model.{PROJECTOR}.prototypes"][place], own)


def test_a_projector_whose_tasks_all_have_weight_zero_is_left_out(shelf, tmp_path):
    folder = merge(tmp_path, shelf("a").folder, shelf("text only").folder, weights=[0.0, 1.0])
    assert "routing" not in json.loads((folder / "adapter_config.json").read_text())["merge"]
    model = PeftModel.from_pretrained(base("llava"), folder)
    alone = PeftModel.from_pretrained(base("llava"), shelf("text only").folder)
    assert distance(logits(model, "llava"), logits(alone, "llava")) < 1e-4


# ------------------------------------------------------------------------------------- single, order, further merging


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("b", "llava"),
        ("c", "llava"),
        ("lora", "llava"),
        ("llama one row", "llama"),
        ("gpt2 b", "gpt2"),
        ("qwen a", "qwen2_5_vl"),
    ],
)
def test_merging_one_adapter_gives_its_outputs(shelf, name, family):
    expected = logits(PeftModel.from_pretrained(base(family), shelf(name).folder), family)
    model = merge_adapter_sequence(base(family), [shelf(name).folder], progress=False)
    assert distance(logits(model, family), expected) < 1e-5
    assert distance(logits(base(family), family), expected) > 1e-2


def test_an_adapter_that_is_scaled_to_nothing_adds_nothing(shelf, tmp_path):
    """It was not trained further: what is left of its weights has no direction."""
    nothing = make(tmp_path / "nothing", "llama", 8, lora_alpha=0, task_name="nothing")
    alone = merge(tmp_path, nothing.folder, name="alone")
    assert all(not delta.any() for delta in merged_deltas(alone).values())
    assert_optimal(merge(tmp_path, shelf("llama a").folder, nothing.folder), [shelf("llama a"), nothing])
    merge(tmp_path, alone, shelf("llama a").folder, name="further")


def test_order_changes_no_byte(shelf, tmp_path):
    names = ["c", "lora", "only q"]
    weights = {"c": 0.3, "lora": 1.7, "only q": 1.0}
    outcomes = []
    for i, order in enumerate(itertools.permutations(names)):
        folders = [shelf(name).folder for name in order]
        chosen = [weights[name] for name in order]
        outcomes.append(files(merge(tmp_path, *folders, weights=chosen, name=str(i))))
    assert set(outcomes[0]) == {WEIGHTS, STATISTICS, "adapter_config.json", "README.md"}
    for outcome in outcomes[1:]:
        assert outcome == outcomes[0]


def test_merging_further_equals_merging_all_at_once(shelf, tmp_path):
    a, b, c, d = (shelf(name).folder for name in ("a", "b", "c", "d"))
    at_once = merge(tmp_path, a, b, c, d, name="at once")
    one_by_one = merge(tmp_path, merge(tmp_path, merge(tmp_path, b, a, name="1"), d, name="2"), c, name="3")
    in_pairs = merge(tmp_path, merge(tmp_path, d, a, name="4"), merge(tmp_path, b, c, name="5"), name="6")
    through_one = merge(tmp_path, merge(tmp_path, a, name="7"), b, c, d, name="8")
    for other in (one_by_one, in_pairs, through_one):
        assert but_operations(other) == but_operations(at_once)
    assert_optimal(at_once, [shelf(name) for name in ("a", "b", "c", "d")])


def test_merging_further_multiplies_weights(shelf, tmp_path):
    a, b, c = (shelf(name).folder for name in ("a", "b", "c"))
    first = merge(tmp_path, a, b, weights=[2.0, 0.25], name="first")
    further = merge(tmp_path, first, c, weights=[0.5, 3.0], name="further")
    at_once = merge(tmp_path, a, b, c, weights=[1.0, 0.125, 3.0], name="at once")
    assert but_operations(further) == but_operations(at_once)
    assert_optimal(further, [shelf(name) for name in ("a", "b", "c")], weights=[1.0, 0.125, 3.0])


def test_a_merge_can_be_merged_further_without_its_sources(shelf, tmp_path):
    """It holds all it needs, also for layers that some of its tasks trained and others did not."""
    names = ("only q", "only v and down", "lora")
    at_once = merge(tmp_path, *(shelf(name).folder for name in names), name="at once")
    first = merge(tmp_path, shelf(names[0]).folder, shelf(names[2]).folder, name="first")
    assert but_operations(merge(tmp_path, shelf(names[1]).folder, first, name="further")) == but_operations(at_once)


def test_saving_a_loaded_merge_again_loses_nothing(shelf, tmp_path):
    a, b, c = (shelf(name).folder for name in ("a", "b", "c"))
    merged = merge(tmp_path, a, b, name="first")
    loaded = PeftModel.from_pretrained(base("llava"), merged, adapter_name="some_name")
    loaded.save_pretrained(tmp_path / "loaded", selected_adapters=["some_name"])
    again = tmp_path / "loaded" / "some_name"
    assert (again / STATISTICS).read_bytes() == (merged / STATISTICS).read_bytes()
    sequence = merge_adapter_sequence(base("llava"), [b, a], progress=False)
    sequence.save_pretrained(tmp_path / "sequence")
    expected = files(merge(tmp_path, a, b, c, name="at once"))
    for i, folder in enumerate((again, tmp_path / "sequence")):
        further = files(merge(tmp_path, folder, c, name=f"further {i}"))
        assert further[WEIGHTS] == expected[WEIGHTS]
        assert further[STATISTICS] == expected[STATISTICS]


def test_a_saved_single_adapter_keeps_its_statistics_when_saved_again(shelf, tmp_path):
    PeftModel.from_pretrained(base("llava"), shelf("b").folder).save_pretrained(tmp_path / "b")
    assert files(tmp_path / "b")[STATISTICS] == files(shelf("b").folder)[STATISTICS]
    PeftModel.from_pretrained(base("llava"), shelf("lora").folder).save_pretrained(tmp_path / "1")  # truncates
    PeftModel.from_pretrained(base("llava"), tmp_path / "1").save_pretrained(tmp_path / "2")
    assert files(tmp_path / "2")[STATISTICS] == files(tmp_path / "1")[STATISTICS]


# ------------------------------------------------------------------------------------------------ kinds of adapters


def test_lora_and_many_adapters_merge_together(shelf, tmp_path):
    tasks = [shelf("lora"), shelf("a"), shelf("lora too")]
    folder = merge(tmp_path, *(task.folder for task in tasks))
    lora_layers = set(tasks[0].deltas)
    for layer, delta in merged_deltas(folder).items():
        known = [t for t in tasks if layer in lora_layers or layer in t.deltas or layer.endswith(QKV)]
        assert distance(delta, reference(known, layer, 1e-4, [1.0] * len(known))) < 1e-5, layer
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "MANY"
    assert [task["name"] for task in config["merge"]["tasks"]] == [
        "a",
        "lora",
        "lora too",
    ]  # LORA ones by their folders
    assert [task["trained"] for task in config["merge"]["routing"][PROJECTOR]["tasks"]] == [True, True, False]


@pytest.mark.parametrize("names", [("llama layer 1",), ("llama layer 1", "llama also layer 1"), ("llama without o",)])
def test_only_the_trained_layers_are_adapted(shelf, tmp_path, names):
    """`layers_to_transform` and `exclude_modules` say which; the merge must not adapt more."""
    tasks = [shelf(name) for name in names]
    folder = merge(tmp_path, *(task.folder for task in tasks))
    assert_optimal(folder, tasks)
    for model in (
        PeftModel.from_pretrained(base("llama"), folder),
        merge_adapter_sequence(base("llama"), [task.folder for task in tasks], progress=False),
    ):
        adapted = {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
        assert adapted == {layer for task in tasks for layer in task.deltas}


def task_names(folder):
    return [task["name"] for task in json.loads((folder / "adapter_config.json").read_text())["merge"]["tasks"]]


def test_task_names_can_be_given(shelf, tmp_path):
    folder = merge(tmp_path, shelf("a").folder, shelf("lora").folder, task_names=["last", None])
    assert task_names(folder) == ["last", "lora"]
    renamed = merge(tmp_path, folder, name="renamed", task_names=[["one", "two"]])
    assert task_names(renamed) == ["one", "two"]


# ---------------------------------------------------------------------------------------------- using what comes out


def test_files_and_sequence_give_the_same_merge(shelf, tmp_path):
    folders = [shelf(name).folder for name in ("c", "lora", "text only")]
    from_files = PeftModel.from_pretrained(base("llava"), merge(tmp_path, *folders, ridge=1e-3, temperature=0.1))
    for low_memory in (False, True):
        model = merge_adapter_sequence(
            base("llava"), folders, ridge=1e-3, temperature=0.1, low_cpu_mem_usage=low_memory, progress=False
        )
        state, expected = model.state_dict(), from_files.state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert torch.equal(logits(model, "llava"), logits(from_files, "llava"))


def test_the_merge_is_the_models_one_active_adapter(shelf):
    model = merge_adapter_sequence(base("llava"), [shelf("a").folder, shelf("b").folder], progress=False)
    assert list(model.peft_config) == ["default"] == model.active_adapters
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    named = merge_adapter_sequence(base("llava"), [shelf("a").folder], adapter_name="both", progress=False)
    assert list(named.peft_config) == ["both"] == named.active_adapters


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("a", "b"), "llava"),
        (("a",), "llava"),
        (("llama a", "llama b"), "llama"),
        (("gpt2 a", "gpt2 b"), "gpt2"),
        (("qwen a", "qwen b"), "qwen2_5_vl"),
    ],
)
def test_merge_and_unload_gives_the_same_outputs(shelf, names, family):
    model = merge_adapter_sequence(base(family), [shelf(name).folder for name in names], progress=False)
    expected = logits(model, family)
    assert distance(expected, logits(base(family), family)) > 1e-2
    plain = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    assert distance(logits(plain, family), expected) < 1e-4


def test_a_plain_merge_of_text_adapters_can_be_saved_as_a_plain_model(shelf, tmp_path):
    model = merge_adapter_sequence(base("llama"), [shelf("llama a").folder, shelf("llama b").folder], progress=False)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path), "llama"), logits(plain, "llama"))


def test_a_merge_cannot_be_measured_anew(shelf):
    model = merge_adapter_sequence(base("llama"), [shelf("llama a").folder, shelf("llama b").folder], progress=False)
    with pytest.raises(ValueError, match="is a merge"):
        collect_statistics(model, batches(model, "llama", 0), progress=False)


def test_progress_bar(shelf, tmp_path, capsys):
    folders = [shelf("a").folder, shelf("b").folder]
    merge_adapter_files(folders, tmp_path / "1")
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "14/14" in shown
    merge_adapter_files(folders, tmp_path / "2", progress=False)
    assert capsys.readouterr().err == ""


def test_an_empty_folder_and_missing_parents_may_be_the_output(shelf, tmp_path):
    (tmp_path / "empty").mkdir()
    assert merge(tmp_path, shelf("llama a").folder, name="empty") == tmp_path / "empty"
    nested = merge(tmp_path, shelf("llama a").folder, name="not/there/yet")
    assert files(nested) == files(tmp_path / "empty")
    assert nested.stat().st_mode == (tmp_path / "not").stat().st_mode
    (tmp_path / "link").symlink_to(tmp_path / "target", target_is_directory=True)
    (tmp_path / "target").mkdir()
    assert files(merge(tmp_path, shelf("llama a").folder, name="link")) == files(nested)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "not", "target"]


SCRIPT = """
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import LlavaForConditionalGeneration, LlamaForCausalLM

import peft_many
from tests.adapters import logits

root = Path(sys.argv[1])
torch.set_num_threads(1)


def fresh(cls, **options):
    return cls.from_pretrained(root / cls.__name__, **options)


def way(name, model, family):
    torch.save(logits(model, family), root / f"{name}.pt")


way("llava PeftModel", PeftModel.from_pretrained(fresh(LlavaForConditionalGeneration), root / "llava"), "llava")
low = PeftModel.from_pretrained(fresh(LlavaForConditionalGeneration), root / "llava", low_cpu_mem_usage=True)
way("llava low_cpu_mem_usage", low, "llava")
model = fresh(LlavaForConditionalGeneration)
model.load_adapter(str(root / "llava"))
way("llava load_adapter", model, "llava")
way("llava from_pretrained", LlavaForConditionalGeneration.from_pretrained(root / "llava"), "llava")
way("llama AutoPeftModel", AutoPeftModelForCausalLM.from_pretrained(root / "llama"), "llama")
way("llama from_pretrained", LlamaForCausalLM.from_pretrained(root / "llama"), "llama")
model = fresh(LlamaForCausalLM)
model.load_adapter(str(root / "llama"))
way("llama load_adapter", model, "llama")
names = eval(sys.argv[2])
peft_many.merge_adapter_files(names, root / "again", progress=False)
"""


@pytest.fixture(scope="module")
def new_process(shelf, tmp_path_factory):
    """A folder in which another Python process loaded merges in every way, and what it should have found."""
    root = tmp_path_factory.mktemp("process")
    expected = {}
    for family, names in (("llava", ("a", "b", "lora")), ("llama", ("llama a", "llama b"))):
        model = base(family)
        model.save_pretrained(root / type(model).__name__)
        folders = [shelf(name).folder for name in names]
        trained = type(model).from_pretrained(root / type(model).__name__)
        merged = merge_adapter_sequence(trained, folders, progress=False)
        merged.save_pretrained(root / family)
        expected[family] = logits(merged, family)
    again = [str(shelf(name).folder) for name in ("a", "only q", "lora")]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(map(str, [Path.cwd()]))}
    command = [sys.executable, "-c", SCRIPT, str(root), repr(again)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, expected, again


WAYS = [
    "llava PeftModel",
    "llava low_cpu_mem_usage",
    "llava load_adapter",
    "llava from_pretrained",
    "llama AutoPeftModel",
    "llama from_pretrained",
    "llama load_adapter",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_merge_loads_in_a_new_process(new_process, way):
    root, expected, _ = new_process
    family = way.partition(" ")[0]
    assert distance(torch.load(root / f"{way}.pt"), expected[family]) < 1e-5
    assert distance(logits(base(family), family), expected[family]) > 1e-2


def test_the_same_inputs_give_the_same_bytes_in_every_process(new_process, tmp_path):
    """Also in one whose hashes, and with them the order of sets, are others."""
    root, _, again = new_process
    assert files(merge(tmp_path, *map(Path, again))) == files(root / "again")


def test_the_card_names_the_tasks(shelf, tmp_path):
    folder = merge(tmp_path, shelf("a").folder, shelf("b").folder, weights=[1.0, 0.5])
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    row = next(line for line in card.splitlines() if line.startswith("| b |"))
    assert row.startswith(f"| b | {shelf('b').folder.name} | ")
    assert " | 0.5 | " in row
    assert str(shelf("b").folder.parent) not in card + (folder / "adapter_config.json").read_text()
    assert "import peft_many" in card


def test_a_merge_says_how_it_was_made_and_is_merged_further_so(shelf, tmp_path):
    first = merge(tmp_path / "first", shelf("a").folder, shelf("b").folder, ridge=1e-3, temperature=0.5)
    config = MAnyConfig.from_pretrained(merge(tmp_path / "second", first))
    assert (config.merge.options.ridge, config.merge.options.temperature) == (1e-3, 0.5)
    config = MAnyConfig.from_pretrained(merge(tmp_path / "third", first, ridge=1e-5, temperature=0.1))
    assert (config.merge.options.ridge, config.merge.options.temperature) == (1e-5, 0.1)


def test_plain_loras_of_a_model_that_takes_images(tmp_path):
    """PEFT's examples call them "CAUSAL_LM", by which `AutoPeftModel` would refuse their merge."""
    options = {"kind": LoraConfig, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    made = [make(tmp_path / name, seed=seed, **options).folder for seed, name in enumerate("ab")]
    untold = (made[0] / "README.md").read_text()
    assert "More Information Needed" not in untold
    assert "pipeline_tag: image-text-to-text" in untold
    folder = merge(tmp_path, *made)
    config = MAnyConfig.from_pretrained(folder)
    assert config.task_type is None
    assert config.auto_mapping["base_model_class"] == "LlavaForConditionalGeneration"
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForCausalLM" not in card
    assert "--lora-modules merged=lora\n```" in card, "nothing is routed"
    assert "visual prototypes" not in card


def test_config_type_of_a_merge(shelf, tmp_path):
    folder = merge(tmp_path, shelf("llama a").folder, shelf("llama b").folder)
    config = MAnyConfig.from_pretrained(folder)
    assert config.is_merge
    assert config.task_type == "CAUSAL_LM"
    # `AutoPeftModel` refuses a merge with a task type that only some of its adapters have.
    mixed = merge(tmp_path, shelf("llama a").folder, shelf("llama one row").folder, name="mixed")
    assert MAnyConfig.from_pretrained(mixed).task_type is None
    assert MAnyConfig.from_pretrained(mixed).auto_mapping is not None
    assert config.target_modules == set(
        json.loads((shelf("llama a").folder / "adapter_config.json").read_text())["target_modules"]
    )


def test_a_card_that_cannot_be_kept_shows_before_anything_is_merged(shelf, tmp_path, monkeypatch):
    folder = merge(tmp_path, shelf("a").folder, shelf("b").folder)
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    before = files(folder)
    monkeypatch.setattr("peft_many.merging.merge.prepare_merge", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"The model card '.*README.md', whose text is to be kept, cannot be read"):
        merge(tmp_path, shelf("a").folder, shelf("b").folder, overwrite=True)
    assert files(folder) == before
