"""Write a tiny LLaVA and the pictures of three tasks into a folder, to try the other examples on any laptop.

    python toy_data.py toy

makes `toy/model` and, for the tasks charts, scenes and icons, a file of questions such as `toy/charts.jsonl`, and half
as many on other pictures in `toy/charts-test.jsonl`, to evaluate on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are in no package

from benchmarks.mini_ucit.drawing import CELL, SIZE
from benchmarks.mini_ucit.model import MODELS, build_tokenizer
from benchmarks.mini_ucit.tasks import TASKS

NAMES = ("charts", "scenes", "icons")
TEMPLATE = (
    "<bos> {% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %}"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--examples", type=int, default=512, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="draws the pictures")
    args = parser.parse_args(arguments)

    MODELS["llava"].load().save_pretrained(args.folder / "model")
    tokenizer = build_tokenizer()
    pictures = CLIPImageProcessor(
        do_resize=False,
        do_center_crop=False,
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which that strategy leaves out
        chat_template=TEMPLATE,
    ).save_pretrained(args.folder / "model")
    for task in TASKS:
        if task.name in NAMES:
            write(args.folder, task.name, task.examples(args.examples, "train", args.seed))
            write(args.folder, f"{task.name}-test", task.examples(args.examples // 2, "test", args.seed))


def write(folder: Path, name: str, examples: Iterable[Any]) -> None:
    """Write pictures and the questions about them."""
    (folder / name).mkdir(exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number, example in enumerate(examples):
            Image.fromarray(example.image).save(folder / name / f"{number}.png")
            row = {"image": f"{name}/{number}.png", "question": example.question, "answer": example.answer}
            print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
