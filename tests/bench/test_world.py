"""The benchmark's world: drawn from seeds, in a closed vocabulary, known to the checkpoint that ships with it."""

from itertools import islice

import numpy as np
import pytest

from benchmarks.mini_ucit import hard_tasks
from benchmarks.mini_ucit import tasks as mini_ucit
from benchmarks.mini_ucit.model import MODELS, Collator, build_tokenizer
from benchmarks.mini_ucit.pretraining import pretraining_examples
from benchmarks.mini_ucit.training import accuracy
from examples.demo import tasks as demo

LLAVA = MODELS["llava"]
EVERY_TASK = pytest.mark.parametrize(
    "tasks", [mini_ucit.TASKS, hard_tasks.HARD, demo.TASKS], ids=["mini-UCIT", "hard half", "demo"]
)
OWN_LOOKS = pytest.mark.parametrize("tasks", [mini_ucit.TASKS, demo.TASKS], ids=["mini-UCIT", "demo"])


@EVERY_TASK
def test_pictures_come_from_the_seed_alone(tasks):
    for task in tasks:
        once, again, other = (task.examples(4, "train", seed) for seed in (1, 1, 2))
        assert all(np.array_equal(a.image, b.image) and a.turns == b.turns for a, b in zip(once, again))
        assert not all(np.array_equal(a.image, b.image) and a.turns == b.turns for a, b in zip(once, other))


@EVERY_TASK
def test_test_pictures_are_no_training_pictures(tasks):
    for task in tasks:
        train, test = (task.examples(50, split, 1) for split in ("train", "test"))
        if all(example.image is not None for example in train):  # of a few words there are few
            assert not {example.image.tobytes() for example in train} & {example.image.tobytes() for example in test}


@OWN_LOOKS
def test_tasks_look_different_from_one_another_and_from_pre_training(tasks):
    looks = {task.name: np.stack([e.image for e in task.examples(20, "train", 0)]) for task in tasks}
    looks["pre-training"] = np.stack([e.image for e in islice(pretraining_examples(0), 20)])
    means = [pictures.mean(axis=(0, 1, 2)) for pictures in looks.values()]
    for i, one in enumerate(means):
        assert all(np.abs(one - other).max() > 15 for other in means[i + 1 :])


@EVERY_TASK
def test_every_word_of_every_task_is_in_the_vocabulary(tasks):
    tokenizer = build_tokenizer()
    texts = [text for task in tasks for e in task.examples(50, "test", 0) for turn in e.turns for text in turn]
    texts += [text for e in islice(pretraining_examples(0), 200) for turn in e.turns for text in turn]
    assert all(tokenizer.decode(tokenizer.convert_tokens_to_ids(text.split())) == text for text in texts)


@OWN_LOOKS
def test_streams_of_tasks_are_apart(tasks):
    assert len({task.stream for task in tasks}) == len(tasks)


def test_the_answer_to_one_question_depends_on_the_task():
    """What makes tasks conflict: three of them ask the same and want another grammar."""
    asked: dict[str, set[str]] = {}
    for task in mini_ucit.TASKS:
        for example in task.examples(5, "test", 0):
            asked.setdefault(example.question, set()).add(task.name)
    assert asked["what is shown ?"] == {"digits", "scenes", "captions"}


@pytest.mark.parametrize("name", MODELS)
def test_only_answers_are_learned(name):
    collate = Collator(MODELS[name])
    examples = mini_ucit.TASKS[0].examples(2, "train", 0)
    batch = collate(examples)
    learned = batch["input_ids"][0][batch["labels"][0] != -100]
    assert collate.tokenizer.decode(learned, skip_special_tokens=True) == examples[0].answer
    assert learned[-1] == collate.tokenizer.eos_token_id
    loss = MODELS[name].build()(**batch).loss
    assert loss.isfinite()


def test_flat_patches_are_the_picture_in_the_order_of_merging():
    images = [example.image for example in mini_ucit.TASKS[1].examples(2, "train", 0)]
    inputs = MODELS["qwen2-vl"].picture_inputs(images)
    assert inputs["pixel_values"].shape == (2 * 64, 3 * 6 * 6)
    second = (images[1][0:6, 6:12] / 127.5 - 1).transpose(2, 0, 1).ravel()  # the patch right of the first
    np.testing.assert_allclose(inputs["pixel_values"][65], second, atol=1e-6)
    third = (images[1][6:12, 0:6] / 127.5 - 1).transpose(2, 0, 1).ravel()  # below it, before the next
    np.testing.assert_allclose(inputs["pixel_values"][66], third, atol=1e-6)


def test_the_checkpoint_has_the_vocabulary_and_answers_what_it_was_pre_trained_on():
    assert LLAVA.load().config.text_config.vocab_size == len(build_tokenizer())
    examples = [e for e in islice(pretraining_examples(7), 300) if e.question.startswith("which bar")]
    assert len(examples) > 10
    assert accuracy(LLAVA.load(), Collator(LLAVA, prompts_only=True), examples) > 90


def test_a_model_without_shipped_weights_asks_for_a_folder():
    with pytest.raises(ValueError, match="name their folder"):
        MODELS["qwen2-vl"].load()
