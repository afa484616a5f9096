"""A toy UCIT: tiny base models in folders, as if from the Hub, and instruction files in the benchmarks' formats."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests import tiny

UCIT = Path(__file__).parents[2] / "examples" / "ucit"

COLOURS = ("red", "green", "blue", "grey")
_TEXT = """
red green blue grey A a an and artificial assistant between chat curious detailed gives helpful human intelligence
polite questions s The the to user USER ASSISTANT answers What colour is it ? Describe this image How many Answer
question with single word ( or phrase ) . ' : , - assistant system Only yes no directly given letter e g B C D
"""

# In the way of llava-hf/llava-1.5-7b-hf and OpenGVLab/InternVL3-8B-hf.
_TEMPLATES = {
    "llava": (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
        "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "internvl": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def example(name: str) -> ModuleType:
    """A module of `examples/ucit`, which import each other as neighbours."""
    sys.path.insert(0, str(UCIT))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(UCIT))


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words within the tiny models' vocabulary."""
    end = "<|im_end|>" if family == "internvl" else "</s>"
    vocabulary = {
        word: number for number, word in enumerate(["<pad>", "<s>", end, "<unk>", *dict.fromkeys(_TEXT.split())])
    }
    assert len(vocabulary) <= tiny.IMAGE
    special = {"<image>": tiny.IMAGE, "<video>": tiny.VIDEO, "<img>": tiny.START, "</img>": tiny.END}
    backend = Tokenizer(models.WordLevel(vocabulary | special | {"<|im_start|>": 119}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = ["<image>", "<video>", "<img>", "</img>", "<|im_start|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in [end, *marks]])
    if family == "llava":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<image>",
        "video_token": "<video>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        extra_special_tokens=named if family == "internvl" else {},
    )


def processor(family: str) -> Any:
    """The family's own processor, for images of 16 by 16."""
    template = _TEMPLATES[family]
    if family == "internvl":
        return transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(size={"height": 16, "width": 16}),
            tokenizer(family),
            transformers.InternVLVideoProcessor(size={"height": 16, "width": 16}),
            image_seq_length=4,
            chat_template=template,
        )
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer(family),
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save_base(folder: Path, family: str = "llava") -> Path:
    """A tiny base model and its processor in a folder, which stands for a Hub id."""
    model = tiny.build(family)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def save_image(path: Path, colour: str, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def add_task(
    root: Path,
    folder: str,
    answers: Sequence[str],
    *,
    question: str = "What colour is it ?",
    images: str = "datasets",
    names: tuple[str, str] = ("train.json", "test.json"),
) -> None:
    """A task's training and test files, alike, with an image of the colour that each answer begins with."""
    training, testing = [], []
    for number, answer in enumerate(answers):
        name = f"{folder}/images/{number}.png"
        save_image(root / images / name, answer.split()[0] if answer.split()[0] in COLOURS else "grey")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        training.append({"id": str(number), "image": name, "conversations": turns})
        testing.append({"question_id": number, "image": name, "text": question, "answer": answer})
    write(root / folder / names[0], training)
    write(root / folder / names[1], testing)


def add_captions(root: Path, folder: str, references: Sequence[Sequence[str]]) -> None:
    """A caption task's files, with references in COCO's format."""
    add_task(root, folder, [captions[0] for captions in references], question="Describe this image .")
    annotations = [
        {"id": number * 10 + place, "image_id": number, "caption": caption}
        for number, captions in enumerate(references, start=1)
        for place, caption in enumerate(captions)
    ]
    pictures = [{"id": number} for number in range(1, len(references) + 1)]
    write(root / folder / "val_coco_type_3000.json", {"images": pictures, "annotations": annotations})
