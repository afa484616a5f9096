"""Arguments that people get wrong: an error that says what to do, before anything is read, changed or written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_many import (
    MAnyConfig,
    add_task,
    collect_statistics,
    export_lora,
    export_model,
    export_routed_model,
    inspect_adapter,
    merge_adapter_files,
    merge_adapter_sequence,
    plan_merge,
    pool_adapters,
    refit_merge,
    remove_task,
    reweight_tasks,
)
from tests.adapters import base, batches, files, make, state_digest

BATCH = {"input_ids": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate("ab"):
        make(root / name, "llama", seed, task_name=name)
    merge_adapter_files([root / "a", root / "b"], root / "merge", progress=False)
    base("llama").save_pretrained(root / "base")
    shutil.copytree(root / "a", root / "run" / "checkpoint-500")
    shutil.copytree(root / "b", root / "run" / "checkpoint-1000")
    shutil.copytree(root / "a", root / "named" / "clevr")
    return root


@pytest.fixture(scope="module")
def wrapped() -> Any:
    return get_peft_model(base("llama"), MAnyConfig(r=2))


@pytest.fixture(scope="module")
def merged(shelf) -> Any:
    return merge_adapter_sequence(base("llama"), [shelf / "a", shelf / "b"], progress=False)


def by_files(*args: Any, **options: Any) -> Any:
    return merge_adapter_files(*args, progress=False, **options)


def by_sequence(*args: Any, **options: Any) -> Any:
    return merge_adapter_sequence(*args, progress=False, **options)


# Of a, b, the live PeftModel w, the live merge m and an output folder o.
MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "files, swapped": (
        lambda a, b, w, m, o: by_files(o, [a, b]),
        "output folder must be a path.*adapters come before",
    ),
    "sequence, swapped": (
        lambda a, b, w, m, o: by_sequence([a, b], base("llama")),
        "loaded base model, but it is a list",
    ),
    "the base model by its name": (
        lambda a, b, w, m, o: by_sequence("me/base", [a]),
        "loaded base model, but it is a str",
    ),
    "one adapter, no list": (lambda a, b, w, m, o: by_sequence(base("llama"), a), "must be a list of at least one"),
    "no adapters": (lambda a, b, w, m, o: by_files([], o), r"must be a list of at least one.*\[\]"),
    "a mapping of adapters": (lambda a, b, w, m, o: by_files({"a": a, "b": b}, o), "must be a list"),
    "a model as the adapters": (lambda a, b, w, m, o: by_files(w, o), "must be a list.*a PeftModel"),
    "a PeftModel among them": (
        lambda a, b, w, m, o: by_files([a, w], o),
        r"one is a PeftModel; save it .*give the folder",
    ),
    "a state dict among them": (lambda a, b, w, m, o: by_files([a, {}], o), r"one is \{\}"),
    "a pair among them": (lambda a, b, w, m, o: by_sequence(base("llama"), [(a, 1.0)]), "one is a tuple"),
    "nothing among them": (lambda a, b, w, m, o: by_files([a, ""], o), "one is ''"),
    "a file": (
        lambda a, b, w, m, o: by_files([Path(a, "adapter_model.safetensors")], o),
        "There is no folder .*, but a file; give its folder, '.*a'",
    ),
    "an address": (
        lambda a, b, w, m, o: by_files([a, "https://huggingface.co/me/b"], o),
        "'https://huggingface.co/me/b' is an address; give a folder, or a Hub id",
    ),
    "a line with its end": (lambda a, b, w, m, o: by_files([f"{a}\n"], o), r"There is no folder '.*a\\n'"),
    "weights of a set": (lambda a, b, w, m, o: by_files({a, b}, o, weights=[1, 2]), "a set has no order"),
    "no device": (lambda a, b, w, m, o: by_files([a, b], o, device=None), "`device` must be .*, but it is None"),
    "samples as text": (
        lambda a, b, w, m, o: collect_statistics(w, [BATCH], max_samples="256"),
        "`max_samples` must be a whole number of at least 1, but it is '256'",
    ),
    "a rank as text": (
        lambda a, b, w, m, o: collect_statistics(w, [BATCH], rank="8"),
        "`rank` must be at least 1, and a whole number, but it is '8'",
    ),
    "a broken rank": (lambda a, b, w, m, o: collect_statistics(w, [BATCH], rank=2.5), "but it is 2.5"),
    "energy as text": (lambda a, b, w, m, o: collect_statistics(w, [BATCH], energy="all"), "but it is 'all'"),
    "a list of adapters to measure": (
        lambda a, b, w, m, o: collect_statistics(w, [BATCH], adapter_name=["default"]),
        r"There is no adapter \['default'\]; the model has",
    ),
    "planning with a model": (lambda a, b, w, m, o: plan_merge([w], progress=False), "one is a PeftModel"),
    "checkpoints": (
        lambda a, b, w, m, o: by_files([Path(a, "..", "run"), b], o),
        "subfolders of it; give one.*checkpoint-1000', '.*checkpoint-500'",
    ),
    "a subfolder": (
        lambda a, b, w, m, o: by_files([Path(a).parent / "named"], o),
        "give its subfolder, '.*named/clevr'",
    ),
    "a whole model": (lambda a, b, w, m, o: by_files([Path(a).parent / "base"], o), "it is a whole model"),
    "task_names as a string": (
        lambda a, b, w, m, o: by_files([a, b], o, task_names="xy"),
        "`task_names` must be a list",
    ),
    "task_names by adapter": (
        lambda a, b, w, m, o: by_files([a, b], o, task_names={"a": "x", "b": "y"}),
        "must be a list",
    ),
    "names of a merge's tasks in a set": (
        lambda a, b, w, m, o: by_files([a, b], o, task_names=["x", {"y", "z"}]),
        "for a merge a list of them, but one is {'y', 'z'}",
    ),
    "numbers as task_names": (lambda a, b, w, m, o: by_files([a, b], o, task_names=[1, 2]), "holds names.*one is 1"),
    "without as a string": (lambda a, b, w, m, o: by_files([a, b], o, without="a"), "`without` must be a list.*'a'"),
    "one weight": (lambda a, b, w, m, o: by_files([a, b], o, weights=0.5), "`weights` must be a list.*mapping.*0.5"),
    "weights as strings": (
        lambda a, b, w, m, o: by_files([a, b], o, weights=["1", "2"]),
        "finite and not negative.*'1'",
    ),
    "no weight": (lambda a, b, w, m, o: by_files([a, b], o, weights={"a": None}), "finite and not negative.*None"),
    "the output is an adapter": (lambda a, b, w, m, o: by_files([a, b], a), "is also an input; nothing was written"),
    "a dot in the name": (lambda a, b, w, m, o: by_sequence(base("llama"), [a], adapter_name="v1.5"), "without a dot"),
    "no name": (lambda a, b, w, m, o: by_sequence(base("llama"), [a], adapter_name=None), "without a dot.*None"),
    "a layer's name": (lambda a, b, w, m, o: by_sequence(base("llama"), [a], adapter_name="0"), "should not be '0'"),
    "a tensor's name": (
        lambda a, b, w, m, o: by_sequence(base("llama"), [a], adapter_name="weight"),
        "should not be 'weight'",
    ),
    "a model with adapters": (lambda a, b, w, m, o: by_sequence(w, [a]), "already has adapters"),
    "collecting, swapped": (lambda a, b, w, m, o: collect_statistics([BATCH], w), "not a list; data come second"),
    "collecting on one batch": (lambda a, b, w, m, o: collect_statistics(w, BATCH), "put a single batch into a list"),
    "collecting on a file": (lambda a, b, w, m, o: collect_statistics(w, "data.json"), "this is a str"),
    "refitting, swapped": (lambda a, b, w, m, o: refit_merge({"a": [BATCH]}, m), "must be a PeftModel.*a dict"),
    "refitting a folder": (lambda a, b, w, m, o: refit_merge("merge", {"a": [BATCH]}), "PeftModel.from_pretrained"),
    "refitting on all": (
        lambda a, b, w, m, o: refit_merge(m, [BATCH]),
        r"`calibration` must give.*\{'a': …\}.*a list",
    ),
    "refitting on one batch": (lambda a, b, w, m, o: refit_merge(m, {"a": BATCH, "b": BATCH}), "put a single batch"),
    "adding, swapped": (lambda a, b, w, m, o: add_task(a, Path(a).parent / "merge"), "is the adapter of one task"),
    "adding a list": (lambda a, b, w, m, o: add_task(Path(a).parent / "merge", [a], o), "one is a list"),
    "adding to a model": (lambda a, b, w, m, o: add_task(m, a), "one is a PeftModel"),
    "removing several": (
        lambda a, b, w, m, o: remove_task(Path(a).parent / "merge", ["a"], o),
        "the name of one task",
    ),
    "removing from a model": (lambda a, b, w, m, o: remove_task(m, "a"), "one is a PeftModel"),
    "weights by place": (
        lambda a, b, w, m, o: reweight_tasks(Path(a).parent / "merge", [1, 2], o),
        "must map tasks' names",
    ),
    "pooling, swapped": (lambda a, b, w, m, o: pool_adapters(o, [a, b]), "adapters come before it"),
    "inspecting a model": (lambda a, b, w, m, o: inspect_adapter(m), "one is a PeftModel"),
    "exporting a model": (lambda a, b, w, m, o: export_lora(m, o), "one is a PeftModel"),
    "exporting a list": (lambda a, b, w, m, o: export_routed_model([a], o), "one is a list"),
    "exporting into a list": (lambda a, b, w, m, o: export_lora(a, [o]), "output folder must be a path"),
    "exporting onto itself": (lambda a, b, w, m, o: export_lora(a, a), "is also an input; nothing was written"),
    "exporting with a model": (
        lambda a, b, w, m, o: export_model(a, o, base_model=base("llama")),
        "`base_model` must be a folder",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_changes_nothing(shelf, wrapped, merged, tmp_path, mistake):
    call, words = MISTAKES[mistake]
    before = files(shelf), state_digest(wrapped), state_digest(merged)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        call(str(shelf / "a"), str(shelf / "b"), wrapped, merged, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert (files(shelf), state_digest(wrapped), state_digest(merged)) == before
    assert list(tmp_path.iterdir()) == []


def test_what_is_as_good_as_a_list(shelf, tmp_path):
    entries = [shelf / "a", shelf / "b"]
    by_files(entries, tmp_path / "0", weights=[1.0, 2.0], task_names=["x", None])
    for i, (adapters, weights, names) in enumerate(
        [
            (tuple(entries), torch.tensor([1.0, 2.0]), ("x", None)),
            (iter(entries), torch.tensor([1.0, 2.0]).numpy(), ["x", None]),
            ({entry: None for entry in entries}.keys(), {"b": 2, "x": 1}, ["x", None]),
        ],
        start=1,
    ):
        by_files(adapters, tmp_path / f"{i}", weights=weights, task_names=names, without=())
        assert files(tmp_path / f"{i}") == files(tmp_path / "0")


def assert_same_weights(one: Any, other: Any) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_compiled_base_model_is_merged_on_as_it_is_inside(shelf, merged):
    model = base("llama")
    on_compiled = by_sequence(torch.compile(model, backend="eager"), [shelf / "a", shelf / "b"])
    assert on_compiled.get_base_model() is model
    assert_same_weights(on_compiled, merged)


def test_a_compiled_merge_is_refitted(shelf):
    both = [by_sequence(base("llama"), [shelf / "a", shelf / "b"]) for _ in range(2)]
    data = {name: batches(both[0], "llama", seed) for seed, name in enumerate("ab")}
    refit_merge(both[0], data, progress=False)
    refit_merge(torch.compile(both[1], backend="eager"), data, progress=False)
    assert_same_weights(*both)
