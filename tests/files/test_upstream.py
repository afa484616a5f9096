"""Tripwires: what is used of PEFT, transformers and huggingface_hub beyond what they offer is there, and still needed.

A new release that changes one of these fails here first. Where a public way begins to suffice, take it and drop ours.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import huggingface_hub.errors
import peft
import pytest
import torch
from huggingface_hub.utils import httpx
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_many import MAnyConfig, MAnyModel
from peft_many.files.upstream import children_of, default_store, prefix_of, times_written, wrap_method
from peft_many.routing.task_router import TaskRouter
from peft_many.tuner.instruction_routers import InstructionRouters
from peft_many.tuner.merged_linear import MergedLinear
from peft_many.tuner.projector import ProjectorWrapper
from tests.forked import in_two_processes

PACKAGE = Path(__file__).parents[2] / "peft_many"


def test_the_tables_name_a_method_s_prefix_and_take_a_type():
    assert prefix_of(LoraConfig()) == "lora_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MANY"] is MAnyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MANY"] is MAnyModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["MANY"] == "lora_"
    assert "MANY" not in PeftType.__members__


def test_the_public_registration_still_refuses_other_people_s_types():
    """If this fails, `enter_peft_type` may have become superfluous."""
    with pytest.raises(ValueError, match=r"(?i)other"):
        peft.utils.register_peft_method(name="other", config_cls=MAnyConfig, model_cls=MAnyModel)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (PeftConfig, "from_pretrained", ["cls", "pretrained_model_name_or_path", "subfolder", "kwargs"]),
        (PeftConfig, "save_pretrained", ["self", "save_directory", "kwargs"]),
        (PeftModel, "push_to_hub", ["self", "repo_id"]),
        (PeftModel, "create_or_update_model_card", ["self", "output_dir"]),
    ],
)
def test_the_wrapped_methods_take_what_ours_pass_on_and_are_wrapped_once(owner, name, parameters):
    method = inspect.getattr_static(owner, name)
    method = method.__func__ if isinstance(method, classmethod) else method
    assert method.wrapped_by_peft_many
    assert not hasattr(method.__wrapped__, "wrapped_by_peft_many")
    assert list(inspect.signature(method.__wrapped__).parameters)[: len(parameters)] == parameters


# Why the wrapping is needed: tests/tuner/test_registration.py::test_upstream_still_asks_the_base_class...,
# tests/hub/test_pushing.py::test_other_types_are_pushed_as_ever.


def test_a_method_is_wrapped_once_where_it_is_defined():
    class Base:
        @classmethod
        def made(cls, value):
            return cls, value

        def said(self, value):
            return value

    class Derived(Base):
        pass

    for _ in range(2):
        wrap_method(Derived, "made", lambda original, cls, value: original(cls, value + 1))
        wrap_method(Derived, "said", lambda original, self, value: original(self, value * 2))
    assert Derived.made(1) == (Derived, 2)
    assert Base().said(3) == 6
    assert "made" not in vars(Derived)


# What PEFT's tuner and wrapper and torch's modules call of themselves, and ours override.
OVERRIDDEN = {
    (MAnyModel, LoraModel): [
        "_prepare_adapter_config",
        "_check_target_module_compatiblity",
        "_remap_adapter_state_dict_for_load",
        "_unload_and_optionally_merge",
        "_cast_adapter_dtype",
        "_enable_peft_forward_hooks",
    ],
    (ProjectorWrapper, ModulesToSaveWrapper): [
        "_forward_wrapped",
        "_forward_wrapped_mixed_batch",
        "_mixed_batch_forward",
    ],
    (InstructionRouters, ModulesToSaveWrapper): [],
    (MergedLinear, nn.Linear): ["_save_to_state_dict", "_load_from_state_dict", "_apply"],
    (TaskRouter, nn.Module): ["_apply"],
}


@pytest.mark.parametrize(
    ("ours", "theirs", "name"), [(*kinds, name) for kinds, names in OVERRIDDEN.items() for name in names]
)
def test_overridden_private_methods_have_the_same_parameters(ours, theirs, name):
    here, there = (
        inspect.signature(inspect.getattr_static(kind, name).__get__(None, kind)) for kind in (ours, theirs)
    )
    assert name in vars(ours)
    names = list(there.parameters)
    passing = {inspect.Parameter.VAR_KEYWORD}
    if hasattr(nn.Module, name):  # torch gives its own by their places
        passing.add(inspect.Parameter.VAR_POSITIONAL)
    passed_on = any(kind.kind in passing for kind in here.parameters.values())
    assert [one for one in names if one in here.parameters] == names or passed_on


def test_no_other_private_method_is_overridden():
    for (ours, theirs), known in OVERRIDDEN.items():
        private = {name for name in vars(ours) if re.fullmatch(r"_(?!abc_)[a-z]\w*", name)}
        assert {name for name in private if hasattr(theirs, name)} == set(known)


def test_the_process_group_s_store_counts_and_knows_the_timeout():
    """Without a public way to it: `monitored_barrier`, of one backend, would be the other way to notice absence."""
    (timeout, counts) = in_two_processes(_use_store, timeout=31.0)[0]
    assert timeout == 31.0
    assert counts == [0, 1, 0]
    assert not hasattr(torch.distributed, "get_default_store")


def _use_store(rank):
    store = default_store()
    return store.timeout.total_seconds(), [store.add(f"key {rank}", step) for step in (0, 1, -1)]


def test_a_module_s_children_are_had_by_all_their_names():
    module = nn.Module()
    module.one = module.again = nn.Identity()
    module.register_module("none", None)
    assert children_of(module) == {"one": module.one, "again": module.one, "none": None}
    assert children_of(module) is children_of(module)
    assert [name for name, _ in module.named_children()] == ["one"]


def test_writing_to_a_tensor_is_counted_but_in_inference():
    tensor = torch.zeros(2)
    before = times_written(tensor)
    tensor[:1].add_(1)
    assert times_written(tensor) == before + 1
    with torch.inference_mode():
        assert times_written(torch.zeros(2).add_(1)) == 0


def test_errors_of_a_broken_connection_are_those_of_the_http_library():
    assert issubclass(huggingface_hub.errors.HfHubHTTPError, httpx.HTTPError)


def test_no_other_private_name_is_used():
    """Attributes and modules with an underscore in front, of objects that are not our own."""
    known = {
        "files/upstream.py": {"distributed_c10d._get_default_store", "module._modules", "tensor._version"},
        # Ours: a mark on the function that stands for vLLM's, and what a watcher is pickled with.
        "serving/plugin.py": {"_checks_merge"},
        "routing/watched.py": {"_module"},
    }
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        used = {m for m in re.findall(r"\b(\w+\._[a-z]\w*)", text) if not m.startswith(("self.", "cls."))}
        used |= set(re.findall(r"""(?:\[|\b(?:get|pop|\w+attr)\([^()]*?)["'](_[a-z]\w*)["']""", text))
        used |= set(re.findall(r"(?:from|import) (?!self\.)(?:\w+\.)+(_\w+)", text))
        if used:
            found[str(path.relative_to(PACKAGE))] = used
    assert found == known
