"""What routing costs a server: requests with images of six tasks, in vLLM, beside the base model with one LoRA.

On a LLaVA of random weights, in float32. Each engine is in a process of its own, and the two take turns: one pair of
processes after the other, the first of a pair by turns. In a process, the first of three rounds warms up; every round
has images that nobody has seen before. Ratios are of a pair's totals. What else the machine does shows in wall time
more than in CPU time.

Runs in the environment of `make serve-test`, from the top of the repository:
`.venv-vllm/bin/python benchmarks/serving.py --threads 1`. Writes serving.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import transformers
from common import console, machine, parser, write_json
from rich.table import Table
from tqdm.auto import tqdm

from tests.serving.worlds import WORLDS, Served, World, picture, text

TASKS = "abdefg"  # of these letters, `c` would train no projector
KINDS = ("plain", "routed")
SIDE, PATCH = 112, 14
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a process's time is its engine's
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model, what is asked of it, and how often."""

    width: int = 512
    layers: int = 4
    requests: int = 64
    tokens: int = 16
    rounds: int = 3  # in a process
    pairs: int = 6


QUICK = Sizes(width=256, layers=2, requests=12, tokens=4, rounds=2, pairs=1)


def world(sizes: Sizes) -> World:
    """A LLaVA with 64 patches to an image, whose vision tower is half as wide as its language model."""
    heads = sizes.width // 64
    language = {"hidden_size": sizes.width, "intermediate_size": 3 * sizes.width, "num_hidden_layers": sizes.layers}
    language |= {"num_attention_heads": heads, "head_dim": 64, "num_key_value_heads": heads}
    vision = {"hidden_size": sizes.width // 2, "intermediate_size": 2 * sizes.width, "num_hidden_layers": sizes.layers}
    vision |= {"image_size": SIDE, "patch_size": PATCH, "projection_dim": sizes.width // 2}
    vision["num_attention_heads"] = heads // 2
    size = {"height": SIDE, "width": SIDE}

    def processor(tokenizer: Any) -> Any:
        images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
        how = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, tokenizer, patch_size=PATCH, **how)

    changes = {"text_config": language, "vision_config": vision}
    return dataclasses.replace(WORLDS["llava"], changes=changes, processor=processor, sizes=[(SIDE, SIDE)])


def prepare(folder: Path, sizes: Sizes) -> None:
    """The base model, tasks, merge and LoRA, and each round's requests, on disk."""
    from peft_many import export_lora

    served = Served(folder / "world", "llava", TASKS, world(sizes))
    export_lora(served.merge(TASKS, folder / "merged"), folder / "lora")
    for n in range(sizes.pairs * sizes.rounds * sizes.requests):
        picture(served, n % len(TASKS), 1000 + n).save(folder / f"{n}.png")


def engine(kind: str, folder: Path, pair: int, sizes: Sizes) -> dict[str, float]:
    """The seconds of all rounds but the first, by the clock and of the CPU, of an engine in this process."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / "world" / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 1},
        enable_lora=True,
        max_lora_rank=32,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        additional_config={"peft_many": str(folder / "merged")} if kind == "routed" else {},
    )
    sampling = SamplingParams(temperature=0, max_tokens=sizes.tokens, ignore_eos=True)
    lora = LoRARequest("merged", 1, str(folder / "lora"))
    wall, cpu = [], []
    for turn in range(pair * sizes.rounds, (pair + 1) * sizes.rounds):
        places = range(turn * sizes.requests, (turn + 1) * sizes.requests)
        images = [Image.open(folder / f"{n}.png").convert("RGB") for n in places]
        prompts = [
            {"prompt": f"<image> {text(n, n % len(TASKS))}", "multi_modal_data": {"image": image}}
            for n, image in zip(places, images)
        ]
        began = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {"wall": sum(wall[1:]), "cpu": sum(cpu[1:])}


def in_a_process(kind: str, folder: Path, pair: int, sizes: Sizes, threads: int) -> dict[str, float]:
    """What [`engine`] gives, in a process of its own."""
    told = json.dumps([kind, str(folder), pair, dataclasses.asdict(sizes)])
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--engine", told], env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(pairs: list[dict[str, Any]], time_of: str) -> dict[str, float]:
    """The throughput of the routed engine over the plain one's, by the clock or the CPU: median, least and most."""
    ratios = [pair["plain"][time_of] / pair["routed"][time_of] for pair in pairs]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    """Measure, print a table and write the results."""
    options = parser(__doc__)
    options.add_argument("--engine", help="for this script's own processes")
    given = options.parse_args()
    if given.engine is not None:
        kind, folder, pair, asked = json.loads(given.engine)
        print(json.dumps(engine(kind, Path(folder), pair, Sizes(**asked))))
        return
    sizes, pairs = QUICK if given.quick else Sizes(), []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=2 * sizes.pairs, unit="engine") as bar:
        prepare(Path(scratch), sizes)
        for pair in range(sizes.pairs):
            found = {}
            for kind in KINDS if pair % 2 else KINDS[::-1]:
                found[kind] = in_a_process(kind, Path(scratch), pair, sizes, given.threads)
                bar.update()
            pairs.append(found)
    ratios = {time_of: summary(pairs, time_of) for time_of in ("cpu", "wall")}
    measured = (sizes.rounds - 1) * sizes.requests
    table = Table("time", "plain, ms a request", "routed", "throughput, routed / plain", title="Medians")
    for time_of, ratio in ratios.items():
        each = [1000 * statistics.median(pair[kind][time_of] for pair in pairs) / measured for kind in KINDS]
        spread = f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
        table.add_row(time_of, *(f"{one:.1f}" for one in each), spread)
    console().print(table)
    about = {"benchmark": "serving", "machine": machine(given.threads), "vllm": metadata.version("vllm")}
    about["tasks"] = len(TASKS)
    content = {**about, "sizes": dataclasses.asdict(sizes), "throughput_ratio": ratios, "pairs": pairs}
    write_json(given.output / "serving.json", content)


if __name__ == "__main__":
    main()
