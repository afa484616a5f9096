"""Adapter files as somebody malicious would write them: everything but one or a few places is as it should be."""

from __future__ import annotations

import copy
import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from peft_many.records import MergeOptions, MergeRecord

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
STATISTICS = "adapter_statistics.safetensors"
TRAP = "hostile_trap"  # a module that is there to be imported, and tells

EVIL_PATTERNS = [
    r"(.*)*x",
    r"(a|a|.)*$",
    r"(([\w.]+)+)+!",
    r"(\w*\.?)*!",
    r"(.?){60}.{60}",
    ".*" * 12 + "!",
    r"(" * 200 + "a" + r")" * 200,
    r"(" * 5000,
    r"[",
    r"(?P<a>.)(?P=a)*\1*!",
    r"a{1,60000}{1,60000}",
    r".*",
    r"",
    r"(?i).*_PROJ",
    "\\",
]
NUMBERS = [0, 1, 2, 3, 4, 5, -1, 31, 10**4, 10**7, 10**9, 2**31, 2**63, 10**30, -(10**30)]
NUMBERS += [0.0, -0.0, 0.5, 4.0, 1e-320, 1e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "a", "../../escaped", "/etc/passwd", "a\nb", "a|b\n# pwned", "<!-- /peft_many -->", "\x00", "\ud800"]
TEXTS += [
    "x" * 10_000,
    "🙂",
    "many",
    "MANY",
    "LORA",
    "\x1b[2J",
    "{0}",
    "%s",
    "default",
    TRAP,
    "q_proj",
    "none",
    "all-linear",
    "pissa",
]
TEXTS += ["olora", "eva", "loftq", "gaussian", "orthogonal", "lora_ga", "corda", "mean", "cosine", "torch.float32"]


def value(random: Random, depth: int = 0) -> Any:
    """Something that hardly any field expects."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return random.choice([None, True, False])
    if kind in (1, 2):
        return random.choice(NUMBERS)
    if kind == 3:
        return random.choice(EVIL_PATTERNS)
    if kind in (4, 5):
        return random.choice(TEXTS)
    if kind == 6:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {str(value(random, 9)): value(random, depth + 1) for _ in range(random.randrange(4))}
    return nested(random.choice([3, 60, 400]))


def nested(depth: int) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return inner


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON document."""
    found = [path] if path else []
    entries: Any = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


def mutate_json(content: Any, random: Random) -> None:
    """Change one place of a JSON document: another value, missing, doubled, or with something else's value."""
    paths = places(content)
    path = random.choice(paths)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    how = random.randrange(6)
    if how == 0:
        del holder[path[-1]]
    elif how == 1 and isinstance(holder, list):
        holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
    elif how == 2:
        donor = content
        for key in random.choice(paths):
            donor = donor[key]
        holder[path[-1]] = copy.deepcopy(donor)
    elif how == 3 and isinstance(holder, dict):
        holder[str(value(random, 9))] = holder.pop(path[-1])
    elif how == 4 and isinstance(holder[path[-1]], (int, float)):
        holder[path[-1]] = random.choice(NUMBERS)
    else:
        holder[path[-1]] = value(random)


def many(random: Random) -> int:
    """A length; seldom one that takes a second to go through."""
    return random.choice([2, 3, 300]) if random.random() < 0.95 else 50_000


def targeted(config: dict[str, Any], random: Random) -> None:
    """What somebody would try who knows what the fields are for."""
    huge = random.choice([10**6, 10**8, 10**9, 2**40])
    layers = [".*", "q_proj", r"model\.language_model\.layers\.0\.self_attn\.q_proj", "layers.0.mlp.up_proj"]
    merge = config.get("merge")
    merge = config["merge"] = merge if isinstance(merge, dict) else {}
    routing, tasks = merge.get("routing"), merge.get("tasks")
    if not isinstance(routing, dict) or not all(isinstance(about, dict) for about in routing.values()) or not routing:
        routing = {"model.multi_modal_projector": {"width": 24, "tasks": []}}
    one_task = tasks[:1] if isinstance(tasks, list) else [{}]
    name = next(iter(routing))

    def routed(**changes: Any) -> None:
        merge["routing"] = {name: {**routing[name], **changes}}

    def options() -> dict[str, Any]:
        return merge["options"] if isinstance(merge.get("options"), dict) else {}

    def gated(**changes: Any) -> None:
        merge.update(options={**options(), "gate_lora": True}, **changes)

    def asked(**changes: Any) -> None:
        known = merge["instructions"] if isinstance(merge.get("instructions"), dict) else {}
        merge["instructions"] = {
            "width": 64,
            "tasks": ["a", "b"],
            "directions": 2,
            "distances": [1.0, 1.0],
            **known,
            **changes,
        }
        merge.update(options={**options(), "gate_lora": True, "gate_by": random.choice(["instructions", "both"])})

    attempts: list[Callable[[], Any]] = [
        lambda: config.update(r=huge),
        lambda: config.update(r=huge, lora_alpha=huge, use_rslora=True),
        lambda: config.update(rank_pattern={random.choice(layers): huge}),
        lambda: config.update(rank_pattern={random.choice(EVIL_PATTERNS): 4}),
        lambda: config.update(alpha_pattern={random.choice(EVIL_PATTERNS): random.choice(NUMBERS)}),
        lambda: gated(task_rank_pattern={random.choice(EVIL_PATTERNS): [4, 4]}, task_ranks=[4, 4]),
        lambda: config.update(rank_pattern={f"(a|{i}.*)+{i}": 4 for i in range(500)}),
        lambda: config.update(target_modules=random.choice(EVIL_PATTERNS)),
        lambda: config.update(exclude_modules=random.choice(EVIL_PATTERNS)),
        lambda: config.update(modules_to_save=[random.choice(EVIL_PATTERNS)]),
        lambda: config.update(projector_modules=[random.choice(EVIL_PATTERNS)]),
        lambda: config.update(layers_pattern=random.choice(EVIL_PATTERNS), layers_to_transform=[0, 1]),
        lambda: config.update(target_parameters=[random.choice(EVIL_PATTERNS)]),
        lambda: routed(width=huge),
        lambda: routed(directions=huge),
        lambda: routed(directions=random.choice(NUMBERS)),
        lambda: routed(tasks=[{"name": str(t), "trained": True} for t in range(many(random))]),
        lambda: routed(tasks=random.choice([[], None, [{}], [[]], {"name": 1}])),
        lambda: asked(width=huge),
        lambda: asked(directions=random.choice([huge, *NUMBERS])),
        lambda: asked(distances=[random.choice(NUMBERS) for _ in range(2)]),
        lambda: asked(tasks=random.choice([[], None, ["a"], ["b", "a"], ["a", "a"], ["a", "b", "c"]])),
        lambda: merge.update(tasks=one_task * many(random)),
        lambda: gated(task_ranks=[huge] * 2),
        lambda: gated(task_ranks=random.choice([[0, 8], [-8, 16], [1] * 8, [8.0], [True] * 8, []])),
        lambda: merge.update({random.choice(RECORD): value(random)}),
        lambda: merge.update(options={**options(), random.choice(OPTIONS): value(random)}),
        lambda: merge.update(options={**options(), random.choice(OPTIONS): random.choice(NUMBERS)}),
        lambda: config.update(merge=value(random)),
        lambda: config.update(pool=random.choice([value(random), {"tasks": one_task * many(random)}])),
        lambda: config.update(megatron_config={"a": 1}, megatron_core=TRAP),
        lambda: config.update(megatron_core=TRAP),
        lambda: config.update(auto_mapping={"base_model_class": "Model", "parent_library": TRAP}, task_type=None),
        lambda: config.update(auto_mapping=value(random)),
        lambda: config.update(layer_replication=[[0, 2]] * many(random)),
        lambda: config.update(layer_replication=[[0, huge]]),
        lambda: config.update(trainable_token_indices=random.choice([[0, 1], [10**9], {"embed_tokens": [3]}])),
        lambda: config.update(init_lora_weights=random.choice(TEXTS)),
        lambda: config.update(base_model_name_or_path=value(random)),
        lambda: config.update(revision=value(random)),
        lambda: merge.update(averaged_projectors={name: value(random)}),
        lambda: config.update(peft_type=value(random)),
        lambda: config.update({random.choice(FIELDS): value(random)}),
        lambda: config.update({random.choice(FIELDS): random.choice([{}, [1], {"a": 1}, True, 3])}),
    ]
    random.choice(attempts)()


FIELDS = [
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "use_dora",
    "use_qalora",
    "layer_replication",
    "lora_bias",
    "arrow_config",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "runtime_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "monteclora_config",
    "use_bdlora",
    "peft_version",
    "statistics",
    "format_version",
    "inference_mode",
    "energy",
    "merge",
    "pool",
    "task_name",
]
RECORD = [field.name for field in dataclasses.fields(MergeRecord)]
OPTIONS = [field.name for field in dataclasses.fields(MergeOptions)]


def mutate_text(text: bytes, random: Random) -> bytes:
    """Damage bytes, not values."""
    how = random.randrange(7)
    place = random.randrange(max(len(text), 1))
    if how == 0:
        return text[:place]
    if how == 1:
        return text[:place] + bytes([random.randrange(256)]) + text[place + 1 :]
    if how == 2:
        return text[:place] + random.randbytes(random.randrange(1, 9)) + text[place:]
    if how == 3:
        return b"[" * 200_000
    if how == 4:
        return b'{"peft_type": "MANY", "merge": ' + b'{"a":' * 100_000
    if how == 5:
        return text.rstrip().removesuffix(b"}") + b', "r": 1000000000, "r": "4", "peft_type": "MANY"}'
    return text.replace(b"4", b"4" * 5000, 1)


def config_file(path: Path, random: Random) -> None:
    """Mutate an `adapter_config.json`."""
    text = path.read_bytes()
    if random.random() < 0.12:
        path.write_bytes(mutate_text(text, random))
        return
    content = json.loads(text)
    ways = random.choices([targeted, mutate_json], [3, 2], k=random.choice([1, 1, 1, 2, 3]))
    for way in sorted(ways, key=[targeted, mutate_json].index):  # the former knows what the fields hold
        way(content, random)
    path.write_text(json.dumps(content), encoding="utf-8")


def tensor_file(path: Path, random: Random) -> None:
    """Mutate a safetensors file: its header, its metadata, its numbers, or just bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = random.randrange(12)
    if how == 0:
        path.write_bytes(mutate_text(data, random))
        return
    if how == 1:
        path.write_bytes(
            struct.pack("<Q", random.choice([0, 1, length - 1, length + 1, 10**8, 2**62, 2**64 - 1])) + data[8:]
        )
        return
    keys = [key for key in header if key != "__metadata__"]
    key = random.choice(keys)
    if how in (2, 3):
        about = header[key]
        start, end = about["data_offsets"]
        change = random.randrange(8)
        if change == 0:
            about["shape"] = [random.choice([0, 1, 10**6, 2**31, 2**62, 2**63, -1, 1.5]) for _ in about["shape"]]
        elif change == 1:
            about["shape"] = list(reversed(about["shape"])) + [1] * random.randrange(2)
        elif change == 2:
            about["data_offsets"] = [start, random.choice([start, end + 4, 2**62, 2**64, -4])]
        elif change == 3:
            about["data_offsets"] = header[random.choice(keys)]["data_offsets"]
        elif change == 4:
            about["dtype"] = random.choice(
                ["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "", 3, None]
            )
        elif change == 5:
            header[key] = {**about, "extra": nested(random.choice([2, 500]))}
        elif change == 6:
            mutate_json(header, random)
        else:
            # Nothing but an empty tensor has a shape that no file backs.
            body = body[:start] + body[end:]
            about["shape"] = random.choice([[0, 2**40], [2**62, 0], [0, 2**31, 2**31, 2**31], [0], [0, 0]])
            about["data_offsets"] = [start, start]
            for other in keys:
                offsets = header[other]["data_offsets"]
                if other != key and offsets[0] >= end:
                    header[other]["data_offsets"] = [offset - (end - start) for offset in offsets]
    elif how == 4:
        header[random.choice([key.replace("lora_A", "lora_B"), key + ".x", str(value(random, 9)), key.upper()])] = (
            header.pop(key)
        )
    elif how == 5 and "__metadata__" in header:
        metadata = header["__metadata__"]
        name = next(iter(metadata))
        metadata[name] = random.choice(["", "[" * 100_000, "{}", "null", metadata[name][:-5], "9" * 5000, 3, None])
    elif how in (6, 7, 8) and "peft_many" in header.get("__metadata__", {}):
        content = json.loads(header["__metadata__"]["peft_many"])
        for _ in range(random.choice([1, 1, 2])):
            mutate_json(content, random)
        header["__metadata__"]["peft_many"] = json.dumps(content)
    elif how == 9:
        # The same key twice, with another place.
        text = (
            json.dumps(header).removesuffix("}") + f", {json.dumps(key)}: {json.dumps(header[random.choice(keys)])}}}"
        )
        path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)
        return
    else:
        place = random.randrange(max(len(body) - 8, 1))
        body = (
            body[:place]
            + random.choice([b"\x00\x00\xc0\x7f", b"\xff" * 8, b"\x00\x00\x80\x7f", random.randbytes(8)])
            + body[place:]
        )
        body = body[: len(data) - 8 - length]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def mutate(folder: Path, random: Random) -> str:
    """Mutate one file of an adapter folder, seldom two; returns what was mutated."""
    ways = {CONFIG: config_file, WEIGHTS: tensor_file, STATISTICS: tensor_file}
    chosen = [random.choice([CONFIG, CONFIG, WEIGHTS, STATISTICS, STATISTICS])]
    if random.random() < 0.05:
        chosen.append(random.choice([name for name in ways if name not in chosen]))
    for name in chosen:
        ways[name](folder / name, random)
    return " ".join(chosen)
