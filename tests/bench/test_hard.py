"""The hard half of the benchmark: tasks that their pictures, their instructions, or both, do not tell from others."""

import numpy as np
import pytest

from benchmarks.mini_ucit.gates import WhenLearnt
from benchmarks.mini_ucit.hard_tasks import ALL, FLOOR, HARD, LOOKS, PICTURES, TEXT, WORD
from benchmarks.mini_ucit.methods import METHODS, Method, same
from benchmarks.mini_ucit.model import MODELS, Collator
from benchmarks.mini_ucit.pretraining import pretrain
from benchmarks.mini_ucit.report import read_results, write_report
from benchmarks.mini_ucit.run import SUITES, Results
from benchmarks.mini_ucit.tasks import TASKS
from benchmarks.mini_ucit.training import answers
from benchmarks.mini_ucit.workshop import Workshop


def hard(kind):
    return [task for task in HARD if task.kind == kind]


def asked(task, count=20):
    examples = task.examples(count, "test", 0)
    return [example.image for example in examples], [example.question for example in examples], examples


def test_there_are_tasks_of_every_kind():
    assert len(ALL) == 24 == len({task.name for task in ALL})
    assert ALL[:6] == TASKS
    kinds = (PICTURES, WORD, FLOOR, TEXT, LOOKS)
    assert [len(hard(kind)) for kind in kinds] == [5, 4, 4, 3, 2]


@pytest.mark.parametrize("kind", [PICTURES, WORD, FLOOR])
def test_tasks_on_the_same_pictures_ask_or_answer_otherwise(kind):
    for one in hard(kind):
        others = [task for task in hard(kind) if task.stream == one.stream and task is not one]
        assert others
        for other in others:
            (images, questions, examples), (same, others_questions, others_examples) = asked(one), asked(other)
            assert all(np.array_equal(a, b) for a, b in zip(images, same))
            assert (questions == others_questions) == (kind == FLOOR)
            assert not {e.answer for e in examples} & {e.answer for e in others_examples}
            if kind == WORD:
                words = [(q.split(), o.split()) for q, o in zip(questions, others_questions)]
                assert all(sum(a != b for a, b in zip(*pair, strict=True)) == 1 for pair in words)


def test_text_needs_no_picture_and_goes_with_those_that_have_one():
    texts = [task.examples(2, "test", 0)[0] for task in hard(TEXT)]
    assert all(text.image is None for text in texts)
    examples = [TASKS[0].examples(1, "test", 0)[0], *texts]
    for tiny in (MODELS["llava"], MODELS["qwen2-vl"]):
        model = tiny.build().eval()
        together = answers(model, Collator(tiny, prompts_only=True), examples)
        alone = [answers(model, Collator(tiny, prompts_only=True), [example])[0] for example in examples]
        assert together == alone
        assert "pixel_values" not in Collator(tiny)(texts)


@pytest.mark.parametrize("model", ["llava", "qwen2-vl"])
def test_tasks_without_pictures_are_learnt_and_merged_with_others(tmp_path, model):
    tiny = MODELS[model]
    weights = None if tiny.checkpoint else tmp_path / "weights"
    if weights is not None:
        pretrain(tiny, weights, steps=2, batch_size=2)
    text = next(task for task in HARD if task.kind == TEXT)
    shop = Workshop(tiny, weights, [TASKS[1], text], tmp_path / "adapters", seed=0, steps=1, tests=4)
    for method in ("gated LoRA, Gaussian router", "joint"):
        assert len(METHODS[method].measure(shop).scores[-1]) == 2


def test_what_was_just_learnt_is_asked_after_each_task(tmp_path):
    shop = Workshop(MODELS["llava"], None, TASKS[:2], tmp_path, seed=0, steps=1, tests=2)
    stages = []

    def after(shop, stage):
        stages.append(stage)
        return same(shop.base())

    measured = WhenLearnt("when learnt", "", "", Method("some", "", "", after)).measure(shop)
    assert stages == [1, 2]
    assert measured.scores == [[0.0, 0.0]]


def test_the_hard_half_has_a_table_for_each_kind(tmp_path):
    settings = SUITES["hard"]
    count = len(settings.tasks)
    scores = {"alone": [[80.0] * count], "gated by images": [[60.0] * 6 + [20.0] * (count - 6)]}
    results = Results(tmp_path / "llava" / "seed0" / settings.results_name, {"model": "llava", "seed": 0}, scores)
    results.about.update(settings.to_dict(), environment={})
    results.write()
    assert not read_results(tmp_path)
    page = write_report(read_results(tmp_path, "hard"), tmp_path, "hard")
    assert page.name == "hard-report.html"
    tables = (tmp_path / "hard-tables.md").read_text()
    for kind in {task.kind for task in settings.tasks}:
        assert f"### llava: {kind} (seed 0)" in tables
    row = next(line for line in tables.splitlines() if line.startswith("| gated by images"))
    assert row.startswith("| gated by images | 60.0 | 20.0 |")  # by kind; the six have kinds of their own
    assert row.endswith("| 30.0 | 38% |")
