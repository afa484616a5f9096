"""A worker tells a request's task by its words, of a merge that routes no projector; no engine is started."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make serve-test")

from types import SimpleNamespace

import torch
from peft import PeftModel
from torch import nn

from peft_many import export_lora, merge_adapter_files
from peft_many.routing.instructions import features_of_instructions, router_of
from peft_many.routing.row_weights import RowWeights
from peft_many.serving import asked, gate
from peft_many.serving.merge import ServedMerge
from tests import tiny
from tests.adapters import base, make

PROMPTS = [[1, *tiny.TEXT_TOKENS[place : place + 12]] for place in (0, 13, 26, 50)]


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("above", [None, 0.1])
def test_words_choose_a_lora_where_no_projector_is_routed(tmp_path, monkeypatch, family, above):
    untrained = {} if family == "llama" else {"projector_modules": []}
    tasks = [make(tmp_path / name, family, seed=seed, task_name=name, **untrained) for seed, name in enumerate("ab")]
    options = {"gate_by": "instructions", "abstain_above": above, "progress": False}
    merged = merge_adapter_files([task.folder for task in tasks], tmp_path / "merged", **options)
    loras = export_lora(merged, tmp_path / "loras", with_tasks=True).folder
    config = SimpleNamespace(additional_config={"peft_many": str(merged)})
    # What is asked of those that route projectors alone is not looked at.
    config.model_config = SimpleNamespace(architectures=["LlamaForCausalLM"], multimodal_config=None)
    assert asked.merge_to_route_by(config).record.names == ["a", "b"]

    model = base(family)
    monkeypatch.setattr(gate, "VocabParallelEmbedding", nn.Embedding)
    monkeypatch.setattr(gate, "ParallelLMHead", nn.Linear)
    served = model if family == "llama" else SimpleNamespace(get_language_model=lambda: model.model.language_model)
    told = SimpleNamespace(hf_config=model.config, is_multimodal_model=family != "llama")
    worker = SimpleNamespace(
        vllm_config=config,
        device=torch.device("cpu"),
        model_runner=SimpleNamespace(model_config=told, get_model=lambda: served),
    )
    router = router_of(PeftModel.from_pretrained(base(family), merged).base_model.model, "default")
    expected = router.scores(features_of_instructions(model, {"input_ids": torch.tensor(PROMPTS)})[1])
    chosen = []
    for prompt, scores in zip(PROMPTS, expected):
        found = gate.RoutingWorker.route_request(worker, [], prompt)
        by_words = RowWeights(torch.zeros(1, 2), torch.zeros(1), 0, scores[None]).weights[0]
        torch.testing.assert_close(torch.tensor(found), by_words)
        chosen.append(gate.LoRAs(ServedMerge.read(str(merged)), loras).chosen(found))
    names = {one and one.lora_name for one in chosen}
    assert names >= ({"a", "b"} if above is None else {None})
    if family == "llama":
        tokenizer = SimpleNamespace(encode={"asked": PROMPTS[1]}.__getitem__)
        monkeypatch.setattr(gate, "cached_tokenizer_from_config", lambda told: tokenizer)
        again, before = (gate.RoutingWorker.route_request(worker, [], prompt) for prompt in ("asked", PROMPTS[1]))
        assert again == before
