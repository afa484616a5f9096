"""Merge adapters from the Hub into one that does all their tasks, and ask it something.

    python merge_from_hub.py me/iconqa me/vizwiz@v2 me/clevr --output merged \\
        --image cubes.png --question "How many cubes are there?"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from PIL import Image
from question_data import prompt
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_many import merge_adapter_sequence


def arguments_parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="Hub ids, with @revision if you like, and folders")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="their base model, by Hub id or folder")
    parser.add_argument("--output", required=True, help="where the merge goes")
    parser.add_argument("--image", help="a picture to ask about")
    parser.add_argument("--question", default="What is shown?")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge, save and ask."""
    args = arguments_parser().parse_args(arguments)
    base = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", device_map="auto")
    merged = merge_adapter_sequence(base, args.adapters)
    merged.save_pretrained(args.output)
    print("Merged:", ", ".join(merged.peft_config["default"].merge.names))

    if args.image:
        processor = AutoProcessor.from_pretrained(args.model)
        picture = Image.open(args.image).convert("RGB")
        asked = processor(images=[picture], text=[prompt(processor, args.question)], return_tensors="pt")
        answer = merged.generate(**asked.to(merged.device, merged.dtype), max_new_tokens=64)
        print(processor.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
