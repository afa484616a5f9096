"""Merges whose gates go by instructions, in files: saved, loaded, edited, and made by strangers."""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peft_many import (
    MAnyConfig,
    add_task,
    collect_statistics,
    inspect_adapter,
    merge_adapter_files,
    merge_adapter_sequence,
    merge_report,
    pool_adapters,
    remove_task,
    reweight_tasks,
)
from peft_many.commands import app
from peft_many.files.errors import MalformedAdapterError, UnmergeableAdapterError
from peft_many.files.statistics import STATISTICS_NAME, AdapterStatistics
from peft_many.files.tensor_keys import KEY_PREFIX
from peft_many.merging.routed_instructions import LEAST_VARIANCE
from peft_many.records import INSTRUCTION_ROUTER
from peft_many.routing.instructions import features_of_instructions, router_of
from tests import new_process
from tests.adapters import STATISTICS, WEIGHTS, but_operations, files
from tests.merging.test_dispatched import to_disk
from tests.routing.asked import MIXED, TEXTS, adapter, base, batch, folders, merge, merged, owners, question
from tests.routing.test_gates import generate, logits
from tests.routing.test_instructions import assert_rows_are_of, close

QUIET: dict[str, Any] = {"progress": False}
ROUTER = f"{KEY_PREFIX}{INSTRUCTION_ROUTER}"


def router_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    return {key.removeprefix(f"{ROUTER}."): tensor for key, tensor in tensors.items() if key.startswith(ROUTER)}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return merge_adapter_files(folders("llama", TEXTS), tmp_path / "whole", gate_by="instructions", **QUIET)


# ---------------------------------------------------------------------------------------------------- what is measured


def test_statistics_are_the_mean_and_covariance_of_what_is_asked() -> None:
    model = adapter(base("llama"), "llama", TEXTS[0], 0)
    asked = model.peft_config["default"].statistics.tasks[0].instructions
    rows = [
        features_of_instructions(base("llama"), batch(model, "llama", [TEXTS[0]] * 4, 10 * n, side, answers=3))
        for n, side in enumerate(("left", "right"))
    ]
    features = torch.cat([found[1] for found in rows if found is not None]).double()
    assert asked.count == 8
    torch.testing.assert_close(asked.prototype.double(), features.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(asked.spread.dense(), torch.cov(features.T), atol=1e-4, rtol=1e-2)


def test_what_an_adapter_trains_changes_nothing() -> None:
    """They are the base model's own, so that tasks can be compared."""
    one, other = (
        adapter(base("llava"), "llava", MIXED[0], seed, projector_modules=projectors)
        for seed, projectors in ((0, []), (1, None))
    )
    before, found = (model.peft_config["default"].statistics.tasks[0].instructions for model in (one, other))
    assert torch.equal(found.prototype, before.prototype)
    assert torch.equal(found.spread.factor, before.spread.factor)


def test_the_warning_points_to_the_callers_line_once(recwarn: pytest.WarningsRecorder) -> None:
    model = adapter(base("llama"), "llama", TEXTS[0], 0)
    recwarn.clear()
    batches = [batch(model, "llama", [TEXTS[0]] * 2, seed) for seed in range(3)]
    collect_statistics(model, batches, **QUIET)
    (said,) = [one for one in recwarn if "have no `labels`" in str(one.message)]
    assert said.filename == __file__
    assert "6 samples" in str(said.message)
    recwarn.clear()
    for labelled in batches:
        labelled["labels"] = labelled["input_ids"]  # all of it: no prompt
    collect_statistics(model, batches, **QUIET)
    assert [one for one in recwarn if "6 samples have no `labels`" in str(one.message)]
    recwarn.clear()
    encoder = adapter(base("t5"), "t5", TEXTS[0], 0)
    targets = {"labels": torch.tensor([[5, 6], [7, -100]])}
    collect_statistics(encoder, [{**one, **targets} for one in batches], **QUIET)
    embedded = [{"inputs_embeds": torch.randn(2, 5, 32), "attention_mask": torch.ones(2, 5)}]
    collect_statistics(model, embedded, **QUIET)
    assert not [one for one in recwarn if "`labels`" in str(one.message)]
    assert model.peft_config["default"].statistics.tasks[0].instructions is None


# -------------------------------------------------------------------------------------------------- saved and loaded


def test_files_hold_what_a_merge_in_memory_has(tmp_path: Path, whole: Path) -> None:
    merged("llama", TEXTS, "instructions").save_pretrained(str(tmp_path / "memory"))
    saved, found = load_file(tmp_path / "memory" / WEIGHTS), load_file(whole / WEIGHTS)
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[key], found[key]) for key in saved)
    assert router_tensors(whole).keys() == {"prototypes", "directions", "variances"}
    again = merge_adapter_files(folders("llama", TEXTS)[::-1], tmp_path / "again", gate_by="instructions", **QUIET)
    assert files(again) == files(whole)


def test_half_precision_files_keep_prototypes_in_float32(tmp_path: Path, whole: Path) -> None:
    half = merge_adapter_files(
        folders("llama", TEXTS), tmp_path / "half", gate_by="instructions", dtype=torch.bfloat16, **QUIET
    )
    assert all(torch.equal(tensor, router_tensors(whole)[name]) for name, tensor in router_tensors(half).items())
    model = PeftModel.from_pretrained(base("llama"), str(half)).eval()
    own, inputs = owners("llama", TEXTS), batch(owners("llama", TEXTS)[0], "llama", [TEXTS[1], TEXTS[2]])
    joint = logits(model, inputs)
    for row, t in enumerate((1, 2)):
        mask = inputs["attention_mask"][row].bool()
        assert close(joint[row][mask], logits(own[t], inputs)[row][mask], 0.1)


@pytest.mark.parametrize("name", ["default", "a"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_under_any_name(whole: Path, tmp_path: Path, name: str, low_cpu_mem_usage: bool) -> None:
    own, inputs = owners("llama", TEXTS), batch(owners("llama", TEXTS)[0], "llama", [TEXTS[2], TEXTS[0]])
    model = PeftModel.from_pretrained(
        base("llama"), str(whole), adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert_rows_are_of(model, inputs, [own[2], own[0]], merged("llama", TEXTS, None))
    model.save_pretrained(str(tmp_path / "again"))
    saved = load_file((tmp_path / "again" if name == "default" else tmp_path / "again" / name) / WEIGHTS)
    expected = load_file(whole / WEIGHTS)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


def test_loading_in_a_new_process(tmp_path: Path, whole: Path) -> None:
    base("llama").save_pretrained(str(tmp_path / "base"))
    model = merged("llama", TEXTS, "instructions")
    inputs = batch(model, "llama", [TEXTS[2], TEXTS[0], TEXTS[1]])
    torch.save((inputs, logits(model, inputs), generate(model, inputs)), tmp_path / "expected.pt")
    script = f"""
        import torch, peft_many
        from peft import PeftModel
        from transformers import LlamaForCausalLM
        inputs, expected, answers = torch.load(r"{tmp_path}/expected.pt")
        for kind in ("peft", "transformers", "beside"):
            model = LlamaForCausalLM.from_pretrained(r"{tmp_path}/base")
            if kind == "peft":
                model = PeftModel.from_pretrained(model, r"{whole}").eval()
            else:
                if kind == "beside":
                    from peft_many import MAnyConfig
                    model.add_adapter(MAnyConfig(r=2), "other")
                model.load_adapter(r"{whole}", adapter_name="gated")
                model.set_adapter("gated")
            with torch.no_grad():
                torch.testing.assert_close(model(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), answers)
            if kind == "transformers":
                model.save_pretrained(r"{tmp_path}/saved")
    """
    done = new_process.run(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    expected, saved = load_file(whole / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert {key.removeprefix(KEY_PREFIX) for key in expected} == {key.removeprefix(KEY_PREFIX) for key in saved}


def test_state_dicts_go_to_and_fro() -> None:
    model = merge("llama", TEXTS, "instructions")
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    assert len([key for key in state if key.startswith(ROUTER)]) == 3
    router = router_of(model.get_base_model(), "default")
    assert router is not None
    router.prototypes.zero_()
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    own, inputs = owners("llama", TEXTS), batch(model, "llama", [TEXTS[2], TEXTS[0]])
    assert_rows_are_of(model, inputs, [own[2], own[0]])


def test_a_base_model_on_disk(tmp_path: Path) -> None:
    """The language model with its embeddings, that is; the first parameters of the model are there."""
    paths = folders("llava", MIXED)
    whole = merge_adapter_files(paths, tmp_path / "whole", gate_by="both", **QUIET)
    own, inputs = owners("llava", MIXED), batch(owners("llava", MIXED)[0], "llava", [MIXED[2], MIXED[0]])
    for number, load in enumerate(
        (
            lambda model: merge_adapter_sequence(model, paths, gate_by="both", **QUIET),
            lambda model: PeftModel.from_pretrained(model, str(whole)).eval(),
        )
    ):
        model = load(to_disk(base("llava"), tmp_path / str(number)))
        router = router_of(model.get_base_model(), "default")
        assert router is not None
        assert not any(buffer.is_meta for buffer in router.buffers())
        assert_rows_are_of(model, inputs, [own[2], own[0]])


# ------------------------------------------------------------------------------------------------------------ editing


@pytest.mark.parametrize("gate_by", ["instructions", "both"])
def test_editing_gives_what_merging_gives(tmp_path: Path, gate_by: str) -> None:
    a, b, c = adapters = folders("llava", MIXED)
    everything = merge_adapter_files(adapters, tmp_path / "whole", gate_by=gate_by, **QUIET)
    two = merge_adapter_files([a, c], tmp_path / "two", gate_by=gate_by, **QUIET)
    assert but_operations(remove_task(everything, "t1", tmp_path / "removed", **QUIET)) == but_operations(two)
    added = add_task(two, b, tmp_path / "added", **QUIET)
    assert but_operations(added) == but_operations(everything)
    on = merge_adapter_files([b, two], tmp_path / "on", **QUIET)  # which inherits what its gates go by
    assert but_operations(on) == but_operations(everything)
    heavy = merge_adapter_files(adapters, tmp_path / "heavy", weights=[1, 2, 1], gate_by=gate_by, **QUIET)
    assert but_operations(reweight_tasks(everything, {"t1": 2.0}, tmp_path / "changed", **QUIET)) == but_operations(
        heavy
    )
    # How much a task counts in the merged LoRA says nothing of where its questions are.
    assert all(torch.equal(tensor, router_tensors(everything)[name]) for name, tensor in router_tensors(heavy).items())


def test_nothing_of_a_removed_task_is_kept(tmp_path: Path, whole: Path) -> None:
    removed = remove_task(whole, "t1", tmp_path / "removed", **QUIET)
    prototype = AdapterStatistics.load(folders("llama", TEXTS)[1] / STATISTICS_NAME).tasks[0].instructions.prototype
    assert prototype.numpy().tobytes() in (whole / WEIGHTS).read_bytes()
    for content in files(removed).values():
        assert prototype.numpy().tobytes() not in content


def test_a_task_of_weight_zero_is_not_asked_for(tmp_path: Path) -> None:
    model = merge("llama", TEXTS, "instructions", weights=[1, 0, 1])
    own = owners("llama", TEXTS)
    inputs = batch(model, "llama", [TEXTS[2], TEXTS[0]])
    assert_rows_are_of(model, inputs, [own[2], own[0]])
    assert model.peft_config["default"].merge.instructions.tasks == ["t0", "t2"]
    router = router_of(model.get_base_model(), "default")
    assert router is not None
    read = features_of_instructions(model.get_base_model(), batch(model, "llama", [TEXTS[1]]))
    assert read is not None
    assert torch.isneginf(router.scores(read[1])[0]).tolist() == [False, True, False]


def test_what_merges_disagree_on_is_not_inherited(tmp_path: Path, whole: Path) -> None:
    def options(name: str, **given: Any) -> Any:
        made = merge_adapter_files([whole], tmp_path / name, **QUIET, **given)
        return MAnyConfig.from_pretrained(str(made)).merge.options

    assert options("same").gate_by == "instructions"
    assert options("both", gate_by="both").gate_by == "both"
    assert not options("off", gate_lora=False).gate_lora
    assert options("off too", gate_lora=False).gate_by is None
    assert options("shy", abstain_above=4.0, gate_by="instructions").abstain_above == 4.0
    shy = tmp_path / "shy"
    whole = shy
    assert options("still shy").abstain_above == 4.0
    assert options("no gate", gate_lora=False).abstain_above is None
    with pytest.raises(ValueError, match="`gate_by` needs `gate_lora=True`, but it is False"):
        options("contradiction", gate_lora=False, gate_by="both")
    with pytest.raises(UnmergeableAdapterError, match="visual prototypes, but none of the adapters has one"):
        options("pictures", gate_by="images")
    assert not (tmp_path / "pictures").exists()


def test_pools_know_what_all_of_their_tasks_ask(tmp_path: Path) -> None:
    a, b, c = folders("llama", TEXTS)
    pool = pool_adapters([a, b], tmp_path / "pool", task_name="pool", **QUIET)
    asked = [AdapterStatistics.load(one / STATISTICS_NAME).tasks[0].instructions for one in (a, b, pool)]
    torch.testing.assert_close(asked[2].prototype, (asked[0].prototype + asked[1].prototype) / 2)
    assert asked[2].count == 16
    within = (asked[0].spread.dense() + asked[1].spread.dense()) / 2
    apart = (asked[0].prototype - asked[1].prototype).double()
    torch.testing.assert_close(asked[2].spread.dense(), within + apart.outer(apart) / 4, atol=1e-4, rtol=1e-2)
    model = merge_adapter_sequence(base("llama"), [pool, c], gate_by="instructions", **QUIET)
    of_pool = PeftModel.from_pretrained(base("llama"), str(pool)).eval()
    inputs = batch(model, "llama", list(TEXTS))
    assert_rows_are_of(model, inputs, [of_pool, of_pool, owners("llama", TEXTS)[2]])


def test_the_command_line_and_recipes(tmp_path: Path, whole: Path) -> None:
    adapters = [str(one) for one in folders("llama", TEXTS)]
    done = CliRunner().invoke(app, ["merge", *adapters, "-o", str(tmp_path / "cli"), "--gate-by", "instructions"])
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "cli") == files(whole)
    recipe = {"adapters": [{"adapter": one} for one in adapters], "options": {"gate_by": "instructions"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["merge", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "r")])
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "r").keys() == files(whole).keys()
    done = CliRunner().invoke(app, ["merge", *adapters, "-o", str(tmp_path / "x"), "--gate-by", "luck"])
    assert done.exit_code != 0
    assert "gate" in done.output
    assert inspect_adapter(whole).options["gate_by"] == "instructions"
    assert merge_report(whole, conflicts=False, progress=False) is not None


# ------------------------------------------------------------------------------------------------- what goes wrong


def without_instructions(source: Path, target: Path) -> Path:
    """An adapter as it was measured before instructions were."""
    target.mkdir()
    for name, content in files(source).items():
        (target / name).write_bytes(content)
    path = target / STATISTICS
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["peft_many"])
    for task in header["tasks"]:
        del task["instructions"]
    tensors = {key: tensor for key, tensor in load_file(path).items() if "(instructions)" not in key}
    save_file(tensors, path, {"peft_many": json.dumps(header)})
    return target


def test_adapters_of_before_instructions_were_measured(tmp_path: Path) -> None:
    old = without_instructions(folders("llama", TEXTS)[0], tmp_path / "old")
    others = folders("llama", TEXTS)[1:]
    with pytest.raises(
        UnmergeableAdapterError, match=r"old.*statistics of its instructions.*none was measured. Run `collect_statis"
    ):
        merge_adapter_files([old, *others], tmp_path / "merged", gate_by="instructions", **QUIET)
    assert not (tmp_path / "merged").exists()
    plain = merge_adapter_files([old, *others], tmp_path / "plain", **QUIET)
    with pytest.raises(UnmergeableAdapterError, match=r"t0.*none was measured"):
        merge_adapter_files([plain], tmp_path / "merged", gate_by="both", **QUIET)
    pool = pool_adapters([old, *others], tmp_path / "pool", task_name="pool", **QUIET)
    assert AdapterStatistics.load(pool / STATISTICS_NAME).tasks[0].instructions is None


def test_a_task_that_always_asks_in_the_same_words(tmp_path: Path) -> None:
    """Two of them, so that nothing varies at all; the base model may be another one than the measured, rounded."""
    made = []
    for words in (0, 1):
        model = adapter(base("llama"), "llama", (words, None), words)
        ids = torch.tensor([[1, *question(words, 3)]] * 4)
        labels = ids.clone()
        labels[:, :-1] = -100
        collect_statistics(model, [{"input_ids": ids, "labels": labels}], **QUIET)
        model.save_pretrained(str(tmp_path / str(words)))
        made.append(model.eval())
    paths = [tmp_path / "0", tmp_path / "1"]
    for options in ({}, {"abstain_above": 4.0}):
        model = merge_adapter_sequence(base("llama"), paths, gate_by="instructions", **options, **QUIET)
        record = model.peft_config["default"].merge.instructions
        assert record.distances == [1.0] * len(record.tasks)
        router = router_of(model.get_base_model(), "default")
        assert router is not None
        torch.testing.assert_close(router.variances, torch.full_like(router.variances, LEAST_VARIANCE / 64))
        for own, words in zip(made, (0, 1)):
            ids = torch.tensor([[1, *question(words, 3)[:-1]]])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            assert_rows_are_of(model, inputs, [own])
            half = logits(copy.deepcopy(model).bfloat16(), inputs).float()
            assert (half - logits(own, inputs)).abs().max() < 0.3


def test_one_sample_is_not_enough(tmp_path: Path) -> None:
    model = adapter(base("llama"), "llama", TEXTS[0], 0)
    collect_statistics(model, [batch(model, "llama", [TEXTS[0]], answers=2)], **QUIET)
    model.save_pretrained(str(tmp_path / "one"))
    with pytest.raises(UnmergeableAdapterError, match="a single one was measured"):
        merge_adapter_files([tmp_path / "one"], tmp_path / "merged", gate_by="instructions", **QUIET)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], tensors: dict[str, Any] | None = None) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config["merge"])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    kept = load_file(folder / WEIGHTS)
    for name, tensor in (tensors or {}).items():
        if tensor is None:
            del kept[f"{ROUTER}.{name}"]
        else:
            kept[f"{ROUTER}.{name}"] = tensor
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def same(record: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "tensors", "said"),
    [
        (lambda record: record["instructions"].update(width=65), {}, "prototypes of shape"),
        (lambda record: record["instructions"].update(width=0), {}, "width"),
        (lambda record: record["instructions"].update(width=10**12), {}, "prototypes of shape"),
        (lambda record: record["instructions"].update(directions=10**9), {}, "directions of shape"),
        (lambda record: record["instructions"].update(directions=-1), {}, "router of instructions"),
        (lambda record: record["instructions"].update(distances=[0.0] * 3), {}, "router of instructions"),
        (lambda record: record["instructions"].update(distances=[float("nan")] * 3), {}, "nan"),
        (lambda record: record["instructions"].update(distances="far"), {}, "distances"),
        (lambda record: record["instructions"].update(tasks=["t0", "t1", "nobody"]), {}, "not its `tasks`"),
        (lambda record: record["instructions"].update(tasks=["t0", "t0", "t1"]), {}, "not its `tasks`"),
        (lambda record: record["instructions"].update(tasks=["t0", "t1"]), {}, "router of instructions"),
        (lambda record: record["instructions"].update(tasks=[]), {}, "router of instructions"),
        (lambda record: record.pop("instructions"), {}, "contradict"),
        (lambda record: record["options"].update(gate_by="images"), {}, "contradict"),
        (lambda record: record["options"].update(gate_by="luck"), {}, "gate_by"),
        (same, {"prototypes": None}, "prototypes of shape"),
        (same, {"variances": None}, "variances of shape"),
        (same, {"directions": torch.zeros(2, 64)}, "directions of shape"),
        (same, {"prototypes": torch.zeros(3, 1, 64)}, "prototypes of shape"),
    ],
)
def test_records_of_strangers(
    whole: Path, change: Callable[[dict[str, Any]], Any], tensors: dict[str, Any], said: str
) -> None:
    rewrite(whole, change, tensors)
    with pytest.raises(MalformedAdapterError, match=said):
        PeftModel.from_pretrained(base("llama"), str(whole))
    model = base("llama")
    with pytest.raises(MalformedAdapterError, match=said):
        PeftModel.from_pretrained(model, str(whole))
    assert not hasattr(model, INSTRUCTION_ROUTER)


def test_what_a_stranger_left_out_of_the_statistics(whole: Path, tmp_path: Path) -> None:
    """Merging further goes by the statistics, whatever the router's own tensors are."""
    bad = {"prototypes": torch.full((3, 64), torch.nan), "extra": torch.zeros(3)}
    expected = files(merge_adapter_files([whole], tmp_path / "before", **QUIET))
    rewrite(whole, same, {"prototypes": bad["prototypes"]})
    found = files(merge_adapter_files([whole], tmp_path / "after", **QUIET))
    assert found[WEIGHTS] == expected[WEIGHTS]
    path = whole / STATISTICS
    tensors = load_file(path)
    key = next(key for key in tensors if "prototype.(instructions)" in key)
    tensors[key][0] = torch.nan
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(Exception, match=r"\(instructions\)' holds NaN or Inf"):
        merge_adapter_files([whole], tmp_path / "never", **QUIET)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["prototypes", "directions", "variances", "task_weight"])
def test_a_router_or_gate_that_holds_nan_is_not_loaded(tmp_path, which, value):
    folder = merge_adapter_files(folders("llava", MIXED), tmp_path / "m", router="gaussian", gate_by="both", **QUIET)
    tensors, model = load_file(folder / WEIGHTS), base("llava")
    keys = [key for key in tensors if key.endswith(f".{which}")]
    assert len(keys) >= (1 if which == "task_weight" else 2)  # the images' and the instructions'
    for key in keys[:2]:
        broken = {**tensors, key: tensors[key].clone()}
        broken[key].view(-1)[-1] = value
        save_file(broken, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(MalformedAdapterError, match="NaN or Inf") as caught:
            PeftModel.from_pretrained(copy.deepcopy(model), folder)
        assert f"{folder}: tensor '{key}'" in str(caught.value)
    if which == "variances":
        save_file({**tensors, key: torch.zeros_like(tensors[key])}, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(MalformedAdapterError, match="must be positive"):
            PeftModel.from_pretrained(copy.deepcopy(model), folder)
