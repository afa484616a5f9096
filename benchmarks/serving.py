"""What routing costs a server: requests with images of six tasks, in vLLM, beside the base model with one LoRA.

Both servers are in one process, on a LLaVA of random weights, and take turns: what else the machine does meets both.
No cache of prompts or images helps either. Runs in the environment of
`make serve-test`, from the top of the repository.

Writes serving.json.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_COMPILE_DISABLE": "1",
}

import torch
import transformers
import vllm
from common import parser, write_json
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from peft_many import export_lora
from tests.serving.worlds import WORLDS, Served, World, picture, text

TASKS, REQUESTS, TOKENS, TURNS = "abdefg", 64, 16, 7
SIDE, PATCH = 112, 14


def world(width: int, layers: int) -> World:
    """A LLaVA with 64 patches to an image, whose vision tower is half as wide as its language model."""
    attention = {"num_attention_heads": width // 64, "head_dim": 64, "num_key_value_heads": width // 64}
    language = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, **attention}
    vision = {"hidden_size": width // 2, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    vision |= {"image_size": SIDE, "patch_size": PATCH, "projection_dim": width // 2}
    vision["num_attention_heads"] = width // 128
    size = {"height": SIDE, "width": SIDE}

    def processor(tokenizer: Any) -> Any:
        images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )

    changes = {"text_config": language, "vision_config": vision}
    return dataclasses.replace(WORLDS["llava"], changes=changes, processor=processor, sizes=[(SIDE, SIDE)])


def server(served: Served, **options: Any) -> LLM:
    """One that takes LoRAs."""
    return LLM(
        str(served.base),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 1},
        enable_lora=True,
        max_lora_rank=32,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        **options,
    )


def seconds(llm: LLM, served: Served, lora: Path, turn: int) -> float:
    """For all requests, with images that nobody has seen before."""
    shown = [(text(n, n % 6), [picture(served, n % 6, 1000 * turn + n)]) for n in range(REQUESTS)]
    prompts = [{"prompt": served.prompt(*one), "multi_modal_data": {"image": one[1]}} for one in shown]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, sampling, lora_request=LoRARequest("merged", 1, str(lora)), use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write the results."""
    options = parser(__doc__).parse_args()
    width, layers, turns = (256, 2, 2) if options.quick else (512, 4, TURNS)
    with tempfile.TemporaryDirectory() as scratch:
        served = Served(Path(scratch), "llava", TASKS, world(width, layers))
        merged = served.merge(TASKS, Path(scratch, "merged"))
        lora = export_lora(merged, Path(scratch, "lora")).folder
        plain = server(served)
        routed = server(served, additional_config={"peft_many": str(merged)})
        pairs = []
        for turn in range(turns + 1):
            both = [(plain, 2 * turn), (routed, 2 * turn + 1)]
            taken = {id(llm): seconds(llm, served, lora, at) for llm, at in (both if turn % 2 else both[::-1])}
            pairs.append((taken[id(plain)], taken[id(routed)]))
        pairs = pairs[1:]  # the first turn warms up
    found = {
        "plain_seconds": statistics.median(one for one, _ in pairs),
        "routed_seconds": statistics.median(two for _, two in pairs),
        "throughput_ratio": statistics.median(one / two for one, two in pairs),
        "pairs": pairs,
    }
    print(found)
    about = {"width": width, "layers": layers, "requests": REQUESTS, "tokens": TOKENS, "tasks": len(TASKS)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "vllm": vllm.__version__}
    write_json(options.output / "serving.json", {**about, **versions, **found})


if __name__ == "__main__":
    main()
