"""CPM in whole models: images are told apart, each gets its own mixture of projectors, and copies stay independent."""

import copy
import functools
import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_many import MAnyConfig, merge_adapter_sequence
from peft_many.algebra.routing import routing_weights
from peft_many.families.image_layouts import image_rows_of
from peft_many.families.image_rows import ImageRows
from peft_many.records import MergeOptions, RoutedProjector, RoutedTask
from peft_many.routing.calls import projector_call as running_call
from peft_many.routing.watching import watching_calls
from peft_many.tuner import projector as projector_module
from peft_many.tuner.projector import ProjectorMixture
from tests import tiny
from tests.files import making
from tests.files.making import PROJECTORS, STYLES

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18]]
SOFT = 0.5  # a temperature at which every task has a say

family = pytest.mark.parametrize("family", tiny.FAMILIES)


def picture(family: str, style: int, number: int) -> Tensor:
    sizes = tiny.sizes(family)
    return tiny.random_image(family, 1000 + number, style=style, size=sizes[number % len(sizes)])


def mixed_rows(family: str) -> list[list[Tensor]]:
    """One image; three of three tasks; text only; two, one of which resembles no task."""
    one, two, three = STYLES
    numbers = [[(one, 0)], [(two, 1), (three, 2), (one, 3)], [], [(three, 1), (6, 2)]]
    return [[picture(family, style, number) for style, number in row] for row in numbers]


def mixture_of(template: nn.Module, trained: str = "yy", **options: Any) -> ProjectorMixture:
    """A mixture for features of width 6, of a task for each letter: `y` if it brings a projector of its own."""
    tasks = [RoutedTask(str(t), letter == "y") for t, letter in enumerate(trained)]
    return ProjectorMixture(template, RoutedProjector(6, tasks), MergeOptions(**options))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs).logits
    return output


def soften(merged: PeftModel, temperature: float = SOFT, top_k: int | None = None) -> PeftModel:
    for module in merged.modules():
        if isinstance(module, ProjectorMixture):
            module.temperature, module.top_k = temperature, top_k
    return merged


@functools.cache
def read_only_merge(family: str) -> PeftModel:
    return making.merge(family)


def read_only(family: str, temperature: float = SOFT, top_k: int | None = None) -> PeftModel:
    """A softened merge that the test only reads; the next test that asks for one sets its own temperature."""
    return soften(read_only_merge(family), temperature, top_k)


def projector_call(model: nn.Module, projector: str, inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The arguments and the output of a projector in one forward pass; its names may carry a prefix of PEFT."""
    calls = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = base.get_submodule(projector).register_forward_hook(lambda module, args, out: calls.append((args, out)))
    logits(model, inputs)
    handle.remove()
    assert len(calls) == 1
    return calls[0]


def experts(family: str, projector: str, tasks: Sequence[int] = (0, 1, 2)) -> list[nn.Module]:
    """The projectors of the task adapters, from their files."""
    made = []
    for task in tasks:
        expert = copy.deepcopy(making.shared_base(family).get_submodule(projector))
        tensors = load_file(making.adapter_folder(family, task) / "adapter_model.safetensors")
        prefix = f"base_model.model.{projector}."
        weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        expert.load_state_dict(weights)
        made.append(expert)
    return made


def prototypes(family: str, projector: str, tasks: Sequence[int] = (0, 1, 2)) -> Tensor:
    folders = [making.adapter_folder(family, task) for task in tasks]
    files = [load_file(folder / "adapter_statistics.safetensors") for folder in folders]
    return torch.stack([file[f"0.prototype.{projector}"] for file in files])


def expected_weights(features: Tensor, known: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """The definition: cosine of pooled features with prototypes, both centred on the prototypes' mean; softmax.

    With `top_k` only the largest weights count, in the proportions that they have.
    """
    pooled = features.double().reshape(-1, features.shape[-1]).mean(0)
    centre = known.double().mean(0)
    cosines = [torch.cosine_similarity(pooled - centre, one.double() - centre, dim=0) for one in known]
    weights = torch.softmax(torch.stack(cosines) / temperature, dim=0)
    chosen = weights.topk(top_k or len(known)).indices
    return torch.zeros_like(weights).index_copy_(0, chosen, weights[chosen] / weights[chosen].sum())


@family
@pytest.mark.parametrize(("side", "top_k"), [("left", None), ("right", None), ("left", 1), ("right", 2)])
def test_a_joint_batch_equals_each_row_alone(family: str, side: str, top_k: int | None) -> None:
    merged = read_only(family, top_k=top_k)
    rows = mixed_rows(family)
    inputs = tiny.batch(merged, family, rows, PROMPTS, padding_side=side)
    joint = logits(merged, inputs)
    for row, prompt, mask, scores in zip(rows, PROMPTS, inputs["attention_mask"].bool(), joint, strict=True):
        alone = logits(merged, tiny.batch(merged, family, [row], [prompt]))[0]
        torch.testing.assert_close(scores[mask], alone, atol=1e-4, rtol=0)


@family
@pytest.mark.parametrize(("temperature", "top_k"), [(SOFT, None), (0.05, None), (SOFT, 1), (SOFT, 2)])
def test_the_mixture_is_that_of_the_definition(family: str, temperature: float, top_k: int | None) -> None:
    merged = read_only(family, temperature, top_k)
    rows = mixed_rows(family)
    inputs = tiny.batch(merged, family, rows, PROMPTS)
    shares = []
    for projector in PROJECTORS[family]:
        _, output = projector_call(merged, projector, inputs)
        known, tasks = prototypes(family, projector), experts(family, projector)
        expected = []
        for image in (image for row in rows for image in row):
            # The base model, one image at a time: no boundaries to be found
            base = making.shared_base(family)
            args, _ = projector_call(base, projector, tiny.batch(base, family, [[image]]))
            weights = expected_weights(args[0], known, temperature, top_k)
            with torch.no_grad():
                outputs = [expert(*args).double() for expert in tasks]
            expected.append(sum(w * out for w, out in zip(weights, outputs, strict=True)).flatten(0, -2))
            shares.append(weights)
        flat = output.reshape(-1, output.shape[-1]).double()
        torch.testing.assert_close(flat, torch.cat(expected), atol=1e-4, rtol=1e-4)
    if temperature == SOFT and top_k is None:  # else the mixture would be a choice, and this a weaker test
        assert torch.stack(shares).amax(1).min() < 0.8


@family
def test_an_image_of_a_task_goes_to_that_tasks_projector(family: str) -> None:
    merged = making.shared_merge(family)  # temperature 0.05
    for projector in PROJECTORS[family]:
        tasks = experts(family, projector)
        for t, style in enumerate(STYLES):
            inputs = tiny.batch(merged, family, [[picture(family, style, 7)]])
            args, output = projector_call(merged, projector, inputs)
            with torch.no_grad():
                outputs = torch.stack([expert(*args).flatten() for expert in tasks], dim=1)
            weights = torch.linalg.lstsq(outputs.double(), output.double().flatten()[:, None]).solution[:, 0]
            assert weights[t] > 0.9
            torch.testing.assert_close(weights.sum().item(), 1.0, atol=1e-3, rtol=0)


@family
def test_generation_equals_repeated_forward_passes(family: str) -> None:
    merged = read_only(family)
    rows, tokens = mixed_rows(family), 3
    inputs = tiny.batch(merged, family, rows, PROMPTS)

    def generate(inputs: dict[str, Tensor], **options: object) -> Tensor:
        return merged.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)[:, -tokens:]

    extended = dict(inputs)
    for _ in range(tokens):
        scores = logits(merged, extended)[:, -1]
        scores[:, list(tiny.SPECIAL_TOKENS)] = -torch.inf
        ones = torch.ones(len(rows), 1, dtype=torch.long)
        more = {"input_ids": scores.argmax(-1, keepdim=True), "attention_mask": ones}
        types = ones if family == "paligemma" else 0 * ones  # causal suffix there, text elsewhere
        more |= {name: types for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
        extended |= {name: torch.cat([extended[name], column], dim=1) for name, column in more.items()}
    expected = extended["input_ids"][:, -tokens:]
    assert torch.equal(generate(inputs), expected)
    assert torch.equal(generate(inputs, use_cache=False), expected)
    alone = [tiny.batch(merged, family, [row], [prompt]) for row, prompt in zip(rows, PROMPTS, strict=True)]
    for options in ({"num_beams": 2}, {"num_beams": 2, "use_cache": False}):
        expected = torch.cat([generate(one, **options) for one in alone])
        assert torch.equal(generate(inputs, **options), expected)


def test_the_tiles_of_one_image_share_one_decision() -> None:
    family, projector = "llava_next", PROJECTORS["llava_next"][0]
    merged = soften(making.merge(family))
    # Two tiles of different tasks, and the view of the whole
    left, right = (tiny.random_image(family, 5, style=style, size=(8, 8)) for style in STYLES[:2])
    inputs = tiny.batch(merged, family, [[torch.cat([left, right], dim=2)], [left]])
    args, output = projector_call(merged, projector, inputs)
    assert len(output) == 3 + 3
    known, tasks = prototypes(family, projector), experts(family, projector)
    by_tile = [expected_weights(tile, known, SOFT) for tile in args[0]]
    assert (by_tile[1] - by_tile[2]).abs().max() > 0.1  # alone, the tiles would have been routed elsewhere
    for tiles, mixed in ((args[0][:3], output[:3]), (args[0][3:], output[3:])):
        weights = expected_weights(tiles, known, SOFT)
        with torch.no_grad():
            outputs = [expert(tiles).double() for expert in tasks]
        expected = sum(w * out for w, out in zip(weights, outputs, strict=True))
        torch.testing.assert_close(mixed.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [None, [1, 2, 1]])
def test_llava_onevision_cuts_only_images_that_are_alone(counts: list[int] | None) -> None:
    config = transformers.LlavaOnevisionConfig(
        vision_config=tiny._vision("siglip_vision_model", image_size=8, vision_use_head=False),
        text_config=tiny._text("qwen2"),
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        image_token_index=tiny.IMAGE,
    )
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionModel(config).eval()
    sizes = [(8, 16), (16, 16), (16, 8), (16, 16)]
    seen: list[tuple[int, ImageRows]] = []
    model.multi_modal_projector.register_forward_hook(
        lambda module, args, out: seen.append((len(args[0]), image_rows_of(running_call(module, args, {}))))
    )
    with watching_calls(model), torch.no_grad():
        # Five tiles as the processor pads them: the whole view and four
        model.get_image_features(
            torch.randn(4, 5, 3, 8, 8),
            torch.tensor(sizes),
            batch_num_images=None if counts is None else torch.tensor(counts),
        )
    (tiles, layout), *_ = seen
    expected = [3, 5, 3, 5] if counts is None else [3, 1, 1, 5]
    assert layout.lengths is not None
    assert layout.lengths.tolist() == expected
    assert tiles == sum(expected)


@pytest.mark.parametrize("family", making.FLAT)
def test_flat_features_from_elsewhere_are_an_error(family: str) -> None:
    merged = making.shared_merge(family)
    projector = merged.get_base_model().get_submodule(PROJECTORS[family][0])
    width = merged.peft_config["default"].merge.routing[PROJECTORS[family][0]].width
    with pytest.raises(RuntimeError, match=r"flat vision features of shape \(16, \d+\).*get_image_features"):
        projector(torch.randn(16, width))


def test_a_failing_image_call_leaves_no_boundaries_behind() -> None:
    merged = making.shared_merge("qwen2_vl")
    inputs = tiny.batch(merged, "qwen2_vl", [[picture("qwen2_vl", 0, 0)]])
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        merged(**inputs | {"pixel_values": inputs["pixel_values"][:-1]})
    with pytest.raises(RuntimeError, match="flat vision features"):
        merged.get_base_model().model.visual.merger(torch.randn(16, 24))


def test_boundaries_that_do_not_fit_the_features_are_an_error() -> None:
    layout = ImageRows(torch.tensor([4, 8]), flat=True)
    with pytest.raises(RuntimeError, match=r"7 rows .* images of \[4, 8\] patches"):
        layout.pool(torch.randn(7, 3))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_threads_do_not_see_each_others_images(family: str) -> None:
    merged = soften(making.merge(family))
    rows = mixed_rows(family)
    batches = [tiny.batch(merged, family, rows[:2]), tiny.batch(merged, family, rows[:0:-1])]
    alone = [logits(merged, inputs) for inputs in batches]
    barrier, failures = threading.Barrier(2), []
    projector = merged.get_base_model().get_submodule(PROJECTORS[family][0])
    # Both threads are inside `get_image_features` before either of them reaches the projector

    def wait(*_: object) -> None:
        barrier.wait(timeout=60)

    handle = projector.register_forward_pre_hook(wait)

    def work(index: int) -> None:
        try:
            for _ in range(3):
                torch.testing.assert_close(logits(merged, batches[index]), alone[index], atol=1e-4, rtol=0)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not failures


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["llava", "llava_next", "mistral3", "qwen3_vl"])
def test_copies_route_by_themselves(family: str, duplicate) -> None:  # type: ignore[no-untyped-def]
    merged = soften(making.merge(family))
    inputs = tiny.batch(merged, family, mixed_rows(family))
    twin = duplicate(merged)  # before the first forward pass, for which transformers sets hooks that cannot be pickled
    expected = logits(merged, inputs)
    with torch.no_grad():
        for module in merged.modules():
            if isinstance(module, ProjectorMixture):
                module.prototypes.copy_(module.prototypes.flip(0))
    assert (logits(merged, inputs) - expected).abs().max() > 1e-2
    del merged
    torch.testing.assert_close(logits(twin, inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_prototypes_stay_float32_whatever_the_model_is_cast_to(family: str, dtype: torch.dtype) -> None:
    merged = making.merge(family)
    before = {name: buffer.clone() for name, buffer in merged.named_buffers() if "prototypes" in name}
    assert len(before) == len(PROJECTORS[family])
    merged = merged.to(dtype) if dtype == torch.bfloat16 else merged.half()
    after = dict(merged.named_buffers())
    for name, buffer in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], buffer)
    inputs = tiny.batch(merged, family, mixed_rows(family))
    for projector in PROJECTORS[family]:
        args, output = projector_call(merged, projector, inputs)
        assert args[0].dtype == output.dtype == dtype
    assert logits(merged, inputs).isfinite().all()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_merge_on_a_bf16_model_keeps_exact_prototypes(low_cpu_mem_usage: bool) -> None:
    merged = making.merge("llava", dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage)
    (mixture,) = [module for module in merged.modules() if isinstance(module, ProjectorMixture)]
    assert torch.equal(mixture.prototypes, prototypes("llava", PROJECTORS["llava"][0]))
    assert mixture.prototypes.dtype == torch.float32
    inputs = tiny.batch(merged, "llava", mixed_rows("llava"))
    _, output = projector_call(merged, PROJECTORS["llava"][0], inputs)
    assert output.dtype == torch.bfloat16
    assert logits(merged, inputs).isfinite().all()


def test_a_mixture_made_on_the_meta_device_can_be_given_memory() -> None:
    with torch.device("meta"):
        mixture = mixture_of(nn.Linear(6, 4), temperature=0.1)
    mixture = mixture.half().to_empty(device="cpu")
    assert mixture.prototypes.device.type == "cpu"
    assert mixture.prototypes.dtype == torch.float32


@family
def test_a_task_without_a_projector_goes_to_the_base_models(family: str) -> None:
    folders = [making.adapter_folder(family, 0), making.adapter_folder(family, 1, own_projector=False)]
    merged = soften(
        merge_adapter_sequence(tiny.build(family), folders, temperature=SOFT, progress=False)  # type: ignore[arg-type]
    )
    base = making.shared_base(family)
    inputs = tiny.batch(merged, family, mixed_rows(family))
    for projector in PROJECTORS[family]:
        known = prototypes(family, projector, (0, 1))
        tasks = [*experts(family, projector, (0,)), base.get_submodule(projector)]
        for image in (image for row in mixed_rows(family) for image in row):
            args, output = projector_call(merged, projector, tiny.batch(merged, family, [[image]]))
            weights = expected_weights(args[0], known, SOFT)
            with torch.no_grad():
                outputs = [expert(*args).double() for expert in tasks]
            expected = sum(w * out for w, out in zip(weights, outputs, strict=True))
            torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)
    before = logits(merged, inputs)
    torch.testing.assert_close(logits(merged.merge_and_unload(), inputs), before, atol=1e-4, rtol=0)


@family
def test_a_merge_of_one_adapter_is_that_adapter(family: str) -> None:
    adapter = PeftModel.from_pretrained(tiny.build(family), str(making.adapter_folder(family, 1))).eval()
    merged = merge_adapter_sequence(tiny.build(family), [making.adapter_folder(family, 1)], progress=False)
    inputs = tiny.batch(merged, family, mixed_rows(family))
    expected = logits(adapter, inputs)
    assert (expected - logits(making.shared_base(family), inputs)).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged.merge_and_unload(), inputs), expected, atol=1e-4, rtol=0)


@family
def test_an_unloaded_merge_still_routes(family: str) -> None:
    merged = soften(making.merge(family))
    inputs = tiny.batch(merged, family, mixed_rows(family))
    expected = logits(merged, inputs)
    plain = merged.merge_and_unload()
    assert not isinstance(plain, PeftModel)
    torch.testing.assert_close(logits(plain, inputs), expected, atol=1e-4, rtol=0)


def test_disabling_the_merge_gives_the_base_model() -> None:
    merged = making.shared_merge("qwen3_vl")
    inputs = tiny.batch(merged, "qwen3_vl", mixed_rows("qwen3_vl"))
    with merged.disable_adapter():
        off = logits(merged, inputs)
    torch.testing.assert_close(off, logits(making.shared_base("qwen3_vl"), inputs), atol=1e-5, rtol=0)
    assert (logits(merged, inputs) - off).abs().max() > 1e-2


def test_a_saved_merge_comes_back_the_same(tmp_path: Path) -> None:
    for family in ("llava_next", "qwen3_vl"):
        merged = making.shared_merge(family)
        merged.save_pretrained(str(tmp_path / family))
        again = PeftModel.from_pretrained(tiny.build(family), str(tmp_path / family)).eval()
        inputs = tiny.batch(merged, family, mixed_rows(family))
        assert torch.equal(logits(again, inputs), logits(merged, inputs))


def test_a_model_may_read_attributes_of_its_projector() -> None:
    base = tiny.build("llava")
    base.model.multi_modal_projector.spatial_merge_size = 2  # as MiniMax-M3-VL's has
    folders = [making.adapter_folder("llava", task) for task in (0, 1)]
    merged = merge_adapter_sequence(base, folders, progress=False)
    assert merged.get_base_model().model.multi_modal_projector.spatial_merge_size == 2
    plain = merged.merge_and_unload()
    assert plain.model.multi_modal_projector.spatial_merge_size == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        plain.model.multi_modal_projector.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError, match="linear_1"):  # there are as many of them as experts
        plain.model.multi_modal_projector.linear_1  # noqa: B018


class Several(nn.Module):
    """Returns more than one tensor, one of them with all images' tokens in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor], None]:
        tokens = self.linear(features)
        return tokens, [tokens.flatten(0, 1) ** 2], None


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_projector_that_returns_several_tensors_is_mixed_in_each(top_k: int | None) -> None:
    mixture = mixture_of(Several(), temperature=1.0, top_k=top_k)
    experts = [mixture.experts["task_0"], mixture.experts["task_1"]]
    nn.init.normal_(experts[1].linear.weight)
    mixture.prototypes.copy_(torch.eye(6)[:2])
    features = torch.randn(3, 5, 6) + torch.eye(6)[torch.tensor([0, 1, 0])][:, None]
    weights = mixture.task_weights(features.mean(1))
    tokens, (flat,), nothing = mixture(features)
    outputs = [expert(features) for expert in experts]
    expected = sum(weights[:, t, None, None] * outputs[t][0] for t in range(2))
    squares = sum(weights[:, t, None, None] * outputs[t][1][0].unflatten(0, (3, 5)) for t in range(2))
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(flat, squares.flatten(0, 1))
    assert nothing is None


def test_a_projector_that_returns_no_tensor_says_so() -> None:
    class Name(nn.Module):
        def forward(self, features: Tensor) -> str:
            return "features"

    mixture = mixture_of(Name(), temperature=0.1)
    with pytest.raises(TypeError, match="returned str"):
        mixture(torch.randn(2, 5, 6))


def test_ids_of_tokens_around_images_get_the_mean_of_all_tasks() -> None:
    mixture = mixture_of(nn.Embedding(8, 4), temperature=0.1)
    nn.init.normal_(mixture.experts["task_1"].weight)
    ids = torch.tensor([3, 5])
    expected = (mixture.experts["task_0"](ids) + mixture.experts["task_1"](ids)) / 2
    torch.testing.assert_close(mixture(ids), expected)


def test_gradients_flow_to_the_vision_features() -> None:
    merged = soften(making.merge("llava"))
    inputs = tiny.batch(merged, "llava", mixed_rows("llava"))
    inputs["pixel_values"].requires_grad_()
    merged(**inputs).logits.square().mean().backward()
    gradient = inputs["pixel_values"].grad
    assert gradient is not None
    assert gradient.flatten(1).norm(dim=1).min() > 0


def watch_experts(model: nn.Module, projector: str) -> list[list[tuple[Tensor, Tensor]]]:
    """For each task's projector the features that it is called with from now on, and its outputs."""
    (mixture,) = (part for part in model.get_submodule(projector).modules() if isinstance(part, ProjectorMixture))
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for t in range(len(mixture.experts)):
        calls: list[tuple[Tensor, Tensor]] = []
        mixture.experts[f"task_{t}"].register_forward_hook(
            lambda module, args, output, calls=calls: calls.append((args[0], output))
        )
        seen.append(calls)
    return seen


@family
@pytest.mark.parametrize("tasks", [(0, 1, 2, 1), (1, 1, 0, 1), (2, 2)])
def test_each_image_goes_to_one_projector_and_the_others_rest(family: str, tasks: tuple[int, ...]) -> None:
    merged = soften(making.merge(family), top_k=1)
    images = [picture(family, STYLES[task], number) for number, task in enumerate(tasks)]
    for projector in PROJECTORS[family]:
        alone = []
        for image in images:
            (features, *_), _ = projector_call(merged, projector, tiny.batch(merged, family, [[image]]))
            alone.append(features.flatten(0, -2))
        seen = watch_experts(merged.get_base_model(), projector)
        args, output = projector_call(merged, projector, tiny.batch(merged, family, [images[:1], images[1:]]))
        for task, calls in enumerate(seen):
            own = [rows for rows, other in zip(alone, tasks, strict=True) if other == task]
            assert len(calls) == bool(own)
            if own:
                torch.testing.assert_close(calls[0][0].flatten(0, -2), torch.cat(own), atol=1e-4, rtol=1e-4)
        if len(set(tasks)) == 1:  # a plain call: nothing is copied
            assert seen[tasks[0]][0][0] is args[0]
            assert seen[tasks[0]][0][1] is output


class Merger(nn.Module):
    """Two rows of features become one token, to which a number of the image is added; remembers the rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.rows: list[int] = []

    def forward(self, features: Tensor, sizes: object = None, scale: float = 1.0) -> Tensor:
        self.rows.append(features.shape[:-1].numel())
        merged: Tensor = self.linear(features.reshape(*features.shape[:-2], -1, 12)) * scale
        if sizes is None:
            return merged
        numbers, rows = torch.stack([torch.as_tensor(size) for size in sizes]).T  # type: ignore[attr-defined]
        return merged + numbers.repeat_interleave(rows.long() // 2)[:, None]


SIZES = [[5.0, 2], [-3.0, 4], [7.0, 6]]  # the number, and the rows


def small_mixture(top_k: int | None = 1, template: nn.Module | None = None, trained: str = "yyyy") -> ProjectorMixture:
    """A mixture of random projectors; `trained` says which tasks have one of their own."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        mixture = mixture_of(template or Merger(), trained, temperature=SOFT, top_k=top_k)
        mixture.prototypes.normal_()
        for parameter in mixture.parameters():
            parameter.normal_()
    return mixture


def set_layout(monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], flat: bool = True) -> None:
    layout = ImageRows(torch.tensor(lengths, dtype=torch.int64), flat)
    monkeypatch.setattr(projector_module, "image_rows_of", lambda _: layout)


def patches_of(mixture: ProjectorMixture, tasks: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Rows of images, each near the prototype of one task."""
    noise = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(1))
    return mixture.prototypes[list(tasks)].repeat_interleave(torch.tensor(lengths), dim=0) + 0.1 * noise


def dense(mixture: ProjectorMixture, features: Tensor, *further: object, lengths: Sequence[int] = (2, 4, 6)) -> Tensor:
    """The definition: all projectors on everything."""
    pooled = torch.stack([part.mean(0) for part in features.reshape(-1, 6).split(list(lengths))])
    weights = routing_weights(pooled, mixture.prototypes, mixture.temperature, mixture.top_k)
    mixed = 0
    for t, trained in enumerate(mixture.trained):
        expert = mixture.experts[f"task_{t}"] if trained else mixture.base
        assert expert is not None
        output = expert(features, *further)
        rows = output.shape[:-1].numel()
        shares = weights[:, t].repeat_interleave(torch.tensor(lengths) * rows // sum(lengths))
        mixed = mixed + shares.reshape(*output.shape[:-1], 1) * output
    assert isinstance(mixed, Tensor)
    return mixed


def rows_seen(mixture: ProjectorMixture) -> list[list[int]]:
    seen = [mixture.experts[f"task_{t}"].rows for t in range(len(mixture.trained))]
    return [list(map(int, rows)) for rows in seen]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "further",
    [(), (None, 0.5), (torch.tensor(SIZES), torch.tensor(0.5)), (SIZES,), (tuple(map(torch.tensor, SIZES)), 2)],
    ids=["none", "scalar", "tensor", "list", "tuple"],
)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("leading", [(), (1,)])
def test_arguments_are_cut_to_the_images(
    monkeypatch: pytest.MonkeyPatch, further: tuple[object, ...], named: bool, leading: tuple[int, ...]
) -> None:
    set_layout(monkeypatch, [2, 4, 6])
    mixture = small_mixture()
    features = patches_of(mixture, [2, 0, 2], [2, 4, 6]).reshape(*leading, 12, 6)
    names = ("features", "sizes", "scale")
    mixed = mixture(**dict(zip(names, (features, *further)))) if named else mixture(features, *further)
    assert rows_seen(mixture) == [[4], [], [8], []]
    assert mixed.shape == (*leading, 6, 4)
    torch.testing.assert_close(mixed, dense(mixture, features, *further), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "unclear",
    [{"sizes": SIZES}, SIZES[:2], (12, 6, 6), torch.tensor([12, 6, 6]), torch.tensor(SIZES).T],
    ids=["dict", "fewer", "numbers", "tensor of numbers", "transposed"],
)
def test_arguments_of_unclear_meaning_leave_the_projectors_whole(
    monkeypatch: pytest.MonkeyPatch, unclear: object
) -> None:
    class Careless(Merger):
        def forward(self, features: Tensor, *further: object) -> Tensor:
            return super().forward(features)

    set_layout(monkeypatch, [2, 4, 6])
    mixture = small_mixture(template=Careless())
    features = patches_of(mixture, [2, 0, 2], [2, 4, 6])
    mixed = mixture(features, unclear)
    assert rows_seen(mixture) == [[12], [], [12], []]
    torch.testing.assert_close(mixed, dense(mixture, features), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_features_with_rows_in_two_dimensions_are_left_whole(
    monkeypatch: pytest.MonkeyPatch, top_k: int | None
) -> None:
    set_layout(monkeypatch, [2, 4, 6])
    mixture = small_mixture(top_k)
    features = patches_of(mixture, [2, 0, 1], [2, 4, 6]).reshape(6, 2, 6)
    mixed = mixture(features)
    assert {len(rows) for rows in rows_seen(mixture)} <= {0, 1}
    assert {row for rows in rows_seen(mixture) for row in rows} == {12}
    assert mixed.shape == (6, 1, 4)
    torch.testing.assert_close(mixed, dense(mixture, features), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_tiles_of_one_image_stay_together(monkeypatch: pytest.MonkeyPatch, top_k: int | None) -> None:
    set_layout(monkeypatch, [1, 2, 3], flat=False)
    mixture = small_mixture(top_k)
    features = patches_of(mixture, [2, 0, 2], [2, 4, 6]).reshape(6, 2, 6)
    mixed = mixture(features)
    if top_k == 1:
        assert rows_seen(mixture) == [[4], [], [8], []]
    torch.testing.assert_close(mixed, dense(mixture, features), atol=1e-4, rtol=0)


def test_tasks_without_a_projector_share_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    set_layout(monkeypatch, [2, 4, 6])
    mixture = small_mixture(trained="nyny")
    mixture.base = Merger()
    features = patches_of(mixture, [0, 3, 2], [2, 4, 6])
    mixed = mixture(features)
    assert mixture.base.rows == [8]
    torch.testing.assert_close(mixed, dense(mixture, features), atol=1e-4, rtol=0)
    features = patches_of(mixture, [0, 2, 2], [2, 4, 6])
    assert torch.equal(mixture(features), mixture.base(features))


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_gradients_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, top_k: int | None) -> None:
    set_layout(monkeypatch, [2, 4, 6])
    mixture = small_mixture(top_k)
    features = patches_of(mixture, [2, 0, 2], [2, 4, 6]).requires_grad_()
    sources = [features, *mixture.parameters()]
    found, expected = (
        torch.autograd.grad(output.square().sum(), sources, allow_unused=True, materialize_grads=True)
        for output in (mixture(features), dense(mixture, features))
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_call_without_images_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    set_layout(monkeypatch, [])
    assert small_mixture()(torch.zeros(0, 6)).shape == (0, 4)


def test_broken_features_stay_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    set_layout(monkeypatch, [2, 4, 6])
    mixture = small_mixture()
    features = patches_of(mixture, [2, 0, 2], [2, 4, 6])
    features[3] = torch.nan
    assert mixture(features).isnan().any(1).tolist() == [False, True, True, False, False, False]


def test_outputs_that_cannot_be_told_apart_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Resampler(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features)[:2]

    set_layout(monkeypatch, [4, 4, 4])
    mixture = small_mixture(template=Resampler(6, 4))
    with pytest.raises(RuntimeError, match=r"output for \d of 3 images has shape \(2, 4\).*\[4, 4, 4\]"):
        mixture(patches_of(mixture, [2, 0, 2], [4, 4, 4]))


def test_top_k_is_saved_and_loaded_back(tmp_path: Path) -> None:
    folder, inputs = tmp_path / "merged", tiny.batch(making.shared_base("llava"), "llava", mixed_rows("llava"))
    making.shared_merge("llava").save_pretrained(str(folder))
    config = MAnyConfig.from_pretrained(str(folder))
    assert config.merge.options.top_k is None
    config.merge = replace(config.merge, options=replace(config.merge.options, temperature=SOFT, top_k=1))
    PeftModel.from_pretrained(tiny.build("llava"), str(folder), config=config).save_pretrained(str(folder))
    again = PeftModel.from_pretrained(tiny.build("llava"), str(folder)).eval()
    assert again.peft_config["default"].merge.options.top_k == 1
    expected = logits(soften(making.merge("llava"), top_k=1), inputs)
    torch.testing.assert_close(logits(again, inputs), expected, atol=1e-5, rtol=0)
    assert (logits(soften(making.merge("llava")), inputs) - expected).abs().max() > 1e-2


def test_an_impossible_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`top_k` must be at least 1.*it is 0"):
        MergeOptions(top_k=0)
