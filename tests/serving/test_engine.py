"""A real vLLM on tiny models answers as transformers with this package does, to the token: `make serve-test`."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make serve-test")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry

from peft_many import export_lora, export_routed_model
from peft_many.serving.families import FAMILIES
from peft_many.serving.gate import Gate, LoRAs
from peft_many.serving.merge import ServedMerge
from peft_many.serving.models import routed_model
from peft_many.serving.projector import ServedProjector
from tests.serving.worlds import GEMMA3_IN_CROPS, WIDTH, WORLDS, Served, architecture, rename

SHELVES: dict[str, Served] = {}


@pytest.fixture(autouse=True)
def _garbage_is_collected_once(monkeypatch):
    """vLLM does it eight times in an engine's life, which takes longer than all else with as many modules as here."""
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    yield
    collect()


@pytest.fixture
def shelf(tmp_path_factory):
    def made(family: str) -> Served:
        if family not in SHELVES:
            SHELVES[family] = Served(tmp_path_factory.mktemp(family), family)
        return SHELVES[family]

    return made


def answers(served: Served, model, lora=None, merge=None, dtype="float32", look=None, shown=None, **options):
    """What a server answers to all prompts; `look` is called with its model. `shown` takes the place of each image.

    With `max_logprobs`, also the log-probabilities of all tokens in each step, `(steps, vocabulary)`.
    """
    if lora is not None:
        options = {"enable_lora": True, "max_lora_rank": 16, **options}
    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        num_gpu_blocks_override=64,  # of a gigabyte of zeros
        **{"max_num_seqs": 4, **options},
        limit_mm_per_prompt={"image": served.world.most},
        mm_processor_kwargs=served.world.asked or None,
        additional_config={} if merge is None else {"peft_many": str(merge)},
    )
    try:
        if look is not None:
            llm.apply_model(look)
        prompts = [
            {"prompt": served.prompt(words, images), **({"multi_modal_data": {"image": images}} if images else {})}
            for words, images in served.prompts()
        ]
        if shown is not None:
            prompts = [{"prompt": served.prompt("w1 w2", [shown]), "multi_modal_data": {"image": shown}}]
        request = None if lora is None else lora(llm) if callable(lora) else LoRARequest("merged", 1, str(lora))
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=options.get("max_logprobs"))
        made = [one.outputs[0] for one in llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)]
        if "max_logprobs" not in options:
            return [list(one.token_ids) for one in made]
        return [
            (
                list(one.token_ids),
                torch.tensor([[step[token].logprob for token in sorted(step)] for step in one.logprobs]),
            )
            for one in made
        ]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


ROUTED = [name for name in WORLDS if architecture(name) in FAMILIES]


@pytest.mark.parametrize("family", ROUTED)
def test_base_lora_and_merge(shelf, tmp_path, family):
    served = shelf(family)
    merged = served.merge("abc", tmp_path / "merged")  # c trained no projector
    lora = export_lora(merged, tmp_path / "lora", check_for="vllm", base_model=served.base).folder
    expected = served.expected(merged)
    assert served.expected(served.merge("abc", tmp_path / "mean", projectors="mean")) != expected
    assert answers(served, served.base, lora, merged) == expected


def test_crops_of_gemma3_decide_by_themselves(tmp_path):
    """Crops of one picture that look like two tasks go through two projectors, as in transformers."""
    served = Served(tmp_path / "gemma3", "gemma3", world=GEMMA3_IN_CROPS)
    merged = served.merge("abc", tmp_path / "merged")
    lora = export_lora(merged, tmp_path / "lora", check_for="vllm", base_model=served.base).folder
    (_, (image,)) = served.prompts()[3]
    assert len(served.inputs("w1", [image])["pixel_values"]) == 3  # the picture and two crops
    assert answers(served, served.base, lora, merged) == served.expected(merged)


# Two implementations that round to bfloat16 in other places differ by a hundredth or two in the mean, and mostly by a
# tenth at most, by half in one prompt on a CPU without AVX-512; answers of another projector differ by nine hundredths
# and more in the mean.
NEAR = {"mean": 0.05, "most": 0.6}


def is_near(found, expected) -> bool:
    """Whether a bfloat16 answer is the expected one: the same tokens, but for ties, with the same probabilities."""
    same = next((n for n, (one, other) in enumerate(zip(found[0], expected[0])) if one != other), None)
    steps = len(found[0]) if same is None else same + 1  # the next ones are asked something else
    best = expected[1][steps - 1].topk(2).values
    apart = (found[1][:steps] - expected[1][:steps]).abs()
    is_tie = same is None or best[0] - best[1] < 2 * NEAR["mean"]
    return bool(is_tie and apart.mean() < NEAR["mean"] and apart.max() < NEAR["most"])


@torch.no_grad()
def expected_in(dtype: torch.dtype, served: Served, merge: Path):
    """As `served.expected` in another dtype, with the log-probabilities of all tokens in each step."""
    model, found = PeftModel.from_pretrained(served.model().to(dtype), merge).eval(), []
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for prompt in served.prompts():
        inputs = served.inputs(*prompt).to(dtype)
        made = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        found.append((made.sequences[0, -8:].tolist(), torch.cat(made.logits).float().log_softmax(dim=-1)))
    return found


def dtypes_of(model):
    """Of the parameters of its experts, and of the prototypes."""
    known = list(model.named_parameters())
    return {part: {p.dtype for name, p in known if f".{part}" in name} for part in ("experts", "prototypes")}


@pytest.mark.parametrize("family", ROUTED)
def test_bfloat16(shelf, tmp_path, family):
    served = shelf(family)
    merged = served.merge("abc", tmp_path / "merged")
    lora = export_lora(merged, tmp_path / "lora").folder
    dtypes = []
    options = {"look": lambda model: dtypes.append(dtypes_of(model)), "max_logprobs": -1}
    found = answers(served, served.base, lora, merged, "bfloat16", **options)
    assert dtypes[0] == {"experts": {torch.bfloat16}, "prototypes": {torch.float32}}
    expected = expected_in(torch.bfloat16, served, merged)
    # Rounding moves one of Qwen2-VL's prompts in transformers itself, to another token than float32 gives.
    assert [is_near(*both) for both in zip(found, expected)].count(False) <= (family == "qwen2_vl")
    assert sum(one[0] == other[0] for one, other in zip(found, expected)) > len(expected) // 2
    mean = expected_in(torch.bfloat16, served, served.merge("abc", tmp_path / "mean", projectors="mean"))
    assert [is_near(*both) for both in zip(mean, expected)] == [not images for _, images in served.prompts()]


OPTIONS = {
    "mixed": {"temperature": 1.0},
    "top": {"temperature": 1.0, "top_k": 2},
    "gaussian": {"router": "gaussian", "temperature": 0.5, "top_k": 2, "abstain_above": 2.0},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llava", "mixed"), ("llava", "top"), *[(family, "gaussian") for family in ROUTED]],
)
def test_options(shelf, tmp_path, family, options):
    served = shelf(family)
    merged = served.merge("abc", tmp_path / "merged", **OPTIONS[options])
    lora = export_lora(merged, tmp_path / "lora").folder
    assert answers(served, served.base, lora, merged) == served.expected(merged)


WORDS = {
    "words": {"gate_by": "instructions"},
    "both": {"gate_by": "both"},
    "strange": {"gate_by": "both", "abstain_above": 4.0, "router": "gaussian"},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava", {}),
        ("qwen3_vl", {}),
        ("llava", OPTIONS["gaussian"]),
        *[("llava", options) for options in WORDS.values()],
        *[(family, WORDS["both"]) for family in ("qwen3_vl", "idefics3", "gemma3", "paligemma")],
    ],
)
def test_a_gate_chooses_loras(shelf, tmp_path, family, options):
    served = shelf(family)
    merged = served.merge("abc", tmp_path / "merged", gate_lora=True, **options)
    loras = export_lora(merged, tmp_path / "lora", with_tasks=True).folder
    chosen = []

    def choose(llm):
        gate = Gate(llm, loras)
        by_words = "gate_by" in options
        if by_words:
            with pytest.raises(ValueError, match=f"instructions .*{options['gate_by']}.*: pass the `prompt`"):
                gate.lora_for([])
        for words, images in served.prompts():
            chosen.append(gate.lora_for(images, served.prompt(words, images) if by_words else None))
        return chosen

    extension = "peft_many.serving.gate.RoutingWorker"
    # On CPUs, vLLM 0.32 gives a request without a LoRA one that another in its batch has (`torch_ops`: index -1).
    rows = {"max_num_seqs": 1} if "abstain_above" in options else {}
    found = answers(served, served.base, choose, merged, max_loras=4, worker_extension_cls=extension, **rows)
    assert (None in chosen) == bool(rows)
    assert found == served.expected(merged)
    names = [one and one.lora_name for one in chosen]
    assert set(names) >= {"a", "b"}
    assert ("merged" in names[:3]) == ("gate_by" not in options)  # of text, only words can tell the task
    with pytest.raises(ValueError, match=r"lacks the LoRA of the task 'a': export it again, with `with_tasks=True`"):
        LoRAs(ServedMerge.read(str(merged)), tmp_path)
    other = served.merge("ab", tmp_path / "other", gate_lora=True, **options)
    with pytest.raises(ValueError, match=r"are not those of the tasks of the merge in .*: export them again"):
        LoRAs(ServedMerge.read(str(other)), Path(loras))


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_words_choose_loras_where_no_projector_is_routed(tmp_path, family):
    served = Served(tmp_path / family, family, tasks="xy")
    merged = served.merge("xy", tmp_path / "merged", gate_by="instructions")
    # Each layer in its own rank, which `check_for` leaves as it is.
    loras = export_lora(merged, tmp_path / "lora", with_tasks=True, check_for="vllm", base_model=served.base).folder
    names = []

    def choose(llm):
        gate = Gate(llm, loras)
        chosen = [gate.lora_for(images, served.prompt(words, images)) for words, images in served.prompts()]
        names.extend(one.lora_name for one in chosen)
        return chosen

    extension = "peft_many.serving.gate.RoutingWorker"
    looks = []
    found = answers(
        served,
        served.base,
        choose,
        merged,
        look=lambda model: looks.append(routes(model)),
        max_loras=3,
        worker_extension_cls=extension,
    )
    assert looks == [False]
    assert set(names) >= {"x", "y"}
    assert found == served.expected(merged)


def sharded(folder):
    """The same model in two files with an index, by which others find its tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{1 + (n > len(names) // 2):05}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_routed_model(shelf, tmp_path, monkeypatch, family):
    served = shelf(family)
    merged = served.merge("abc", tmp_path / "merged")
    routed = export_routed_model(merged, tmp_path / "routed", base_model=served.base).folder
    if served.world.rename is not None:
        rename(routed / "model.safetensors", served.world.rename)
    expected = served.expected(merged)
    assert answers(served, routed) == expected
    assert answers(served, sharded(routed)) == expected
    for known in [name for name in ModelRegistry.models if name.startswith("Routed")]:
        monkeypatch.delitem(ModelRegistry.models, known)  # as if this package were not installed
    with pytest.raises(ValueError, match=r"architectures \['Routed.*'\] are not supported"):
        answers(served, routed)


def routes(model) -> bool:
    return any(isinstance(module, ServedProjector) for module in model.modules())


def test_ordinary_models_are_as_ever(shelf):
    served, looks = shelf("llava"), []
    found = answers(served, served.base, look=lambda model: looks.append(routes(model)))
    assert looks == [False]
    assert found == served.expected_of(served.model())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_models_keep_their_names(architecture):
    """By which vLLM tells some, as where it speculates."""
    assert routed_model(architecture).__name__ == FAMILIES[architecture].model.partition(":")[2]


def test_another_version_refuses_to_route(shelf, tmp_path, monkeypatch):
    served = shelf("llava")
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(ValueError, match=r"in vLLM 0\.32, and this is 0\.99\.0: install one of these, or serve"):
        answers(served, served.base, merge=tmp_path)


def test_a_model_that_nobody_would_route(shelf, tmp_path):
    merged = shelf("llava").merge("ab", tmp_path / "merged")
    onevision = {"architectures": ["LlavaOnevisionForConditionalGeneration"]}
    said = r"no projectors of 'LlavaOnevisionForCond.*' in vLLM, .* It knows those of Gemma3ForCond.*, Smol"
    with pytest.raises(ValueError, match=said):
        answers(shelf("llava"), shelf("llava").base, merge=merged, hf_overrides=onevision)
    with pytest.raises(ValueError, match=r"of 'LlavaFor.*serve it as 'Transformers.*leave out `--model-impl`"):
        answers(shelf("llava"), shelf("llava").base, merge=merged, model_impl="transformers")


@pytest.mark.parametrize(
    ("family", "option", "given"),
    [
        ("llava", "cudagraph_mm_encoder", {"compilation_config": {"cudagraph_mm_encoder": True}}),
        ("llava", "compile_mm_encoder", {"compilation_config": {"compile_mm_encoder": True}}),
        ("llava", "enable_tower_connector_lora", {"enable_lora": True, "enable_tower_connector_lora": True}),
        # vLLM itself falls back to "weights" for a model that does not support it, as LLaVA.
        ("qwen2_vl", "mm_encoder_tp_mode", {"mm_encoder_tp_mode": "data"}),
    ],
)
def test_options_with_which_images_would_not_be_routed(shelf, tmp_path, family, option, given):
    merged = shelf(family).merge("ab", tmp_path / "merged")
    with pytest.raises(ValueError, match=f"vLLM cannot route projectors with `{option}.*; leave it out"):
        answers(shelf(family), shelf(family).base, merge=merged, **given)


def test_images_that_come_embedded_pass_no_projector(shelf, tmp_path):
    """They are of another encoder and projector: the model's own class takes them, with a merge or without."""
    served = shelf("llava")
    embedded = torch.randn(1, 16, WIDTH, generator=torch.Generator().manual_seed(0))
    found = [
        answers(served, served.base, merge=merge, shown=embedded, enable_mm_embeds=True)
        for merge in (None, served.merge("ab", tmp_path / "merged"))
    ]
    assert found[0] == found[1]


def test_a_merge_for_another_base_model(shelf, tmp_path):
    merged = shelf("qwen2_vl").merge("ab", tmp_path / "merged")
    with pytest.raises(ValueError, match=r"routes 'model\.visual\.merger', which is no projector of this LlavaFor"):
        answers(shelf("llava"), shelf("llava").base, merge=merged)
