"""What routing and gates cost a server: requests with images of six tasks, in vLLM, beside the base with one LoRA.

On a LLaVA of random weights, in float32. Each engine is in a process of its own, and the three take turns, also at
being the first. In a process, the first of three rounds warms up; every round has images that nobody has seen before.
Ratios are of totals of one turn. What else the machine does shows in wall time more than in CPU time.

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
KINDS = ("plain", "routed", "gated")  # one LoRA; with routed projectors; with the LoRA that each request's gate gives
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
    turns: int = 6


QUICK = Sizes(width=256, layers=2, requests=12, tokens=4, rounds=2, turns=1)


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
    export_lora(served.merge(TASKS, folder / "merged", gate_lora=True), folder / "lora", with_tasks=True)
    for n in range(sizes.turns * sizes.rounds * sizes.requests):
        picture(served, n % len(TASKS), 1000 + n).save(folder / f"{n}.png")


def engine(kind: str, folder: Path, turn: int, sizes: Sizes) -> dict[str, float]:
    """The seconds of all rounds but the first, by the clock and of the CPU, of an engine in this process."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from peft_many.serving.gate import Gate

    llm = LLM(
        str(folder / "world" / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 1},
        enable_lora=True,
        max_lora_rank=32,
        max_loras=len(TASKS) + 1 if kind == "gated" else 1,
        worker_extension_cls="peft_many.serving.gate.RoutingWorker" if kind == "gated" else "",
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        additional_config={"peft_many": str(folder / "merged")} if kind != "plain" else {},
    )
    sampling = SamplingParams(temperature=0, max_tokens=sizes.tokens, ignore_eos=True)
    lora = LoRARequest("merged", 1, str(folder / "lora"))
    gate = Gate(llm, folder / "lora") if kind == "gated" else None
    wall, cpu = [], []
    for one in range(turn * sizes.rounds, (turn + 1) * sizes.rounds):
        places = range(one * sizes.requests, (one + 1) * sizes.requests)
        images = [Image.open(folder / f"{n}.png").convert("RGB") for n in places]
        prompts = [
            {"prompt": f"<image> {text(n, n % len(TASKS))}", "multi_modal_data": {"image": image}}
            for n, image in zip(places, images)
        ]
        began = time.perf_counter(), time.process_time()
        chosen = lora if gate is None else [gate.lora_for([image]) for image in images]
        llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {"wall": sum(wall[1:]), "cpu": sum(cpu[1:])}


def in_a_process(kind: str, folder: Path, turn: int, sizes: Sizes, threads: int) -> dict[str, float]:
    """What [`engine`] gives, in a process of its own."""
    told = json.dumps([kind, str(folder), turn, dataclasses.asdict(sizes)])
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--engine", told], env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(turns: list[dict[str, Any]], kind: str, time_of: str) -> dict[str, float]:
    """The throughput of an engine over the plain one's, by the clock or the CPU: median, least and most."""
    ratios = [turn["plain"][time_of] / turn[kind][time_of] for turn in turns]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    """Measure, print a table and write the results."""
    options = parser(__doc__)
    options.add_argument("--engine", help="for this script's own processes")
    given = options.parse_args()
    if given.engine is not None:
        kind, folder, turn, asked = json.loads(given.engine)
        print(json.dumps(engine(kind, Path(folder), turn, Sizes(**asked))))
        return
    sizes, turns = QUICK if given.quick else Sizes(), []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(KINDS) * sizes.turns, unit="engine") as bar:
        prepare(Path(scratch), sizes)
        for turn in range(sizes.turns):
            found = {}
            for place in range(len(KINDS)):
                kind = KINDS[(turn + place) % len(KINDS)]
                found[kind] = in_a_process(kind, Path(scratch), turn, sizes, given.threads)
                bar.update()
            turns.append(found)
    ratios = {kind: {time_of: summary(turns, kind, time_of) for time_of in ("cpu", "wall")} for kind in KINDS[1:]}
    measured = (sizes.rounds - 1) * sizes.requests
    table = Table("engine", "time", "ms a request", "throughput over plain", title="Medians")
    for kind in KINDS:
        for time_of in ("cpu", "wall"):
            each = 1000 * statistics.median(turn[kind][time_of] for turn in turns) / measured
            ratio = ratios.get(kind, {}).get(time_of)
            spread = "" if ratio is None else f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
            table.add_row(kind, time_of, f"{each:.1f}", spread)
    console().print(table)
    about = {"benchmark": "serving", "machine": machine(given.threads), "vllm": metadata.version("vllm")}
    about["tasks"] = len(TASKS)
    content = {**about, "sizes": dataclasses.asdict(sizes), "throughput_ratio": ratios, "turns": turns}
    write_json(given.output / "serving.json", content)


if __name__ == "__main__":
    main()
