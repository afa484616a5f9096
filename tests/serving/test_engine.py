"""A real vLLM on tiny models answers as transformers with this package does, to the token: `make serve-test`."""

from __future__ import annotations

import os

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

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from peft_many import export_lora
from peft_many.serving.projector import ServedProjector
from tests.serving.worlds import WORLDS, Served

SHELVES: dict[str, Served] = {}


@pytest.fixture
def shelf(tmp_path_factory):
    def made(family: str) -> Served:
        if family not in SHELVES:
            SHELVES[family] = Served(tmp_path_factory.mktemp(family), family)
        return SHELVES[family]

    return made


def answers(served: Served, model, lora=None, merge=None, dtype="float32", look=None, **options):
    """What a server answers to all prompts; `look` is called with its model."""
    if lora is not None:
        options |= {"enable_lora": True, "max_lora_rank": 8}
    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": served.world.most},
        additional_config={} if merge is None else {"peft_many": str(merge)},
        **options,
    )
    try:
        if look is not None:
            llm.apply_model(look)
        prompts = [
            {"prompt": served.prompt(words, images), **({"multi_modal_data": {"image": images}} if images else {})}
            for words, images in served.prompts()
        ]
        request = None if lora is None else LoRARequest("merged", 1, str(lora))
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        found = llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("family", WORLDS)
def test_base_lora_and_merge(shelf, tmp_path, family):
    served = shelf(family)
    merged = served.merge("abc", tmp_path / "merged")  # c trained no projector
    lora = export_lora(merged, tmp_path / "lora").folder
    expected = served.expected(merged)
    assert served.expected(served.merge("abc", tmp_path / "mean", projectors="mean")) != expected
    assert answers(served, served.base, lora, merged) == expected


OPTIONS = {
    "mixed": {"temperature": 1.0},
    "top": {"temperature": 1.0, "top_k": 2},
    "gaussian": {"router": "gaussian", "temperature": 0.5, "abstain_above": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(shelf, tmp_path, options):
    served = shelf("llava")
    merged = served.merge("abc", tmp_path / "merged", **options)
    lora = export_lora(merged, tmp_path / "lora").folder
    assert answers(served, served.base, lora, merged) == served.expected(merged)


def routes(model) -> bool:
    return any(isinstance(module, ServedProjector) for module in model.modules())


def test_ordinary_models_are_as_ever(shelf):
    served, looks = shelf("llava"), []
    found = answers(served, served.base, look=lambda model: looks.append(routes(model)))
    assert looks == [False]
    assert found == served.expected_of(served.model())


def test_another_version_refuses_to_route(shelf, tmp_path, monkeypatch):
    served = shelf("llava")
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(ValueError, match=r"in vLLM 0\.32, and this is 0\.99\.0: install one of these, or serve"):
        answers(served, served.base, merge=tmp_path)


def test_a_merge_for_another_base_model(shelf, tmp_path):
    merged = shelf("qwen2_vl").merge("ab", tmp_path / "merged")
    with pytest.raises(ValueError, match=r"routes 'model\.visual\.merger', which is no projector of this RoutedLlava"):
        answers(shelf("llava"), shelf("llava").base, merge=merged)
