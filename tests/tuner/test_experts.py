"""LoRA on the experts of a mixture sees the tokens that are routed to it, and no others."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftWarning
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_many import collect_statistics, merge_adapter_files
from peft_many.algebra.covariance import DenseCovariance
from peft_many.statistics import tokens
from peft_many.statistics.inputs import CovarianceHooks, MeasuredInputs
from tests import tiny
from tests.adapters import Made, distance, merged_deltas, reference
from tests.files.making import perturb

TARGETS = ["gate_proj", "up_proj", "down_proj"]


class Mixture(nn.Module):
    """A mixture of experts of plain linear layers, as in transformers before v5 and in many models on the Hub."""

    def __init__(self, config: transformers.LlamaConfig, scales: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(4)])
        self.scales = scales

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(2)
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            place, rank = torch.where(chosen == number)
            if len(place):
                weight = weights[place, rank, None]
                sent = rows[place] * weight if self.scales else rows[place]
                mixed = mixed.index_add(0, place, expert(sent) * (1 if self.scales else weight))
        return mixed.view_as(hidden)


def build(intermediate: int = 48, scales: bool = False) -> transformers.PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": tiny.VOCABULARY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**shape, intermediate_size=intermediate, pad_token_id=tiny.PAD)
        model = transformers.LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp = Mixture(config, scales)
        with torch.no_grad():
            model.get_input_embeddings().weight[tiny.PAD].normal_()
    return model.eval()


def switch() -> transformers.PreTrainedModel:
    """The one family of transformers v5 whose experts are plain linear layers, an encoder-decoder."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    experts = {"num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    ids = {"vocab_size": tiny.VOCABULARY, "pad_token_id": tiny.PAD, "decoder_start_token_id": tiny.PAD}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**shape, **experts, **ids)
        )
    return model.eval()


def rows_of(seed: int, padded: bool) -> list[dict[str, Tensor]]:
    """Two batches, with padding left and right or row by row without."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for side in ("left", "right"):
        ids, mask = torch.full((4, 9), tiny.PAD), torch.zeros(4, 9, dtype=torch.long)
        for row in range(4):
            kept = slice(row, 9) if side == "left" else slice(0, 9 - row)
            ids[row, kept], mask[row, kept] = torch.randint(3, 100, (9 - row,), generator=generator), 1
            if not padded:
                batches.append({"input_ids": ids[row : row + 1, kept]})
        if padded:
            batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def trained(base: nn.Module, targets: list[str], seed: int) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    perturb(model, "default", seed)
    return model.eval()


def seen_by(model: PeftModel, batches: list[dict[str, Tensor]], ends: tuple[str, ...]) -> dict[str, Tensor]:
    """What arrives at each layer when there is no padding at all."""
    rows: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: rows.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
        for name, module in model.get_base_model().named_modules()
        if name.endswith(ends)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("intermediate", [48, 32])  # 32: features inside an expert are as many as outside
@pytest.mark.parametrize("padded", [False, True])
def test_experts_are_measured_on_their_own_tokens(padded, intermediate):
    model = trained(build(intermediate), TARGETS, seed=1)
    expected = seen_by(model, rows_of(1, padded=False), tuple(TARGETS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        warnings.filterwarnings("ignore", ".*have no `labels`")
        task = collect_statistics(model, rows_of(1, padded), energy=1.0, progress=False).tasks[0]
    assert task.input_of.keys() == expected.keys()
    assert len({len(rows) for rows in expected.values()}) > 2
    for name, rows in expected.items():
        found = task.covariance_of(name)
        assert isinstance(found, DenseCovariance)
        assert task.tokens_of(name) == len(rows), name
        assert distance(found.matrix, rows.T @ rows / len(rows)) < 1e-4, name
    assert task.covariance_of("model.layers.0.mlp.experts.1.gate_proj") is (
        task.covariance_of("model.layers.0.mlp.experts.1.up_proj")
    )


def test_the_merge_is_the_optimum_on_each_experts_tokens(tmp_path):
    made = []
    for seed in (1, 2):
        model, folder = trained(build(), TARGETS, seed), tmp_path / f"{seed}"
        inputs = seen_by(model, rows_of(seed, padded=False), tuple(TARGETS))
        collect_statistics(model, rows_of(seed, padded=True), energy=1.0, progress=False)
        model.save_pretrained(folder)
        deltas = {
            name: layer.get_delta_weight("default").detach().double()
            for name, layer in model.get_base_model().named_modules()
            if name.endswith(tuple(TARGETS))
        }
        made.append(Made(folder, deltas, inputs))
    merged = merge_adapter_files([task.folder for task in made], tmp_path / "merged", ridge=1e-4, progress=False)
    found = merged_deltas(merged)
    assert found.keys() == made[0].deltas.keys()
    for name, delta in found.items():
        assert distance(delta, reference(made, name, 1e-4, [1.0, 1.0])) < 1e-4, name


def test_switch_transformers():
    """Encoder and decoder have masks of their own, and each its experts."""
    model = trained(switch(), ["wi", "wo"], seed=3)

    def batches(padded: bool) -> list[dict[str, Tensor]]:
        inputs = rows_of(3, padded)
        answers = [*inputs[len(inputs) // 2 :], *inputs[: len(inputs) // 2]]  # padded on the other side
        return [
            {**batch, **{f"decoder_{name}": tensor for name, tensor in answer.items()}}
            for batch, answer in zip(inputs, answers, strict=True)
        ]

    expected = seen_by(model, batches(padded=False), ("wi", "wo"))
    task = collect_statistics(model, batches(padded=True), energy=1.0, progress=False).tasks[0]
    for name, rows in expected.items():
        assert task.tokens_of(name) == len(rows), name
        assert distance(task.covariance_of(name).matrix, rows.T @ rows / len(rows)) < 1e-4, name


def test_an_expert_without_tokens_has_no_say():
    base = build()
    with torch.no_grad():
        base.model.layers[0].mlp.gate.weight.zero_()  # the first two experts win every tie
    with pytest.warns(PeftWarning, match=r"No token reached .*experts"):
        task = collect_statistics(trained(base, TARGETS, 1), rows_of(1, True), energy=1.0, progress=False).tasks[0]
    unseen = [name for name in task.input_of if task.tokens_of(name) == 0]
    assert len(unseen) == 6
    assert all(name.startswith("model.layers.0.mlp.experts.") for name in unseen)


def test_a_router_that_changes_rows_hides_padding_and_that_is_said():
    with pytest.warns(PeftWarning, match="Padding could not be told from tokens among those"):
        collect_statistics(trained(build(scales=True), TARGETS, 1), rows_of(1, True), progress=False)


@pytest.mark.parametrize("targets", [["q_proj"], TARGETS])
def test_rows_are_compared_only_where_a_router_moves_them(monkeypatch, targets):
    """Comparing reads every row of padding; in a model without experts nothing does."""
    compared = []
    monkeypatch.setattr(tokens, "_hashes", lambda rows: compared.append(rows) or torch.zeros(len(rows)).long())
    base = build()
    if targets == TARGETS:
        for layer in base.model.layers:
            layer.mlp = LlamaMLP(base.config)
    task = collect_statistics(trained(base, targets, 1), rows_of(1, True), progress=False).tasks[0]
    assert {task.tokens_of(name) for name in task.input_of} == {60}  # 36 places in each of two batches, 6 are padding
    assert not compared


def test_no_hooks_stay():
    model = trained(build(), TARGETS, 1)
    collect_statistics(model, rows_of(1, True), progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert CovarianceHooks({}, {}).result() == MeasuredInputs({}, {})


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_fused_experts_are_refused_by_name(family, tmp_path):
    """Their LoRA is on a parameter of all experts together, with no layer whose input could be measured."""
    kind = getattr(transformers, family)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    more = {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = kind.config_class(**shape, **more, vocab_size=100, num_local_experts=4, num_experts=4)
    with torch.random.fork_rng(devices=[]):
        base = kind(config)
        model = get_peft_model(base, LoraConfig(r=2, target_parameters=["experts.gate_up_proj"], target_modules=[]))
    with pytest.raises(ValueError, match=r"`target_parameters`.*experts"):
        collect_statistics(model, [{"input_ids": torch.arange(6)[None]}], progress=False)
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"`target_parameters`.*experts"):
        merge_adapter_files([tmp_path / "fused"], tmp_path / "merged", progress=False)
