"""How well instructions tell tasks apart: what they are represented by, and how they are compared.

29 tasks of instructions that a vision-language model is asked, two of which ask the same: pairs that only the order of
words or one word tells apart, long texts behind a short instruction, the same question with three kinds of answers.
Each task is measured on `--samples` instructions in the model's chat template, and then 100 others are asked: how
often the most likely task is the right one (96.6 % can be had), and how sure that is, in nats. Once more with a system
prompt in all of them, and with one that was not there when the tasks were measured. And where a third of the tasks was
never measured: how many of their instructions are farther from all tasks than 99 % of the tasks' own are.

Writes instructions.json and instructions.png.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import OTHERS, OURS, console, machine, new_figure, parser, write_json
from instruction_tasks import SYSTEM, TASKS, instructions
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from peft_many.algebra.instructions import instruction_features, token_weights
from peft_many.algebra.routing import gaussian_scores, routing_weights
from peft_many.algebra.spread import FeatureMetric, centred, shared_metric
from peft_many.merging.routed_instructions import LEAST_VARIANCE
from peft_many.statistics.features import SPREAD_OF_INSTRUCTIONS

ASKED = 100
LAYERS = (1, 4)
WINDOW = 16
OURS_NAME = "mean, and mean by place"
LEAST = (0.0, 0.001, 0.005, 0.02, 0.1)

# From token ids to what a model makes of them, (length, d), and from that to features.
Seen = Callable[[Sequence[int]], Tensor]
Representation = Callable[[Tensor], Tensor]
Features = Mapping[str, Tensor]  # by task, (instructions, features)


class Hashed:
    """Random vectors in place of a model's embeddings, for `--quick`."""

    name = "random vectors"

    def ids(self, text: str, system: str | None) -> list[int]:
        return [zlib.crc32(word.encode()) for word in f"{system or ''} {text}".split()]

    def embedded(self, ids: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(32, generator=torch.Generator().manual_seed(one)) for one in ids])

    def hidden(self, layers: int, ids: Sequence[int]) -> Tensor:
        return self.embedded(ids).cumsum(0) / layers


class Model:
    """A model's own tokens, embeddings and first layers."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        self.name = Path(name).name
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        except ValueError:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
            model = model.model.language_model
        self.model, self.table = model, model.get_input_embeddings()
        layers = getattr(model, "model", model).layers
        del layers[max(LAYERS) + 1 :]  # those after are not asked; behind the last one there is a norm

    def ids(self, text: str, system: str | None) -> list[int]:
        said = [{"role": "system", "content": system}] if system else []
        said.append({"role": "user", "content": text})
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def embedded(self, ids: Sequence[int]) -> Tensor:
        return self.table(torch.tensor(ids))

    def hidden(self, layers: int, ids: Sequence[int]) -> Tensor:
        hidden = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
        return hidden[layers][0]


def ours(embedded: Tensor) -> Tensor:
    """What `collect_statistics` measures."""
    return instruction_features(embedded[None], token_weights(torch.ones(1, len(embedded), dtype=torch.bool)))[0]


def mean(embedded: Tensor) -> Tensor:
    """A bag of tokens."""
    return ours(embedded)[: embedded.shape[1]]


def windows(embedded: Tensor) -> Tensor:
    """Means of all tokens, of the first and of the last."""
    return torch.cat([mean(embedded), mean(embedded[:WINDOW]), mean(embedded[-WINDOW:])])


def waves(embedded: Tensor) -> Tensor:
    """Means of all tokens, and weighted by the first two cosines of their places."""
    places = (torch.arange(len(embedded)) + 0.5) / len(embedded)
    rows = torch.nn.functional.normalize(embedded, dim=-1)
    weighted = [(rows * torch.cos(math.pi * k * places)[:, None]).mean(0) for k in (1, 2)]
    return torch.cat([mean(embedded), *weighted])


def features(
    model: Any, seen_by: Callable[[Sequence[int]], Tensor], represent: Representation, asked: Any
) -> Features:
    """Of all tasks' instructions, given with the system prompt."""
    texts, system = asked
    return {
        task: torch.stack([represent(seen_by(model.ids(text, system))) for text in some])
        for task, some in texts.items()
    }


def metric_of(measured: Sequence[Tensor], least: float) -> FeatureMetric:
    """As a merge makes it."""
    spreads = [SPREAD_OF_INSTRUCTIONS.apply(centred(rows)) for rows in measured]
    return shared_metric(spreads, [len(rows) for rows in measured], least=least / measured[0].shape[1])


def told(measured: Features, asked: Features, least: float) -> dict[str, float]:
    """How often the right task is the most likely one, in %, by distances and by cosines, and how sure it is."""
    prototypes = torch.stack([rows.mean(0) for rows in measured.values()])
    rows = torch.cat(list(asked.values()))
    right = torch.arange(len(asked)).repeat_interleave(len(next(iter(asked.values()))))
    scores = gaussian_scores(rows, prototypes, metric_of(list(measured.values()), least), 1.0)
    cosines = routing_weights(rows, prototypes, 0.02)
    return {
        "accuracy": 100 * (scores.argmax(1) == right).double().mean().item(),
        "nats": torch.nn.functional.cross_entropy(scores.double(), right).item(),
        "accuracy_by_cosines": 100 * (cosines.argmax(1) == right).double().mean().item(),
    }


def noticed(measured: Features, asked: Features, least: float) -> float:
    """Of every third task, which is left out, how many instructions are farther off than 99 % of the others, in %."""
    known = [task for i, task in enumerate(measured) if i % 3]
    prototypes = torch.stack([measured[task].mean(0) for task in known])
    metric = metric_of([measured[task] for task in known], least)
    nearest = {task: metric.squared_distances(rows, prototypes).amin(1) for task, rows in asked.items()}
    limit = torch.cat([nearest[task] for task in known]).quantile(0.99)
    others = torch.cat([distances for task, distances in nearest.items() if task not in known])
    return 100 * (others > limit).double().mean().item()


def measure(
    name: str,
    model: Any,
    seen_by: Callable[[Sequence[int]], Tensor],
    represent: Representation,
    samples: int,
    asked: int,
) -> list[dict[str, Any]]:
    """One row for each least variance: of ours several, of the others ours."""
    start = time.perf_counter()
    of = partial(features, model, seen_by, represent)
    known, test = instructions(samples, 1), instructions(asked, 2)
    plain = of((known, None)), of((test, None))
    within = of((known, SYSTEM)), of((test, SYSTEM))
    seconds = (time.perf_counter() - start) / (2 * len(TASKS) * (samples + asked))
    rows = []
    for least in LEAST if name == OURS_NAME else (LEAST_VARIANCE,):
        rows.append(
            {
                "representation": name,
                "width": plain[0]["objects"].shape[1],
                "least_variance": least,
                **told(*plain, least),
                "with_system_prompt": told(*within, least)["accuracy"],
                "with_new_system_prompt": told(plain[0], within[1], least)["accuracy"],
                "strangers_noticed": noticed(*plain, least),
                "milliseconds": 1e3 * seconds,
            }
        )
    return rows


def save_plot(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Bars of how often the right task is found, with the least variance that merges have."""
    rows = [row for row in results if row["least_variance"] == LEAST_VARIANCE]
    figure, axis = new_figure(1, 1, 9, 1 + 0.7 * len(rows))
    shown = {"accuracy": "distances", "accuracy_by_cosines": "cosines", "with_new_system_prompt": "new system prompt"}
    for i, (key, label) in enumerate(shown.items()):
        places = [y + (i - 1) * 0.27 for y in range(len(rows))]
        colour = (OURS, OTHERS, "#5c677d")[i]
        bars = axis.barh(places, [row[key] for row in rows], height=0.25, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set_yticks(range(len(rows)), [row["representation"] for row in rows])
    axis.invert_yaxis()
    axis.set_title("instructions whose task was found, %")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


@torch.no_grad()
def main() -> None:
    """Measure all, print a table, write JSON."""
    options = parser(__doc__)
    options.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    options.add_argument("--samples", type=int, default=64, help="instructions that a task is measured on")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    model = Hashed() if given.quick else Model(given.model)
    samples, asked = (8, 6) if given.quick else (given.samples, ASKED)
    ways: dict[str, tuple[Seen, Representation]] = {
        "mean": (model.embedded, mean),
        OURS_NAME: (model.embedded, ours),
        f"means of all, first and last {WINDOW}": (model.embedded, windows),
        "mean, and by two cosines": (model.embedded, waves),
    }
    for layers in LAYERS:
        ways[f"mean after {layers} layers"] = (partial(model.hidden, layers), mean)
    results: list[dict[str, Any]] = []
    for name, (seen_by, represent) in tqdm(ways.items(), desc="Measuring", unit="representation"):
        results += measure(name, model, seen_by, represent, samples, asked)
    table = Table("representation", title=f"{len(TASKS)} tasks, {samples} instructions of each measured")
    shown = ["width", "least_variance", "accuracy", "nats", "accuracy_by_cosines", "with_system_prompt"]
    shown += ["with_new_system_prompt", "strangers_noticed", "milliseconds"]
    for heading in shown:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in results:
        table.add_row(row["representation"], *(f"{row[key]:.4g}" for key in shown))
    console().print(table)
    content = {"benchmark": "instructions", "model": model.name, "machine": machine(given.threads)}
    content |= {"samples": samples, "asked": asked, "tasks": list(TASKS), "results": results}
    write_json(given.output / "instructions.json", content)
    save_plot(given.output / "instructions.png", results)


if __name__ == "__main__":
    main()
