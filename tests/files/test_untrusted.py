"""What a config may say: everything that PEFT itself would write, and nothing of another type."""

from __future__ import annotations

import json
import math

import pytest
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import EvaConfig, LoraRuntimeConfig

from peft_many import MAnyConfig
from peft_many.files.errors import MalformedAdapterError
from peft_many.files.untrusted import check_config
from tests.adapters import base

TASK = {"name": "a", "weight": 1.0, "origin": {"sha256": "0", "source": "a"}}
MERGE = {
    "options": {"method": "lpm", "ridge": 1e-4, "router": "cosine", "temperature": 0.02},
    "tasks": [TASK],
    "routing": {"p": {"width": 4, "tasks": [{"name": "a", "trained": True}]}},
}

GOOD = [
    LoraConfig(),
    LoraConfig(r=3, lora_alpha=1.5, rank_pattern={"a": 2}, alpha_pattern={"a": 0.5}),  # type: ignore[arg-type]
    LoraConfig(target_modules={"q_proj"}, exclude_modules="x", modules_to_save=["lm_head"]),
    LoraConfig(layers_to_transform=[1], layers_pattern="layers", target_modules=["q"]),
    LoraConfig(init_lora_weights="pissa_niter_4", layer_replication=[(0, 2), (1, 2)]),
    LoraConfig(init_lora_weights="eva", eva_config=EvaConfig()),
    LoraConfig(trainable_token_indices={"embed": [1, 2]}, target_parameters=["a.weight"]),
    LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True), task_type="CAUSAL_LM"),
    LoHaConfig(r=2, target_modules=["q_proj"]),
    MAnyConfig(task_name="größe 🙂", projector_modules=[]),
    MAnyConfig(merge=MERGE),
    MAnyConfig(
        merge={**MERGE, "options": {"router": "gaussian", "abstain_above": 2, "temperature": 1, "ridge": 0}},
    ),
    MAnyConfig(merge={**MERGE, "options": {**MERGE["options"], "method": {"name": "mine", "x": 1}, "ridge": None}}),
]


@pytest.mark.parametrize("config", GOOD, ids=lambda config: type(config).__name__)
def test_what_peft_writes_is_accepted(config, tmp_path):
    check_config(config, "x")
    config.save_pretrained(tmp_path)
    check_config(type(config)(**json.loads((tmp_path / "adapter_config.json").read_text())), "x")


def test_every_option_of_a_real_adapter_is_accepted(tmp_path):
    get_peft_model(base("llava"), MAnyConfig(r=2)).save_pretrained(tmp_path)
    check_config(PeftConfig.from_pretrained(tmp_path), "x")


BAD = [
    ({"r": "four"}, "`r`"),
    ({"r": True}, "`r`"),
    ({"r": 4.0}, "`r`"),
    ({"r": 0}, "positive"),
    ({"rank_pattern": {"a": -1}}, "positive"),
    ({"rank_pattern": [1]}, "`rank_pattern`"),
    ({"lora_alpha": math.nan}, "`lora_alpha`"),
    ({"lora_alpha": 10**400}, "`lora_alpha`"),
    ({"alpha_pattern": {"a": "b"}}, "`alpha_pattern`"),
    ({"target_modules": [1]}, "`target_modules`"),
    ({"base_model_name_or_path": ["a"]}, "`base_model_name_or_path`"),
    ({"task_name": "\ud800"}, "`task_name`"),
    ({"task_name": 3}, "`task_name`"),
    ({"use_rslora": "yes"}, "`use_rslora`"),
    ({"auto_mapping": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]}}, "nested"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=str)
def test_what_is_nonsense_is_refused_by_the_name_of_its_field(changes, words):
    config = MAnyConfig(merge=MERGE)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(MalformedAdapterError) as caught:
        check_config(config, "me/adapter")
    assert words in str(caught.value)
    assert str(caught.value).startswith("me/adapter: adapter_config.json cannot be used: ")
    assert "\n" not in str(caught.value)


BAD_RECORDS = [
    ({"tasks": [{}]}, "origin"),
    ({"tasks": 3}, "list"),
    ({"tasks": [{**TASK, "name": 3}]}, "`name`"),
    ({"tasks": [{**TASK, "weight": "heavy"}]}, "`weight`"),
    ({"tasks": [{**TASK, "strange": 1}]}, "strange"),
    ({"tasks": [{**TASK, "origin": {"sha256": "0", "revision": 3}}]}, "`revision`"),
    ({"tasks": [{**TASK, "origin": {"sha256": "0", "pooled": [{}]}}]}, "name"),
    ({"tasks": [{**TASK, "origin": {"sha256": []}}]}, "`sha256`"),
    ({"tasks": [TASK, TASK]}, "same name"),
    ({"tasks": [{**TASK, "name": str(t)} for t in range(20_000)]}, "list of at most"),
    ({"tasks": []}, "`routing`"),
    ({"operations": [{"kind": "merge"}]}, "tasks"),
    ({"routing": {"p": {"width": 4, "tasks": []}}}, "`routing`"),
    ({"routing": {"p": {"width": 4, "tasks": [{"name": "b", "trained": True}]}}}, "`routing`"),
    ({"routing": {"p": {"width": 4, "tasks": [{"name": "a", "trained": 1}]}}}, "`trained`"),
    ({"routing": {"p": {"width": -4, "tasks": [{"name": "a", "trained": True}]}}}, "width"),
    ({"routing": {"p": {"width": True, "tasks": [{"name": "a", "trained": True}]}}}, "`width`"),
    ({"options": {"router": "cosine"}}, "temperature"),
    ({"options": {**MERGE["options"], "ridge": -1e-4}}, "`ridge`"),
    ({"options": {**MERGE["options"], "ridge": math.nan}}, "nan"),
    ({"options": {**MERGE["options"], "temperature": math.inf}}, "inf"),
    ({"options": {**MERGE["options"], "abstain_above": 1.0}}, "`abstain_above`"),
    ({"options": {**MERGE["options"], "router": "gaussian", "abstain_above": -1.0}}, "`abstain_above`"),
    ({"options": {**MERGE["options"], "method": {"options": 3}}}, "`method`"),
    ({"options": {**MERGE["options"], "magic": 1}}, "`magic`"),
    ({"options": {**MERGE["options"], "gate_lora": True}}, "`task_ranks`"),
    ({"task_ranks": [2, 2]}, "`task_ranks`"),
    ({"task_ranks": [-2]}, "`task_ranks`"),
    ({"averaged_projectors": {"p": "a"}}, "`averaged_projectors`"),
    ({"averaged_projectors": [[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]}, "nested"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_RECORDS, ids=lambda value: f"{value!s:.60}")
def test_a_records_nonsense_is_refused_when_it_is_read(changes, words, tmp_path):
    MAnyConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "merge": {**MERGE, **changes}}))
    with pytest.raises(MalformedAdapterError) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: adapter_config.json cannot be used: `merge` cannot ")
    assert str(caught.value).isprintable()
