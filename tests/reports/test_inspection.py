"""What `inspect_adapter` says of adapters and merges, compared with what is in their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from peft_many import inspect_adapter, merge_adapter_files, merge_report, remove_task
from peft_many.files.errors import UnmergeableAdapterError
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, files, make, make_loha


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shelf")
    made = {"a": make(root / "a", seed=0, task_name="a").folder}
    made["b"] = make(root / "b", seed=1, task_name="b", r=2, energy=0.99, rank_pattern={"q_proj": 3}).folder
    return made


def test_one_adapter(shelf):
    before = files(shelf["b"])
    found = inspect_adapter(shelf["b"])
    assert files(shelf["b"]) == before
    assert (found.peft_type, found.is_merge, found.layers, found.ranks) == ("MANY", False, 14, (2, 3))
    assert found.files == {name: len(content) for name, content in before.items()}
    assert found.parameters == sum(tensor.numel() for tensor in load_file(shelf["b"] / WEIGHTS).values())
    assert (found.options, found.routing, found.averaged_projectors) == ({}, {}, {})
    (task,) = found.tasks
    assert (task.name, task.weight, task.source, task.revision) == ("b", 1.0, "b", None)
    assert (task.samples, task.images, task.layers, task.measured_layers, task.covariances) == (4, 4, 14, 14, 8)
    assert task.projectors == list(task.prototypes) == task.spreads == [PROJECTOR]
    assert task.prototypes[PROJECTOR] == 24
    assert (task.instructions, task.instruction_width) == (4, 64)
    assert 0.99 <= task.energy < 1  # what was asked for, the even remainder in the kept directions included
    stored = load_file(shelf["b"] / STATISTICS)
    covariances = [tensor for key, tensor in stored.items() if ".covariance." in key]
    assert task.statistics_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    ranks = [len(tensor) for tensor in covariances]
    assert task.covariance_ranks == (min(ranks), max(ranks))


def test_an_adapter_of_another_peft_method(tmp_path):
    found = inspect_adapter(make_loha(tmp_path / "loha").folder)
    assert (found.peft_type, found.is_merge, found.layers, found.ranks, found.dtype) == (
        "LOHA",
        False,
        2,
        (4, 4),
        "float32",
    )
    (task,) = found.tasks
    assert (task.layers, task.ranks, task.covariances) == (2, (4, 4), 2)


def test_a_merge_and_what_was_removed_from_it(shelf, tmp_path):
    chosen = [shelf["a"], shelf["b"]]
    merged = merge_adapter_files(
        chosen, tmp_path / "m", weights=[2.0, 1.0], router="gaussian", gate_lora=True, progress=False
    )
    found = inspect_adapter(merged)
    assert found.is_merge
    assert found.ranks == (6, 7)
    assert found.options == {
        "method": "lpm",
        "projectors": "routed",
        "ridge": 1e-4,
        "router": "gaussian",
        "temperature": 1.0,
        "gate_lora": True,
        "gate_by": "images",
        "dtype": "float32",
    }
    assert found.routing == {PROJECTOR: ["a", "b"]}
    single = {name: inspect_adapter(shelf[name]).tasks[0] for name in "ab"}
    lost = merge_report(merged, conflicts=False, progress=False).interference
    for task in found.tasks:
        assert task.interference == pytest.approx(lost[task.name], rel=1e-3)
    for task in found.tasks:
        own = 4 * sum(
            tensor.numel() for key, tensor in load_file(shelf[task.name] / WEIGHTS).items() if "lora_A" in key
        )
        assert task.statistics_bytes == single[task.name].statistics_bytes + own
    measured = {name: one.statistics_bytes for name, one in single.items()}
    bare = [dataclasses.replace(task, interference=None, statistics_bytes=measured[task.name]) for task in found.tasks]
    assert bare == [dataclasses.replace(single["a"], weight=2.0), single["b"]]
    assert [(line.kind, line.tasks) for line in found.operations] == [("merge", ["a", "b"])]
    assert json.loads(json.dumps(dataclasses.asdict(found)))["tasks"][1]["sha256"] == single["b"].sha256
    expected = merge_report(merged, conflicts=False, progress=False).routing
    assert found.expected_routing == {name: routing.kept() for name, routing in expected.items()}
    assert list(expected) == [PROJECTOR, "gate_lora"]
    left = inspect_adapter(remove_task(merged, "b", progress=False))
    assert [task.name for task in left.tasks] == ["a"]
    assert left.routing == {PROJECTOR: ["a"]}
    assert "'b'" not in repr(left)


def test_other_methods_and_plain_adapters(shelf, tmp_path):
    chosen = [shelf["a"], shelf["b"]]
    merged = merge_adapter_files(chosen, tmp_path / "m", method="average", projectors="mean", progress=False)
    found = inspect_adapter(merged)
    assert found.options["method"]["name"] == "average"
    assert not {"ridge", "router"} & found.options.keys()
    assert found.averaged_projectors == {PROJECTOR: ["a", "b"]}
    plain = inspect_adapter(make(tmp_path / "p", kind=LoraConfig, target_modules=r".*language_model.*q_proj").folder)
    assert (plain.peft_type, plain.options, plain.tasks[0].name, plain.tasks[0].projectors) == ("LORA", {}, "p", [])
    (tmp_path / "p" / STATISTICS).unlink()
    (bare,) = inspect_adapter(tmp_path / "p").tasks
    assert (bare.samples, bare.covariances, bare.covariance_ranks, bare.energy) == (0, 0, None, None)
    (tmp_path / "p" / WEIGHTS).write_bytes(b"rubbish")
    with pytest.raises(UnmergeableAdapterError, match="damaged or truncated"):
        inspect_adapter(tmp_path / "p")
