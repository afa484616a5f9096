"""Gates that go by what is asked: each row gets the LoRA of the task that asks so, through all that models do."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import PeftWarning
from torch import Tensor, nn
from transformers import DynamicCache

from peft_many import MAnyConfig, merge_adapter_sequence
from peft_many.records import INSTRUCTION_ROUTER
from peft_many.routing.instructions import features_of_instructions, router_of
from peft_many.tuner.gated_linear import GatedLinear
from tests import tiny
from tests.routing.asked import (
    CROSSED,
    MIXED,
    SHARED,
    TEXTS,
    Task,
    adapter,
    alone,
    base,
    batch,
    folder,
    merge,
    merged,
    owners,
    question,
)
from tests.routing.test_gates import Decoding, generate, logits, watched
from tests.routing.test_replicas import replica_of
from tests.waits import on_pretended_gpu

by_words = pytest.mark.parametrize("gate_by", ["instructions", "both"])
families = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(torch.allclose(found, expected, atol=tolerance, rtol=tolerance))


def unlabelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def assert_rows_are_of(
    model: nn.Module, inputs: dict[str, Tensor], expected: list[nn.Module], without: nn.Module | None = None
) -> None:
    """Each row's outputs are those of one of the models, and those of another one, `without`, would differ."""
    joint = logits(model, inputs)
    for row, own in enumerate(expected):
        mask = inputs["attention_mask"][row].bool()
        assert close(joint[row][mask], logits(own, unlabelled(inputs))[row][mask]), row
        if without not in (None, own):
            assert not close(joint[row][mask], logits(without, unlabelled(inputs))[row][mask], 0.05), row


# ---------------------------------------------------------------------------------------------- what decides for whom


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answers", [0, 3])
@by_words
def test_texts_are_gated_by_their_words(gate_by: str, side: str, answers: int) -> None:
    order, own = [2, 0, 1, 1], owners("llama", TEXTS)
    inputs = batch(own[0], "llama", [TEXTS[t] for t in order], side=side, answers=answers)
    assert_rows_are_of(merged("llama", TEXTS, gate_by), inputs, [own[t] for t in order], merged("llama", TEXTS, None))


@families
@by_words
def test_tasks_on_the_same_pictures_are_told_apart(family: str, gate_by: str) -> None:
    order, own = [2, 0, 1], owners(family, SHARED)
    inputs = batch(own[0], family, [SHARED[t] for t in order])
    expected = [own[t] for t in order]
    assert_rows_are_of(merged(family, SHARED, gate_by), inputs, expected, merged(family, SHARED, None))
    by_images = logits(merged(family, SHARED, "images"), inputs)
    assert not close(by_images, logits(merged(family, SHARED, gate_by), inputs), 0.05)


@families
def test_both_tell_apart_what_neither_does(family: str) -> None:
    own, order = owners(family, CROSSED), [3, 0, 2, 1]
    inputs = batch(own[0], family, [CROSSED[t] for t in order])
    expected = [own[t] for t in order]
    assert_rows_are_of(merged(family, CROSSED, "both"), inputs, expected, merged(family, CROSSED, None))
    for gate_by in ("images", "instructions"):
        found = logits(merged(family, CROSSED, gate_by), inputs)
        # Of two tasks that look alike to it, the first one.
        assert sum(close(found[row], logits(one, inputs)[row], 0.05) for row, one in enumerate(expected)) == 2


@families
@by_words
def test_texts_among_pictures(family: str, gate_by: str) -> None:
    own, order = owners(family, MIXED), [2, 1, 0, 2]
    inputs = batch(own[0], family, [MIXED[t] for t in order])
    expected = [own[t] for t in order]
    assert_rows_are_of(merged(family, MIXED, gate_by), inputs, expected, merged(family, MIXED, None))
    only_texts = batch(own[0], family, [MIXED[2]] * 2)
    assert_rows_are_of(merged(family, MIXED, gate_by), only_texts, [own[2]] * 2, merged(family, MIXED, None))


@by_words
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_joint_batch_is_each_row_alone(gate_by: str, side: str) -> None:
    """Also of questions that are no task's, or half of one's and half of another's."""
    model = merged("llava", MIXED, gate_by)
    rows = batch(model, "llava", [MIXED[t] for t in (0, 2, 1, 2)], side=side)
    ids, mask = rows["input_ids"].clone(), rows["attention_mask"]
    words = (ids >= 3) & (ids < 100)
    ids[1] = torch.where(words[1], 60 + torch.arange(len(ids[1])) % 7, ids[1])
    ids[3] = torch.where(words[3] & (words[3].cumsum(0) > 3), ids[0].masked_fill(~words[0], 11).flip(0), ids[3])
    joint = logits(model, {**rows, "input_ids": ids})
    for row in range(len(ids)):
        kept = mask[row].bool()
        one = {"input_ids": ids[row][kept][None], "attention_mask": mask[row][kept][None]}
        if row in (0, 2):
            one["pixel_values"] = rows["pixel_values"][[row // 2]]
        assert close(joint[row][kept], logits(model, one)[0], 1e-4), row


def test_the_order_of_words_decides() -> None:
    tasks: tuple[Task, ...] = ((0, None), (3, None))
    assert sorted(question(0, 1)) == sorted(question(3, 1))
    own = owners("llama", tasks)
    inputs = batch(own[0], "llama", [tasks[1], tasks[0]])
    assert_rows_are_of(merged("llama", tasks, "instructions"), inputs, own[::-1], merged("llama", tasks, None))


def test_questions_of_no_task_are_left_to_the_base_model() -> None:
    own, without = owners("llama", TEXTS), merged("llama", TEXTS, None)
    model = merge("llama", TEXTS, "instructions", abstain_above=8.0)
    inputs = batch(model, "llama", [TEXTS[0], TEXTS[1], TEXTS[2]])
    assert_rows_are_of(model, inputs, own, without)
    row = inputs["input_ids"][1]
    row[row > 3] += 10
    found = logits(model, inputs)
    with model.disable_adapter():
        assert close(found[1], logits(model, inputs)[1])
    for row in (0, 2):
        assert close(found[row], logits(own[row], inputs)[row])
    assert not close(logits(merged("llama", TEXTS, "instructions"), inputs)[1], logits(without, inputs)[1], 0.05)


@by_words
def test_an_encoder_is_asked(gate_by: str) -> None:
    own, order = owners("t5", TEXTS), [1, 2, 0]
    model, without = merged("t5", TEXTS, gate_by), merged("t5", TEXTS, None)
    inputs = batch(model, "t5", [TEXTS[t] for t in order])
    targets = torch.tensor([[0, 20, 21], [0, 22, 23], [0, 24, 25]])
    joint = logits(model, {**inputs, "decoder_input_ids": targets})
    for row, t in enumerate(order):
        forced = {**inputs, "decoder_input_ids": targets}
        assert close(joint[row], logits(own[t], forced)[row])
        assert not close(joint[row], logits(without, forced)[row], 0.05)
        for options in ({}, {"num_beams": 3}, {"use_cache": False}):
            assert torch.equal(generate(model, inputs, **options)[row], generate(own[t], inputs, **options)[row])


@families
@pytest.mark.parametrize("router", ["cosine", "gaussian"])
@pytest.mark.parametrize("route_by", ["instructions", "both"])
def test_instructions_choose_among_the_projectors_too(tmp_path: Path, family: str, router: str, route_by: str) -> None:
    """On the same pictures; what nobody asks so is answered by the base model, whole."""
    own = [adapter(base(family), family, task, t, projector_modules=None).eval() for t, task in enumerate(SHARED[:2])]
    for t, model in enumerate(own):
        model.save_pretrained(str(tmp_path / str(t)))
    options = {"router": router, "gate_by": "instructions", "route_by": route_by, "abstain_above": 50.0}
    model = merge_adapter_sequence(base(family), [tmp_path / "0", tmp_path / "1"], progress=False, **options)
    inputs = batch(model, family, [SHARED[1], SHARED[0], SHARED[0]])
    assert_rows_are_of(model, inputs, [own[1], own[0], own[0]])
    words = inputs["input_ids"][2]
    words[(words > 5) & (words < 100)] = 60
    assert_rows_are_of(model, inputs, [own[1], own[0], base(family)])
    assert_rows_are_of(model, batch(model, family, [SHARED[2]] * 2), [base(family)] * 2)


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(("family", "tasks"), [("llama", TEXTS), ("llava", MIXED), ("qwen2_vl", MIXED)])
def test_generation_is_the_tasks_own(family: str, tasks: tuple[Task, ...], options: dict[str, Any]) -> None:
    own, order, per_row = owners(family, tasks), [2, 0, 1], options.get("num_return_sequences", 1)
    gate_by = "instructions" if family == "llama" else "both"
    inputs = batch(own[0], family, [tasks[t] for t in order])
    found = generate(merged(family, tasks, gate_by), inputs, **options).unflatten(0, (-1, per_row))
    plainly = generate(merged(family, tasks, None), inputs, **options).unflatten(0, (-1, per_row))
    for row, t in enumerate(order):
        expected = generate(own[t], inputs, **options).unflatten(0, (-1, per_row))[row]
        assert torch.equal(found[row], expected), row
    assert not torch.equal(found, plainly)


def test_sampling_several_answers() -> None:
    own, inputs = owners("llama", TEXTS), batch(owners("llama", TEXTS)[0], "llama", [TEXTS[1]])
    found = []
    for model in (merged("llama", TEXTS, "instructions"), own[1], merged("llama", TEXTS, None)):
        torch.manual_seed(0)
        found.append(generate(model, inputs, do_sample=True, num_return_sequences=3, max_new_tokens=8))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_assisted_generation(kind: str) -> None:
    own, model = owners("llama", TEXTS), merged("llama", TEXTS, "instructions")
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if kind == "assistant":
        options = {"assistant_model": tiny.build_text("llama", seed=5)}
    for t in range(3):
        inputs = batch(model, "llama", [TEXTS[t]])
        assert torch.equal(generate(model, inputs, **options), generate(own[t], inputs))


def turns(model: nn.Module, asked: list[int], fork: Callable[[Any], Any] = lambda cache: cache) -> list[Tensor]:
    """The scores of the answers to one question after another, on one cache."""
    cache, ids, found = None, torch.zeros(1, 0, dtype=torch.int64), []
    for t in asked:
        ids = torch.cat([ids, torch.tensor([question(t, 3)])], dim=1)
        output = generate(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            past_key_values=fork(cache),
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids, cache = output.sequences, output.past_key_values
        found.append(torch.stack(output.logits))
    return found


def answer_after(first: nn.Module, second: nn.Module, asked: list[int]) -> Tensor:
    """The scores of the second answer, where one model has read the first question and answered it."""
    ids = torch.tensor([question(asked[0], 3)])
    read = generate(
        first,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = torch.cat([read.sequences, torch.tensor([question(asked[1], 3)])], dim=1)
    output = generate(
        second,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        past_key_values=read.past_key_values,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits)


@pytest.mark.parametrize("fork", [lambda cache: cache, copy.deepcopy], ids=["same", "copied"])
def test_the_second_question_decides_its_answer(fork: Callable[[Any], Any]) -> None:
    model, own = merged("llama", TEXTS, "instructions"), owners("llama", TEXTS)
    for asked in ([0, 1], [1, 2], [2, 2]):
        found = turns(model, asked, fork)[1]
        assert close(found, answer_after(own[asked[0]], own[asked[1]], asked), 1e-3)
        if asked[0] != asked[1]:
            assert not close(found, answer_after(own[asked[0]], own[asked[0]], asked), 0.05)


def test_decoding_by_hand_keeps_the_first_question() -> None:
    order, own = [1, 2, 0], owners("llama", TEXTS)
    inputs = batch(own[0], "llama", [TEXTS[t] for t in order])
    runs = [Decoding(model, inputs) for model in (merged("llama", TEXTS, "instructions"), *own)]
    for step in range(4):
        for run in runs:
            run.step()
            run.inputs["input_ids"] = torch.tensor([[30 + step], [40 + step], [50 + step]])
        found, *expected = (run.scores[-1] for run in runs)
        for row, t in enumerate(order):
            assert close(found[row], expected[t][row]), (step, row)


@pytest.mark.parametrize("fork", [copy.deepcopy, lambda cache: cache], ids=["copied", "cut back"])
def test_several_questions_about_a_picture_that_was_read_once(fork: Callable[[Any], Any]) -> None:
    """Both of what it shows and what is asked; the cache is copied for each question, or cut back after it."""
    model, own = merged("llava", CROSSED, "both"), owners("llava", CROSSED)
    shown = batch(model, "llava", [(0, 3)])
    pixels, ids = shown.pop("pixel_values"), shown["input_ids"]
    prefix = ids[:, : int((ids == ids.max()).nonzero()[-1, 1]) + 1]
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=prefix, pixel_values=pixels, past_key_values=cache, use_cache=True)
    read = cache.get_seq_length()
    for words in (0, 1, 0):
        whole = torch.cat([prefix, torch.tensor([question(words, 3)])], dim=1)
        used = fork(cache)
        asked = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        expected = generate(own[2 + words], asked, past_key_values=copy.deepcopy(cache))
        assert torch.equal(generate(model, asked, past_key_values=used), expected)
        used.crop(read - used.get_seq_length())


def test_interleaved_threads_do_not_exchange_questions() -> None:
    model, own, failures = merge("llama", TEXTS, "instructions"), owners("llama", TEXTS), []
    inputs = [batch(model, "llama", [TEXTS[t], TEXTS[2]]) for t in (0, 1)]
    expected = [generate(own[t], inputs[t])[0] for t in (0, 1)]
    barrier = threading.Barrier(2)
    layer = model.get_base_model().model.layers[1].self_attn.v_proj.lora_A["default"]

    def wait(*_: object) -> None:
        barrier.wait(timeout=60)

    layer.register_forward_pre_hook(wait)

    def work(t: int) -> None:
        try:
            assert torch.equal(generate(model, inputs[t])[0], expected[t])
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(t,)) for t in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------------------------------------- where it cannot be read


def test_embeddings_alone_get_the_merged_lora() -> None:
    model, without = merged("llama", TEXTS, "instructions"), merged("llama", TEXTS, None)
    inputs = batch(model, "llama", [TEXTS[0], TEXTS[1]])
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    with pytest.warns(PeftWarning, match=r"The merged LoRA is used.*cannot be read, since the model was not called"):
        found = logits(model, embedded)
    assert close(found, logits(without, embedded))
    with pytest.warns(PeftWarning, match="not called with token ids") as said:
        found = generate(model, embedded)
    assert len([one for one in said if issubclass(one.category, PeftWarning)]) == 1
    assert torch.equal(found, generate(without, embedded))


def test_embeddings_of_pictures_and_words_go_by_the_pictures() -> None:
    tasks: tuple[Task, ...] = ((0, 0), (1, 3), (2, 5))
    model, own = merged("llava", tasks, "both"), owners("llava", tasks)
    inputs = batch(model, "llava", [tasks[1], tasks[0]])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.warns(PeftWarning, match="The LoRA is chosen by images alone: instructions cannot be read"):
        assert_rows_are_of(model, inputs, [own[1], own[0]])


def test_packed_rows_get_the_merged_lora() -> None:
    model, without = merged("llama", TEXTS, "instructions"), merged("llama", TEXTS, None)
    samples = [question(0, 1), question(1, 2)]
    packed = {
        "input_ids": torch.tensor([samples[0] + samples[1]]),
        "position_ids": torch.tensor([[*range(len(samples[0])), *range(len(samples[1]))]]),
    }
    with pytest.warns(PeftWarning, match="its rows hold several samples each"):
        assert close(logits(model, packed), logits(without, packed))


def test_a_picture_without_a_word() -> None:
    model = merged("llava", CROSSED, "both")
    inputs = batch(model, "llava", [CROSSED[0]])
    placeholders = inputs["input_ids"] == inputs["input_ids"].max()
    ids = inputs["input_ids"][placeholders][None]
    found = logits(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})
    assert found.isfinite().all()


# --------------------------------------------------------------------------------------------- what it is attached to


def test_adapters_that_are_not_active_are_not_asked(tmp_path: Any) -> None:
    merged("llama", TEXTS, "instructions").save_pretrained(str(tmp_path))
    model = merge("llama", TEXTS, None)
    model.load_adapter(str(tmp_path), "gated")
    inputs, ungated = batch(model, "llama", [TEXTS[1], TEXTS[0]]), merged("llama", TEXTS, None)
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        for called in (inputs, packed):
            assert close(logits(model, called), logits(ungated, called))
        model.get_base_model().gradient_checkpointing_enable()
        model.train()(**inputs)
        model.get_base_model().gradient_checkpointing_disable()
        model.eval().set_adapter("gated")
        with model.disable_adapter():
            assert close(logits(model, packed), logits(base("llama"), packed))
    own = owners("llama", TEXTS)
    assert_rows_are_of(model, inputs, [own[1], own[0]], ungated)
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"'gated' is a merge with `gate_lora`.*gradient_checkpointing_disable"):
        model.train()(**inputs)


def test_two_gated_merges_on_one_model(tmp_path: Any) -> None:
    other = TEXTS[1:]
    merged("llama", TEXTS, "instructions").save_pretrained(str(tmp_path))
    first = [folder("llama", task, 7 + n) for n, task in enumerate(other)]
    model = merge_adapter_sequence(base("llama"), first, gate_by="instructions", progress=False)
    model.load_adapter(str(tmp_path), "second")
    inputs = batch(model, "llama", [TEXTS[2], TEXTS[1]])
    of_first = [alone("llama", TEXTS[2], 8), alone("llama", TEXTS[1], 7)]
    of_second = owners("llama", TEXTS)[:0:-1]
    assert_rows_are_of(model, inputs, of_first)
    model.set_adapter("second")
    assert_rows_are_of(model, inputs, of_second)
    model.set_adapter("default")
    assert_rows_are_of(model, inputs, of_first)
    model.delete_adapter("default")
    assert list(getattr(model.get_base_model(), INSTRUCTION_ROUTER).modules_to_save) == ["second"]
    model.set_adapter("second")
    assert_rows_are_of(model, inputs, of_second)


def test_nothing_is_left_behind() -> None:
    inputs = batch(owners("llama", TEXTS)[0], "llama", [TEXTS[0]])
    for take_away in (lambda model: model.unload(), lambda model: model.delete_adapter("default")):
        model = merge("llama", TEXTS, "instructions")
        generate(model, inputs)
        inside = model.get_base_model()
        take_away(model)
        assert not hasattr(inside, INSTRUCTION_ROUTER)
        assert watched(inside) == {}
        assert not [name for name, _ in inside.named_buffers() if INSTRUCTION_ROUTER in name]


def test_folding_folds_the_merged_lora() -> None:
    model, inputs = merge("llama", TEXTS, "instructions"), batch(owners("llama", TEXTS)[0], "llama", [TEXTS[0]])
    without = logits(merged("llama", TEXTS, None), inputs)
    with pytest.warns(PeftWarning, match="merged LoRA for all inputs"):
        folded = model.merge_and_unload()
    assert not hasattr(folded, INSTRUCTION_ROUTER)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        assert close(logits(folded, inputs), without)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), replica_of])
def test_copies_ask_by_themselves(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, own = merge("llava", MIXED, "both"), owners("llava", MIXED)
    twin, inputs = duplicate(model), batch(model, "llava", [MIXED[2], MIXED[1]])
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.zero_()
    assert_rows_are_of(twin, inputs, [own[2], own[1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_instructions_are_compared_in_float32(dtype: torch.dtype) -> None:
    model, own = merge("llama", TEXTS, "instructions").to(dtype), owners("llama", TEXTS)
    router = router_of(model.get_base_model(), "default")
    before = router_of(merged("llama", TEXTS, "instructions").get_base_model(), "default")
    assert router is not None
    assert before is not None
    for (name, buffer), (_, expected) in zip(router.named_buffers(), before.named_buffers()):
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, expected)
    inputs = batch(model, "llama", [TEXTS[1], TEXTS[0]])
    joint, without = logits(model, inputs).float(), logits(merged("llama", TEXTS, None), inputs)
    for row, t in enumerate((1, 0)):
        expected, mask = logits(own[t], inputs)[row], inputs["attention_mask"][row].bool()
        assert (joint[row] - expected)[mask].abs().max() < 0.2 * (without[row] - expected)[mask].abs().max()


def test_embeddings_that_other_adapters_train_are_not_looked_at() -> None:
    """What the base model's own embeddings say is what was measured, whoever is active."""
    for options in (
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [*range(11, 76)]}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ):
        model, own = merge("llama", TEXTS, "instructions"), owners("llama", TEXTS)
        model.add_adapter("other", MAnyConfig(r=2, **{"target_modules": ["q_proj"], **options}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "other" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        inputs = batch(model, "llama", [TEXTS[1], TEXTS[0]])
        model.set_adapter("other")
        read = features_of_instructions(model.get_base_model(), inputs)
        expected = features_of_instructions(own[0].get_base_model(), inputs)
        assert read is not None
        assert expected is not None
        assert torch.equal(read[1], expected[1]), options


def test_labels_and_compiled_graphs() -> None:
    model, own = merge("llama", TEXTS, "instructions"), owners("llama", TEXTS)
    inputs = batch(model, "llama", [TEXTS[2], TEXTS[1]], answers=3)
    with torch.no_grad():
        loss = model(**inputs).loss
    expected = [logits(own[2], unlabelled(inputs))[0], logits(own[1], unlabelled(inputs))[1]]
    labels = inputs["labels"][:, 1:]
    log_p = torch.stack(expected)[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    torch.testing.assert_close(loss, -log_p[labels >= 0].mean(), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    model.get_base_model().model.compile(backend="aot_eager")
    for order in ([2, 1], [0, 2]):
        inputs = batch(model, "llama", [TEXTS[t] for t in order])
        assert_rows_are_of(model, inputs, [own[t] for t in order])
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ what it costs


def test_the_host_waits_once_for_each_prompt_and_for_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    order = [1, 0]
    inputs = batch(owners("llama", TEXTS)[0], "llama", [TEXTS[t] for t in order])
    found = []
    for model in (merged("llama", TEXTS, None), merged("llama", TEXTS, "instructions")):
        prompt = on_pretended_gpu(monkeypatch, model, inputs)
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
        step = {"input_ids": torch.tensor([[30], [31]]), "attention_mask": mask}
        call = on_pretended_gpu(monkeypatch, model, step, lambda: model(**step, past_key_values=cache))  # noqa: B023
        answer = on_pretended_gpu(monkeypatch, model, inputs, lambda: generate(model, inputs))  # noqa: B023
        found.append((prompt.waits, call.waits, answer.waits, call.kernels))
    (prompt, step, answer, kernels), (asked_prompt, asked_step, asked_answer, asked_kernels) = found
    assert asked_prompt - prompt == asked_answer - answer == {"cpu": 1}
    assert not prompt - asked_prompt
    assert asked_step == step
    layers = sum(isinstance(module, GatedLinear) for module in merged("llama", TEXTS, "instructions").modules())
    assert asked_kernels - kernels == {"mul": layers}


@families
def test_what_each_fits_another_task_is_left_to_the_base_model(family: str) -> None:
    """The picture of one task, asked another one's question; beside rows that are the tasks' own, and decoded too."""
    tasks: tuple[Task, ...] = ((0, 0), (1, 1), (2, None))
    options = {"router": "gaussian", "route_by": "both"}
    model, own = merge(family, tasks, "both", abstain_above=4.0, **options), owners(family, tasks)
    rows: list[Task] = [(0, 0), (0, 1), (1, 1), (2, 1), (2, None)]
    inputs = batch(own[0], family, rows)
    found = logits(model, inputs)
    with model.disable_adapter():
        plain = logits(model, inputs)
    expected = [logits(own[0], inputs), plain, logits(own[1], inputs), plain, logits(own[2], inputs)]
    masks = inputs["attention_mask"].bool()
    for row, mask in enumerate(masks):
        assert close(found[row][mask], expected[row][row][mask]), row
    never = logits(merge(family, tasks, "both", **options), inputs)
    assert not close(never[1][masks[1]], plain[1][masks[1]], 0.05)
    single = generate(model, batch(own[0], family, rows[1:2], seed=901))
    assert torch.equal(generate(model, inputs)[1][-single.shape[1] :], single[0])
