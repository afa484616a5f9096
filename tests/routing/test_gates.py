"""Gated merges: each row of a batch gets the LoRA of its images' task, through everything that models are used for."""

import copy
import functools
import pickle
import textwrap
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import PeftWarning
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DynamicCache,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.algebra.gating import CONFIDENT_WEIGHT
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.routing import watching
from peft_many.routing.row_weights import CACHE_ATTRIBUTE
from peft_many.routing.watched import WatchedMethod
from peft_many.tuner.gated_linear import GatedLinear
from tests import new_process, tiny
from tests.adapters import but_operations, files, make
from tests.files import making
from tests.files.making import PROJECTORS, STYLES
from tests.tuner.test_projector import expected_weights, projector_call, prototypes

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18]]
HARD = 0.01  # a temperature at which an image of a task is that task's alone

family = pytest.mark.parametrize("family", tiny.FAMILIES)
some_families = pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "idefics3"])


def merge(family: str, temperature: float = HARD, **options: Any) -> PeftModel:
    return making.merge(family, temperature=temperature, gate_lora=True, **options)


@functools.cache
def gated(family: str, temperature: float = HARD) -> PeftModel:
    """A gated merge that tests only read."""
    return merge(family, temperature)


@functools.cache
def plain(family: str) -> PeftModel:
    """The same merge without a gate."""
    return making.merge(family, temperature=HARD)


@functools.cache
def alone(family: str, task: int) -> PeftModel:
    """A task's own adapter."""
    return PeftModel.from_pretrained(tiny.build(family), str(making.adapter_folder(family, task))).eval()


def picture(family: str, task: int, number: int = 0) -> Tensor:
    sizes = tiny.sizes(family)
    return tiny.random_image(family, 1000 + number, style=STYLES[task], size=sizes[number % len(sizes)])


def rows_of_tasks(family: str) -> list[list[Tensor]]:
    """One image; three of one task; text only; one."""
    return [[picture(family, 2)], [picture(family, 0, n) for n in range(3)], [], [picture(family, 1)]]


def models_of_rows(family: str) -> list[PeftModel]:
    """Whose outputs the rows of `rows_of_tasks` should have."""
    return [alone(family, 2), alone(family, 0), plain(family), alone(family, 1)]


def inputs_of(family: str, rows: list[list[Tensor]] | None = None, **options: Any) -> dict[str, Tensor]:
    rows = rows_of_tasks(family) if rows is None else rows
    return tiny.batch(making.shared_base(family), family, rows, PROMPTS[: len(rows)], **options)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output: Tensor = model(**inputs).logits
    return output


def assert_rows_are_the_tasks_own(
    model: nn.Module, family: str, tolerance: float = 1e-5, padding_side: str = "left"
) -> None:
    inputs = inputs_of(family, padding_side=padding_side)
    joint, merged = logits(model, inputs), logits(plain(family), inputs)
    for row, own in enumerate(models_of_rows(family)):
        mask = inputs["attention_mask"][row].bool()
        expected, without = logits(own, inputs)[row][mask], merged[row][mask]
        torch.testing.assert_close(joint[row][mask], expected, atol=tolerance, rtol=tolerance)
        assert own is plain(family) or (expected - without).abs().max() > 0.1


def assert_rows_are_the_merged(model: nn.Module, family: str) -> None:
    inputs = inputs_of(family)
    torch.testing.assert_close(logits(model, inputs), logits(plain(family), inputs), atol=1e-5, rtol=1e-5)


@family
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_gets_the_adapter_of_its_images(family: str, side: str) -> None:
    assert_rows_are_the_tasks_own(gated(family), family, padding_side=side)


@family
def test_a_joint_batch_equals_each_row_alone(family: str) -> None:
    model, rows = gated(family, 0.3), [[picture(family, 0), picture(family, 1)], *rows_of_tasks(family)[1:]]
    inputs = inputs_of(family, rows)
    joint = logits(model, inputs)
    for row, prompt, mask, scores in zip(rows, PROMPTS, inputs["attention_mask"].bool(), joint, strict=True):
        one = logits(model, tiny.batch(model, family, [row], [prompt]))[0]
        torch.testing.assert_close(scores[mask], one, atol=1e-4, rtol=0)


def with_deltas(family: str, weights: Tensor, temperature: float) -> PeftModel:
    """A merge without a gate, whose every LoRA layer has the delta `Σ_t α_t ΔW_t`; its `A` is the tasks' `A_t`."""
    model = making.merge(family, temperature=temperature)
    adapters = [load_file(making.adapter_folder(family, t) / "adapter_model.safetensors") for t in range(len(weights))]
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            key = f"base_model.model.{name}.lora_A.weight"
            rows = [2 * weight * tensors[key].double() for weight, tensors in zip(weights, adapters, strict=True)]
            module.lora_A["default"].weight.data = torch.cat(rows).float()
    return model


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "mistral3"])
@pytest.mark.parametrize("tasks", [(0,), (1, 1, 2), (0, 1), (0, 1, 2)])
def test_the_gate_is_that_of_the_definition(family: str, tasks: tuple[int, ...]) -> None:
    """The mean of the images' weights chooses a task's delta, and where none reaches one half the merge answers."""
    temperature = 0.36
    images, projector = [picture(family, task, number) for number, task in enumerate(tasks)], PROJECTORS[family][0]
    weights = []
    for image in images:
        base = making.shared_base(family)
        args, _ = projector_call(base, projector, tiny.batch(base, family, [[image]]))
        weights.append(expected_weights(args[0], prototypes(family, projector), temperature))
    mean = torch.stack(weights).mean(0)
    sure = bool(mean.max() > CONFIDENT_WEIGHT)
    assert mean.max() < 0.99
    assert abs(mean.max() - CONFIDENT_WEIGHT) > 1e-3
    assert sure or len(set(tasks)) > 1
    assert not sure or len(set(tasks)) < 3
    own = torch.nn.functional.one_hot(mean.argmax(), len(mean))
    expected = with_deltas(family, own, temperature) if sure else making.merge(family, temperature=temperature)
    inputs = tiny.batch(expected, family, [images])
    torch.testing.assert_close(logits(gated(family, temperature), inputs), logits(expected, inputs), atol=1e-4, rtol=0)


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    found: Tensor = model.generate(**{"max_new_tokens": 5, "do_sample": False, **inputs, **options})
    return found


def assert_generates_as_the_tasks_own(family: str, **options: Any) -> None:
    inputs, per_row = inputs_of(family), options.get("num_return_sequences", 1)
    found = generate(gated(family), inputs, **options).unflatten(0, (-1, per_row))
    differ = 0
    for row, own in enumerate(models_of_rows(family)):
        expected = generate(own, inputs, **options).unflatten(0, (-1, per_row))
        assert torch.equal(found[row], expected[row]), row
        differ += not torch.equal(
            expected[row], generate(plain(family), inputs, **options).unflatten(0, (-1, per_row))[row]
        )
    assert differ > 0


@family
def test_generation_is_the_tasks_own(family: str) -> None:
    assert_generates_as_the_tasks_own(family)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"num_beams": 2, "use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3"])
def test_generation_of_all_kinds_is_the_tasks_own(family: str, options: dict[str, Any]) -> None:
    if "prompt_lookup_num_tokens" in options:  # which takes one row
        inputs = inputs_of(family, [[picture(family, 1)]])
        found = generate(gated(family), inputs, **options)
        assert torch.equal(found, generate(alone(family, 1), inputs))
    else:
        assert_generates_as_the_tasks_own(family, **options)


def test_generation_from_embeddings() -> None:
    model, inputs = gated("llava"), inputs_of("llava")
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    for row, own in enumerate(models_of_rows("llava")):
        inputs["inputs_embeds"] = embeddings
        joint, expected = logits(model, inputs)[row], logits(own, inputs)[row]
        mask = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(joint[mask], expected[mask], atol=1e-5, rtol=1e-5)
        assert torch.equal(generate(model, inputs)[row], generate(own, inputs)[row])


def florence() -> PreTrainedModel:
    """A tiny encoder-decoder: `generate` runs the text encoder apart from the model's `forward`."""
    vision = {"embed_dim": [16, 24], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4}
    patches = {"patch_size": [3, 3], "patch_stride": [4, 2], "patch_padding": [1, 1], "patch_prenorm": [False, True]}
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("layers", 2), ("ffn_dim", 48)]}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
    text = {"model_type": "bart", "d_model": 32, "vocab_size": tiny.VOCABULARY, "forced_eos_token_id": None}
    config = Florence2Config(
        vision_config={**vision, **patches, "projection_dim": 32},
        text_config={**text, **layers, **heads},
        image_token_id=tiny.IMAGE,
        vocab_size=tiny.VOCABULARY,
    )
    return tiny.with_random_weights(Florence2ForConditionalGeneration, config, 0, torch.float32)


def florence_inputs(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    ids = torch.tensor([[tiny.IMAGE if row else 9] * 5 + [10, 11, 12 + r] for r, row in enumerate(rows)])
    pixels = [image for row in rows for image in row]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(pixels)}


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    targets, family = torch.tensor([[2, 20, 21, 22]]), "llava"  # whose pictures will do
    for task in range(2):
        model = get_peft_model(florence(), MAnyConfig(r=4, lora_alpha=8, task_name=str(task)))
        making.perturb(model, "default", seed=task)
        batch = florence_inputs([[picture(family, task, n)] for n in range(50, 54)])
        collect_statistics(model, [{**batch, "decoder_input_ids": targets.expand(4, -1)}], progress=False)
        model.save_pretrained(str(tmp_path / str(task)))
    folders = [tmp_path / "0", tmp_path / "1"]
    found = merge_adapter_sequence(florence(), folders, gate_lora=True, temperature=HARD, progress=False)
    without = merge_adapter_sequence(florence(), folders, temperature=HARD, progress=False)
    owners = [*(PeftModel.from_pretrained(florence(), str(folder)).eval() for folder in folders[::-1]), without]
    inputs = florence_inputs([[picture(family, 1)], [picture(family, 0)], []])
    teacher_forced = {**inputs, "decoder_input_ids": targets.expand(3, -1)}
    joint = logits(found, teacher_forced)
    for row, own in enumerate(owners):
        expected = logits(own, teacher_forced)
        torch.testing.assert_close(joint[row], expected[row], atol=1e-5, rtol=1e-5)
        assert row == 2 or (logits(without, teacher_forced) - expected)[row].abs().max() > 0.05
        for options in ({}, {"num_beams": 3}, {"use_cache": False}):
            assert torch.equal(generate(found, inputs, **options)[row], generate(own, inputs, **options)[row])


# ---------------------------------------------------------------------------------- what belongs to which generation


class Decoding:
    """A greedy generation by hand, one step at a time."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], cache: Any = None) -> None:
        self.model, self.cache, self.inputs = model, cache, dict(inputs)
        self.mask, self.scores = inputs["attention_mask"], []

    @torch.no_grad()
    def step(self) -> None:
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        self.scores.append(output.logits[:, -1])
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.inputs = {"input_ids": output.logits[:, -1].argmax(-1, keepdim=True), "attention_mask": self.mask}


def decoded(model: nn.Module, inputs: dict[str, Tensor], steps: int = 4) -> Tensor:
    decoding = Decoding(model, inputs)
    for _ in range(steps):
        decoding.step()
    return torch.stack(decoding.scores)


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "mistral3"])  # Qwen-VL keeps a state itself
def test_interleaved_generations_do_not_exchange_gates(family: str) -> None:
    one, two, three = [inputs_of(family, [[picture(family, task)]]) for task in range(3)]
    text = inputs_of(family, [[]])
    running = [Decoding(gated(family), inputs) for inputs in (one, two, text, three)]
    for _ in range(4):
        for decoding in running:
            decoding.step()
    owners = [alone(family, 0), alone(family, 1), plain(family), alone(family, 2)]
    for decoding, owner, inputs in zip(running, owners, (one, two, text, three), strict=True):
        torch.testing.assert_close(torch.stack(decoding.scores), decoded(owner, inputs), atol=1e-4, rtol=0)


def test_a_generation_inside_another_one() -> None:
    family, inside = "llava", []

    def ask_on(ids: Tensor, scores: Tensor) -> Tensor:
        inside.append(generate(gated(family), inputs_of(family, [[picture(family, 1)]])))
        inside.append(logits(gated(family), inputs_of(family, [[]])))
        return scores

    inputs = inputs_of(family, [[picture(family, 0)]])
    found = generate(gated(family), inputs, logits_processor=[ask_on])
    assert torch.equal(found, generate(alone(family, 0), inputs))
    assert torch.equal(inside[0], generate(alone(family, 1), inputs_of(family, [[picture(family, 1)]])))
    assert torch.equal(inside[0], inside[2])


@some_families
def test_threads_do_not_exchange_gates(family: str) -> None:
    inputs = [inputs_of(family, [[picture(family, task)], []]) for task in (0, 1)]
    expected = [generate(alone(family, task), inputs[task])[0] for task in (0, 1)]
    barrier, failures = threading.Barrier(2), []
    model = merge(family)
    # Both threads are inside the language model in every step
    layer = next(module for module in model.modules() if isinstance(module, GatedLinear))

    def wait(*_: object) -> None:
        barrier.wait(timeout=60)

    layer.register_forward_pre_hook(wait)

    def work(task: int) -> None:
        try:
            assert torch.equal(generate(model, inputs[task])[0], expected[task])
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(task,)) for task in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_text_after_an_image_gets_the_merged_lora() -> None:
    model, text = gated("llava"), inputs_of("llava", [[], []])
    expected = logits(plain("llava"), text)
    logits(model, inputs_of("llava", [[picture("llava", 0)], [picture("llava", 1)]]))
    assert torch.equal(logits(model, text), expected)
    generate(model, inputs_of("llava", [[picture("llava", 0)], [picture("llava", 1)]]))
    assert torch.equal(logits(model, text), expected)


def test_a_call_that_failed_leaves_nothing_behind() -> None:
    model, text = gated("llava"), inputs_of("llava", [[]])
    for hook, error in ((fail, ValueError), (interrupt, KeyboardInterrupt)):
        handle = model.get_base_model().lm_head.register_forward_hook(hook)
        with pytest.raises(error):
            logits(model, inputs_of("llava", [[picture("llava", 0)]]))
        with pytest.raises(error):
            generate(model, inputs_of("llava", [[picture("llava", 0)]]))
        handle.remove()
        assert torch.equal(logits(model, text), logits(plain("llava"), text))


def fail(*_: Any) -> None:
    raise ValueError("Nothing is wrong.")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("prefix", [0, 5])
def test_a_cache_that_is_cut_back_to_before_the_image(prefix: int) -> None:
    model, caches = gated("llava"), [DynamicCache(config=gated("llava").config.text_config) for _ in range(2)]
    text, image = torch.tensor([[30, 31, 32, 33]]), inputs_of("llava", [[picture("llava", 0)]])
    for cache in caches:
        if prefix:
            logits(plain("llava"), {"input_ids": torch.arange(20, 20 + prefix)[None], "past_key_values": cache})
    image["attention_mask"] = torch.ones(1, prefix + image["input_ids"].shape[1], dtype=torch.int64)
    logits(model, {**image, "past_key_values": caches[0]})
    further = logits(model, {"input_ids": text, "past_key_values": copy.deepcopy(caches[0])})
    caches[0].crop(prefix - caches[0].get_seq_length())
    expected = logits(plain("llava"), {"input_ids": text, "past_key_values": caches[1]})
    for part in text.split(2, dim=1):
        found = logits(model, {"input_ids": part, "past_key_values": caches[0]})
    torch.testing.assert_close(found, expected[:, -2:], atol=1e-5, rtol=0)
    assert (further[:, -2:] - found).abs().max() > 0.1


@pytest.mark.parametrize("fork", [lambda cache: cache, copy.deepcopy])
def test_gates_follow_the_rows_of_a_cache(fork: Callable[[Any], Any]) -> None:
    """As beam search of one's own and servers change them, which drop rows that are done."""
    model, inputs = gated("llava"), inputs_of("llava", [[picture("llava", task)] for task in range(3)])
    step = torch.tensor([[30], [31], [32]])

    def after(change: Callable[[Any], Any], rows: list[int]) -> Tensor:
        with torch.no_grad():
            cache = fork(model(**inputs, use_cache=True).past_key_values)
        change(cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], dim=1)[rows]
        return logits(model, {"input_ids": step[rows], "attention_mask": mask, "past_key_values": cache})

    expected = after(lambda cache: None, [0, 1, 2])
    for rows in ([2, 0, 1], [1, 1, 0]):
        found = after(lambda cache, rows=rows: cache.reorder_cache(torch.tensor(rows)), rows)
        torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=0)
    for rows in ([2], [0, 2], [2, 1, 0]):
        found = after(lambda cache, rows=rows: cache.batch_select_indices(torch.tensor(rows)), rows)
        torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_that_a_repeated_cache_drops_are_not_those_that_are_known() -> None:
    cache = gated("llava")(**inputs_of("llava", [[picture("llava", task)] for task in range(3)])).past_key_values
    before = dict(vars(cache)[CACHE_ATTRIBUTE])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 1]))
    assert vars(cache)[CACHE_ATTRIBUTE] == before


def turns(model: nn.Module, tasks: list[int | None], fork: Callable[[Any], Any] = lambda cache: cache) -> Tensor:
    """A chat of several turns, each with an image of a task or none, on one cache; the last turn's answer."""
    cache, ids, answer = None, torch.zeros(1, 0, dtype=torch.int64), torch.empty(0)
    for task in tasks:
        images = [] if task is None else [picture("llava", task)]
        turn = tiny.batch(model, "llava", [images], [[20, 21]])
        ids = torch.cat([ids, turn["input_ids"]], dim=1)
        mask, pixels = torch.ones_like(ids), {k: v for k, v in turn.items() if k == "pixel_values"}
        output = generate(
            model,
            {"input_ids": ids, "attention_mask": mask, **pixels},
            past_key_values=fork(cache),
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids, cache, answer = output.sequences, output.past_key_values, torch.stack(output.logits)
    return answer


@pytest.mark.parametrize("fork", [lambda cache: cache, copy.deepcopy], ids=["same", "copied"])
def test_further_turns_keep_the_gates_of_the_first(fork: Callable[[Any], Any]) -> None:
    found = turns(gated("llava"), [1, None, None], fork)
    torch.testing.assert_close(found, turns(alone("llava", 1), [1, None, None], fork), atol=1e-4, rtol=0)
    assert (found - turns(plain("llava"), [1, None, None], fork)).abs().max() > 0.1


def test_a_further_image_of_the_task_changes_nothing() -> None:
    found = turns(gated("llava"), [1, 1, None])
    torch.testing.assert_close(found, turns(alone("llava", 1), [1, 1, None]), atol=1e-4, rtol=0)
    found = turns(gated("llava"), [None, 1, None])  # from the image on
    assert (found - turns(plain("llava"), [None, 1, None])).abs().max() > 0.1


# ------------------------------------------------------------------------------------------- where it cannot be told


def test_rows_that_nothing_tells_get_the_merged_lora_with_a_warning() -> None:
    model, inputs = gated("llava"), inputs_of("llava", [[picture("llava", 0)], [picture("llava", 1)]])
    moved = inputs["input_ids"].flatten().roll(8).view(2, -1)  # a part of an image stands in the other row
    with pytest.warns(PeftWarning, match=r"cannot be told which of 2 images belong to which of 2 samples"):
        found = logits(model, {**inputs, "input_ids": moved})
    torch.testing.assert_close(found, logits(plain("llava"), {**inputs, "input_ids": moved}), atol=1e-5, rtol=0)


def test_images_that_were_encoded_before_the_call() -> None:
    model, inputs = gated("llava"), inputs_of("llava", [[picture("llava", 0)]])
    with pytest.warns(PeftWarning, match="encoded outside"), torch.no_grad():
        encoded = model.get_base_model().get_image_features(inputs.pop("pixel_values"), return_dict=True)
    found = logits(model, {**inputs, "mm_encoder_outputs": {"image": encoded}})
    again = inputs_of("llava", [[picture("llava", 0)]])
    torch.testing.assert_close(found, logits(plain("llava"), again), atol=1e-5, rtol=0)


def test_a_layer_that_sees_some_tokens_only() -> None:
    model, inputs = merge("llava"), inputs_of("llava", [[picture("llava", 0)]])
    q_proj = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    found = []
    q_proj.register_forward_hook(
        lambda module, args, _: found.append((args[0], module.lora_A["default"](args[0][0, :3])))
    )
    with pytest.warns(PeftWarning, match=r"input of shape \(3, 32\) does not say"):
        logits(model, inputs)
    ((x, hidden),) = found
    assert torch.equal(hidden, nn.functional.linear(x[0, :3], q_proj.lora_A["default"].weight))


def test_flat_tokens_are_told_apart() -> None:
    model, inputs = gated("llava"), inputs_of("llava", [[picture("llava", 0)], []])
    seen = []
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.lora_A["default"]

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args[0].dim() == 3:
            seen.append((module(args[0].flatten(0, 1)), output.flatten(0, 1)))

    handle = layer.register_forward_hook(compare)
    logits(model, inputs)
    handle.remove()
    ((flat, expected),) = seen
    torch.testing.assert_close(flat, expected)


# ------------------------------------------------------------------------------------------------ saving and loading


def test_loading_in_a_new_process(tmp_path: Path) -> None:
    family, inputs = "llava", inputs_of("llava")
    gated(family).save_pretrained(str(tmp_path / "merged"))
    tiny.build(family).save_pretrained(str(tmp_path / "base"))
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save((logits(gated(family), inputs), generate(gated(family), inputs)), tmp_path / "expected.pt")
    script = f"""
        import torch, peft_many
        from peft import PeftModel
        from transformers import LlavaForConditionalGeneration
        inputs, expected = torch.load(r"{tmp_path}/inputs.pt"), torch.load(r"{tmp_path}/expected.pt")
        for kind in ("peft", "low memory", "transformers"):
            model = LlavaForConditionalGeneration.from_pretrained(r"{tmp_path}/base")
            if kind == "transformers":
                model.load_adapter(r"{tmp_path}/merged")
            else:
                model = PeftModel.from_pretrained(model, r"{tmp_path}/merged", low_cpu_mem_usage=kind != "peft").eval()
            with torch.no_grad():
                torch.testing.assert_close(model(**inputs).logits, expected[0])
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected[1])
    """
    done = new_process.run(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


def test_a_model_with_a_task_type(tmp_path: Path) -> None:
    """PEFT has a class of its own for these, which calls the base model in another way."""
    gated("llava").save_pretrained(str(tmp_path))
    config = MAnyConfig.from_pretrained(str(tmp_path))
    config.task_type = "CAUSAL_LM"
    model = PeftModel.from_pretrained(tiny.build("llava"), str(tmp_path), config=config).eval()
    assert isinstance(model, PeftModelForCausalLM)
    assert_rows_are_the_tasks_own(model, "llava")
    decoding = Decoding(model, inputs_of("llava", [[picture("llava", 1)]]))
    decoding.step()
    decoding.step()
    expected = decoded(alone("llava", 1), inputs_of("llava", [[picture("llava", 1)]]), 2)
    torch.testing.assert_close(torch.stack(decoding.scores), expected, atol=1e-5, rtol=0)


def test_state_dicts_go_to_and_fro() -> None:
    family, model = "llava", merge("llava")
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    own = [key for key in state if key.endswith(".lora_A.task_weight")]
    assert len(own) == len([key for key in state if key.endswith(".lora_A.weight")]) > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "task_weight" in name:
                parameter.zero_()
    assert (logits(model, inputs_of(family)) - logits(gated(family), inputs_of(family))).abs().max() > 0.1
    outcome = set_peft_model_state_dict(model, state)
    assert not outcome.unexpected_keys
    assert_rows_are_the_tasks_own(model, family)


def test_beside_other_adapters(tmp_path: Path) -> None:
    family, inputs = "llava", inputs_of("llava")
    gated(family).save_pretrained(str(tmp_path / "merged"))
    model = PeftModel.from_pretrained(tiny.build(family), str(making.adapter_folder(family, 1)), "task").eval()
    expected = logits(model, inputs)
    model.load_adapter(str(tmp_path / "merged"), "gated")
    assert torch.equal(logits(model, inputs), expected)
    model.set_adapter("gated")
    assert_rows_are_the_tasks_own(model, family)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(making.shared_base(family), inputs))
    model.load_adapter(str(tmp_path / "merged"), "gated_too")
    with pytest.warns(UserWarning, match="deleted"):
        model.delete_adapter("gated")
    model.set_adapter("gated_too")
    assert_rows_are_the_tasks_own(model, family)
    model.set_adapter("task")
    model.delete_adapter("gated_too")
    assert torch.equal(logits(model, inputs), expected)
    assert watched(model) == {}


def watched(model: nn.Module) -> dict[str, list[str]]:
    """What watching its calls leaves on a model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {}
    for name, module in base.named_modules():
        hooks = [hook for kind in (module._forward_hooks, module._forward_pre_hooks) for hook in kind.values()]
        left = [hook.__name__ for hook in hooks if hook.__module__ == watching.__name__]
        left += [
            key for key, value in vars(module).items() if isinstance(value, WatchedMethod) or key == watching._HOOKS
        ]
        if left:
            found[name] = left
    return found


def gated_parts(model: nn.Module) -> list[str]:
    """What a gate is made of in a model, once it is unloaded."""
    parts = [(name, module) for name, module in model.named_modules()]
    return [name for name, part in parts if isinstance(part, GatedLinear) or getattr(part, "gate", None) is not None]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_gate_by_themselves(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    family, model = "qwen3_vl", merge("qwen3_vl")
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_rows_are_the_tasks_own(twin, family)
    inputs = inputs_of(family, [[picture(family, 1)]])
    assert torch.equal(generate(twin, inputs), generate(alone(family, 1), inputs))


def test_unloading_leaves_the_base_model() -> None:
    family, inputs = "llava", inputs_of("llava")
    model = merge(family)
    generate(model, inputs)
    base = model.unload()
    assert torch.equal(logits(base, inputs), logits(making.shared_base(family), inputs))
    assert watched(base) == {}
    assert gated_parts(base) == []
    assert torch.equal(generate(base, inputs), generate(making.shared_base(family), inputs))


def test_folding_folds_the_merged_delta() -> None:
    family, model = "llava", merge("llava")
    with pytest.warns(PeftWarning, match="'default' is a merge with `gate_lora`.*merged LoRA for all inputs"):
        model.merge_adapter()
    assert_rows_are_the_merged(model, family)
    model.unmerge_adapter()
    assert_rows_are_the_tasks_own(model, family)
    with pytest.warns(PeftWarning, match="merged LoRA for all inputs"):
        base = model.merge_and_unload()
    assert gated_parts(base) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        assert_rows_are_the_merged(base, family)


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_hold_what_a_merge_in_memory_has(tmp_path: Path, dtype: torch.dtype) -> None:
    family = "llava"
    folders = [making.adapter_folder(family, task) for task in range(3)]
    options = {"temperature": HARD, "gate_lora": True, "progress": False}
    merge_adapter_files(folders, tmp_path / "merged", dtype=dtype, **options)
    tensors = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in tensors.items() if ".lora_" in key} == {dtype}
    loaded = PeftModel.from_pretrained(tiny.build(family), str(tmp_path / "merged")).eval()
    assert_rows_are_the_tasks_own(loaded, family, 1e-5 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        gated(family).save_pretrained(str(tmp_path / "in memory"))
        saved = load_file(tmp_path / "in memory" / "adapter_model.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[key], tensors[key]) for key in saved)
    again = merge_adapter_files(folders[::-1], tmp_path / "again", dtype=dtype, **options)
    assert files(again) == files(tmp_path / "merged")


def test_without_the_option_all_is_as_before_the_option(tmp_path: Path) -> None:
    folders = [making.adapter_folder("llava", task) for task in range(2)]
    merge_adapter_files(folders, tmp_path / "plain", progress=False)
    merge_adapter_files(folders, tmp_path / "off", gate_lora=False, progress=False)
    assert files(tmp_path / "plain") == files(tmp_path / "off")
    assert not any("task_weight" in key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert not MAnyConfig.from_pretrained(str(tmp_path / "plain")).merge.options.gate_lora


def test_merging_goes_on_and_inherits_the_gate(tmp_path: Path) -> None:
    family, options = "llava", {"progress": False, "temperature": HARD}
    folders = [making.adapter_folder(family, task) for task in range(3)]
    once = merge_adapter_files(folders, tmp_path / "once", gate_lora=True, **options)
    two = merge_adapter_files(folders[1:], tmp_path / "two", gate_lora=True, **options)
    on = merge_adapter_files([folders[0], two], tmp_path / "on", progress=False)
    assert but_operations(on) == but_operations(once)
    off = merge_adapter_files([folders[0], two], tmp_path / "off", gate_lora=False, progress=False)
    assert but_operations(off) == but_operations(merge_adapter_files(folders, tmp_path / "plain", **options))
    from_plain = merge_adapter_files([off], tmp_path / "from plain", gate_lora=True, progress=False)
    assert (
        load_file(from_plain / "adapter_model.safetensors").keys()
        == load_file(on / "adapter_model.safetensors").keys()
    )
    assert_rows_are_the_tasks_own(merge_adapter_sequence(tiny.build(family), [from_plain], progress=False), family)


def test_half_precision_merges_are_merged_further(tmp_path: Path) -> None:
    family, options = "llava", {"progress": False, "temperature": HARD, "gate_lora": True}
    folders = [making.adapter_folder(family, task) for task in range(3)]
    half = merge_adapter_files(folders[1:], tmp_path / "half", dtype=torch.bfloat16, **options)
    merged = merge_adapter_sequence(tiny.build(family), [folders[0], half], progress=False)
    assert_rows_are_the_tasks_own(merged, family)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_in_half_precision(dtype: torch.dtype) -> None:
    family = "llava"
    folders = [making.adapter_folder(family, task) for task in range(3)]
    model = merge(family, dtype=dtype)
    inputs = tiny.batch(model, family, rows_of_tasks(family), PROMPTS)
    joint = logits(model, inputs).float()
    for row, task in ((0, 2), (1, 0), (3, 1)):
        own = PeftModel.from_pretrained(tiny.build(family, dtype=dtype), str(folders[task])).eval()
        mask = inputs["attention_mask"][row].bool()
        expected, without = logits(own, inputs)[row].float(), logits(plain(family), inputs_of(family))[row]
        error = (joint[row] - expected)[mask].abs().max()
        assert error < 0.1 * (without - expected)[mask].abs().max()
    model.half() if dtype == torch.float16 else model.bfloat16()
    assert (logits(model, inputs).float() - joint).abs().max() < 0.3


def test_layers_and_ranks_that_differ_by_task(tmp_path: Path) -> None:
    layers = r".*language_model.*"
    made = [
        make(tmp_path / "a", seed=1, task_name="a", r=2, target_modules=rf"{layers}(q|v)_proj", measure="all-linear"),
        make(tmp_path / "b", seed=2, task_name="b", r=3, rank_pattern={"q_proj": 5}, lora_alpha=9),
        make(
            tmp_path / "c",
            seed=6,
            kind=LoraConfig,
            target_modules=rf"{layers}(k|up)_proj",
            measure="all-linear",
        ),
        make(tmp_path / "text", seed=4, task_name="text", images=False, projector_modules=[]),
    ]
    folders = [one.folder for one in made]
    options = {"temperature": HARD, "progress": False}
    model = merge_adapter_sequence(tiny.build("llava"), folders, gate_lora=True, **options)
    without = merge_adapter_sequence(tiny.build("llava"), folders, **options)
    config = model.peft_config["default"]
    assert config.merge.task_ranks == [0, 3, 0, 4]  # of o, gate and down
    assert config.merge.task_rank_pattern[r"model\.language_model\.layers\.0\.self_attn\.q_proj"] == [2, 5, 0, 4]
    assert config.merge.names == ["a", "b", "c", "text"]
    assert len(watched(model)) == 2
    rows = [[tiny.random_image("llava", 3, style=seed)] for seed in (1, 2, 6)]
    inputs = inputs_of("llava", [*rows, []])
    joint = logits(model, inputs)
    for row, folder in enumerate(folders):
        own = without if row == 3 else PeftModel.from_pretrained(tiny.build("llava"), str(folder)).eval()
        mask = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(joint[row][mask], logits(own, inputs)[row][mask], atol=1e-5, rtol=1e-5)


def test_projectors_that_no_task_trained_still_tell_the_tasks_apart(tmp_path: Path) -> None:
    folders = [making.adapter_folder("llava", task, own_projector=False) for task in range(3)]
    options = {"temperature": HARD, "progress": False}
    merged = merge_adapter_files(folders, tmp_path / "merged", gate_lora=True, **options)
    assert not any(".experts." in key for key in load_file(merged / "adapter_model.safetensors"))
    model = PeftModel.from_pretrained(tiny.build("llava"), str(merged)).eval()
    inputs = inputs_of("llava")
    joint = logits(model, inputs)
    for row, task in ((0, 2), (1, 0), (3, 1)):
        own = PeftModel.from_pretrained(tiny.build("llava"), str(folders[task])).eval()
        mask = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(joint[row][mask], logits(own, inputs)[row][mask], atol=1e-5, rtol=1e-5)
    on = merge_adapter_files([merged], tmp_path / "on", progress=False)
    assert load_file(on / "adapter_model.safetensors").keys() == load_file(merged / "adapter_model.safetensors").keys()


def test_a_merge_of_one_adapter_is_that_adapter() -> None:
    inputs, folder = inputs_of("llava"), making.adapter_folder("llava", 1)
    model = merge_adapter_sequence(tiny.build("llava"), [folder], gate_lora=True, progress=False)
    torch.testing.assert_close(logits(model, inputs), logits(alone("llava", 1), inputs), atol=1e-5, rtol=1e-5)


def test_an_8_bit_base(tmp_path: Path) -> None:
    tiny.build("llava").save_pretrained(str(tmp_path))
    quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[PROJECTORS["llava"][0], "lm_head"])

    def load() -> nn.Module:
        return LlavaForConditionalGeneration.from_pretrained(str(tmp_path), quantization_config=quantisation)

    folders = [str(making.adapter_folder("llava", task)) for task in range(3)]
    model = merge_adapter_sequence(load(), folders, temperature=HARD, gate_lora=True, progress=False)
    without = merge_adapter_sequence(load(), folders, temperature=HARD, progress=False)
    q_proj = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert "bnb" in type(q_proj).__module__
    inputs = inputs_of("llava")
    joint = logits(model, inputs)
    owners = [PeftModel.from_pretrained(load(), folders[t]).eval() for t in (2, 0)]
    for row, own in zip((0, 1, 2), (*owners, without), strict=True):
        mask = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(joint[row][mask], logits(own, inputs)[row][mask], atol=2e-2, rtol=2e-2)
    with pytest.warns(PeftWarning, match="merged LoRA for all inputs"):
        folded = model.merge_and_unload()
    assert gated_parts(folded) == []


# -------------------------------------------------------------------------------------------------------- refusals


def test_what_a_gate_cannot_do(tmp_path: Path) -> None:
    folders = [making.adapter_folder("llava", task) for task in range(2)]
    texts = [make(tmp_path / name, "llama", seed, task_name=name).folder for seed, name in enumerate("ab")]
    base = tiny.build("llava")
    with pytest.raises(ValueError, match=r"`gate_lora` keeps every task's block.*so a `rank` cannot be given"):
        merge_adapter_sequence(base, folders, gate_lora=True, rank=4, progress=False)
    with pytest.raises(
        UnmergeableAdapterError, match=r"`gate_lora` goes by the tasks' visual prototypes.*no image passed"
    ):
        merge_adapter_files(texts, tmp_path / "out", gate_lora=True, progress=False)
    with pytest.raises(TypeError, match="gate_lora"):  # no option of training
        MAnyConfig(gate_lora=True)
    assert not (tmp_path / "out").exists()
    assert watched(base) == {}
    merged = merge_adapter_files(folders, tmp_path / "merged", gate_lora=True, progress=False)
    config = MAnyConfig.from_pretrained(str(merged))
    config.merge = replace(config.merge, task_ranks=[4, 3])
    with pytest.raises(
        ValueError, match=r"`task_ranks` \[4, 3\] do not add up to the rank 8 of 'model\.language_model"
    ):
        PeftModel.from_pretrained(tiny.build("llava"), str(merged), config=config)


def test_a_failed_merge_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.build("llava")
    monkeypatch.setattr("peft_many.merging.merge.set_peft_model_state_dict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter_sequence(
            base, [making.adapter_folder("llava", t) for t in range(2)], gate_lora=True, progress=False
        )
    assert watched(base) == {}


def test_gradient_checkpointing_is_refused_while_training() -> None:
    model, inputs = merge("llava"), inputs_of("llava", [[picture("llava", 0)]])
    inputs["pixel_values"].requires_grad_()
    model(**inputs).logits.square().mean().backward()
    assert inputs["pixel_values"].grad.abs().sum() > 0
    model.get_base_model().gradient_checkpointing_enable()
    model.eval()(**inputs)
    with pytest.raises(RuntimeError, match=r"'default' is a merge with `gate_lora`.*gradient_checkpointing_disable"):
        model.train()(**inputs)


def test_statistics_of_a_gated_merge_cannot_be_collected() -> None:
    with pytest.raises(ValueError, match="merge"):
        collect_statistics(gated("llava"), [inputs_of("llava")], progress=False)
