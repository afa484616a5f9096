"""Answer test questions and score the answers: of the base model, one task's adapter, or a merge.

    accelerate launch evaluate.py --adapter merged --task UCIT --data UCIT --output results/merged
    accelerate launch evaluate.py --task IconQA --data UCIT --output results/zero-shot

Greedy decoding. Answers go to OUTPUT/<task>.jsonl, one line each, in the fields of MCITlib's answer files; the scores
of all tasks, in per cent, to OUTPUT/scores.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate.utils import gather_object
from collate import Collator
from data import Example, Examples, question_examples, reference_captions
from models import LLAVA, load_base, processes
from peft import PeftModel
from scores import CAPTION_METRICS, caption_scores, check_captions_can_be_scored
from tasks import MLLM_DCL, TASKS, UCIT, Task, find_tasks
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import peft_many  # noqa: F401  (registers the adapter type MANY)
from peft_many.data.batches import for_model


def main(
    task: Annotated[list[str], typer.Option(help=f"{UCIT}, {MLLM_DCL}, or any of {', '.join(TASKS)}; repeatable.")],
    data: Annotated[Path, typer.Option(help="The benchmark's folder; the README shows how it is laid out.")],
    output: Annotated[Path, typer.Option(help="The folder for answers and scores.")],
    adapter: Annotated[str | None, typer.Option(help="By folder or Hub id; none if not given.")] = None,
    images: Annotated[Path | None, typer.Option(help="Where the image names begin.")] = None,
    model: Annotated[str, typer.Option(help="The base model, by Hub id or folder.")] = LLAVA,
    batch_size: Annotated[int, typer.Option(help="Questions in one pass on one device.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 128,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help=f"A caption metric not to compute ({', '.join(CAPTION_METRICS)}); repeatable."),
    ] = None,
    pad_images: Annotated[
        bool | None, typer.Option(help="Pad images to squares, or let the processor crop. As MCITlib if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    limit: Annotated[int | None, typer.Option(help="Use the first questions only, to try things out.")] = None,
) -> None:
    """Answer and score the test questions of some tasks. Start it by `accelerate launch` to use several GPUs."""
    state = processes()
    tasks, skipped = find_tasks(task), leave_out or []
    if any(each.has_captions for each in tasks):
        check_captions_can_be_scored(skipped)
    # All files are read before the model is: what is missing shows at once.
    questions = {each.name: question_examples(each, data, images)[:limit] for each in tasks}
    references = {each.name: _references(each, data, questions[each.name], limit) for each in tasks}
    base, processor = load_base(model, dtype)
    answering: Any = base.to(state.device).eval()
    if adapter is not None:
        answering = PeftModel.from_pretrained(answering, adapter).eval()
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, float]] = {}
    for each in tasks:
        pads = each.pads_test_images if pad_images is None else pad_images
        collator = Collator(processor, base.config.model_type, pad_images=pads)
        asked = [_asked(each, example) for example in questions[each.name]]
        answers = generate(answering, collator, asked, batch_size, max_new_tokens, f"Answering {each.name}")
        if state.is_main_process:
            _write_answers(output / f"{each.name}.jsonl", asked, answers)
            scores[each.name] = score(each, questions[each.name], answers, references[each.name], skipped)
    if state.is_main_process:
        report = {"model": model, "adapter": adapter, "scores": scores, **_mean(scores)}
        (output / "scores.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(json.dumps({"scores": scores, **_mean(scores)}, indent=2))


@torch.inference_mode()
def generate(
    model: Any, collator: Collator, asked: Sequence[Example], batch_size: int, max_new_tokens: int, label: str
) -> list[str]:
    """The answers to all questions, in every process; each process answers its share."""
    state = processes()
    dataset, tokenizer = Examples(asked), collator.processor.tokenizer
    given: list[tuple[int, str]] = []
    with state.split_between_processes(list(range(len(asked)))) as mine:
        loader = DataLoader(Subset(dataset, mine), batch_size=batch_size, collate_fn=collator.questions)
        for batch in tqdm(loader, desc=label, disable=not state.is_main_process):
            batch = for_model(batch, model)
            tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            given += zip(mine[len(given) :], (text.strip() for text in texts))
    return [text for _, text in sorted(gather_object(given))]


def score(
    task: Task,
    questions: Sequence[Example],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    leave_out: Sequence[str],
) -> dict[str, float]:
    """A task's scores, in per cent: `accuracy`, or the caption metrics with their `mean`."""
    if task.score is None:
        return caption_scores(answers, references, leave_out)
    points = [
        task.score(answer, example.answer or "", example.question, example.image_name)
        for answer, example in zip(answers, questions)
    ]
    return {"accuracy": 100 * sum(points) / len(points)}


def _references(task: Task, data: Path, questions: Sequence[Example], limit: int | None) -> list[list[str]]:
    if not task.has_captions:
        return []
    found = reference_captions(task, data)
    if limit is None and len(found) != len(questions):
        raise ValueError(f"{task.name} has {len(questions)} test questions, but reference captions for {len(found)}.")
    return found[: len(questions)]


def _asked(task: Task, example: Example) -> Example:
    if task.suffix is None:
        return example
    question = example.question + task.suffix(example.answer or "")
    return Example(example.id, example.image, example.image_name, question, example.answer)


def _write_answers(path: Path, asked: Sequence[Example], answers: Sequence[str]) -> None:
    lines = [
        json.dumps({"question_id": example.id, "prompt": example.question, "text": answer}, ensure_ascii=False)
        for example, answer in zip(asked, answers)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _mean(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over the tasks, if each has a number that counts."""
    numbers = [found.get("accuracy", found.get("mean")) for found in scores.values()]
    return {"mean": sum(numbers) / len(numbers)} if None not in numbers else {}  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
