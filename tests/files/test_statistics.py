"""The file of statistics: what goes in comes out, and what is damaged is named."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_many.algebra.covariance import DenseCovariance, LowRankCovariance
from peft_many.algebra.sketch import CovarianceAccumulator
from peft_many.algebra.spectrum import Truncation
from peft_many.files.errors import StatisticsError
from peft_many.files.statistics import (
    FORMAT_VERSION,
    STATISTICS_NAME,
    AdapterStatistics,
    InputStatistics,
    TaskStatistics,
    group_by_input,
)
from peft_many.files.stored_covariance import check_covariance
from peft_many.files.stored_features import IMAGE_TOKENS, INSTRUCTIONS, FeatureStatistics, Prompts

WIDTH = 12


def whole(seed: int, width: int = WIDTH, tokens: int = 7) -> DenseCovariance:
    accumulator = CovarianceAccumulator(width)
    accumulator.update(torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)))
    return accumulator.result()


def factored(seed: int, remainder: float = 0.25) -> LowRankCovariance:
    factor = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    return LowRankCovariance(remainder=remainder, factor=factor)


def task(seed: int = 0, **changes) -> TaskStatistics:
    values = {
        "name": f"task {seed}",
        "samples": 5,
        "inputs": {
            "a.q": InputStatistics(whole(seed), 7),
            "b.down": InputStatistics(whole(seed + 1, 6), 7),
            "c.o": InputStatistics(factored(seed), 11),
        },
        "input_of": {"a.q": "a.q", "a.k": "a.q", "b.down": "b.down", "c.o": "c.o"},
        "projectors": {
            "projector": FeatureStatistics(torch.arange(float(WIDTH)) / 3, factored(seed + 2), 4),
            "projector.2": FeatureStatistics(torch.tensor([1e-30]), None, 1),
        },
        "instructions": FeatureStatistics(torch.arange(float(WIDTH)) / 7, factored(seed + 3), 5),
        "prompts": Prompts(
            torch.tensor([[-1, 5, 6], [7, 8, 9]], dtype=torch.int32),
            answer_tokens=4,
            image_tokens=FeatureStatistics(torch.arange(float(WIDTH)) / 5, factored(seed + 4), 6),
        ),
        "projector_shapes": {"projector": {"norm.count": (), "weight": (3, WIDTH)}},
        "fingerprints": {"a.q": [0.1 + 0.2], "c.o": [math.pi, -1.0]},
    }
    return TaskStatistics(**{**values, **changes})


def merged() -> AdapterStatistics:
    lora_A = {"a.q": torch.randn(2, WIDTH), "c.o": torch.randn(1, WIDTH)}
    lora_B = {"c.o": torch.randn(3, 1)}
    return AdapterStatistics((task(0, weight=1 / 3, lora_A=lora_A, lora_B=lora_B), task(9, name=None, weight=0.0)))


def truncated(before: TaskStatistics, truncation: Truncation) -> TaskStatistics:
    inputs = {key: replace(one, covariance=truncation.apply(one.covariance)) for key, one in before.inputs.items()}
    return replace(before, inputs=inputs)


def assert_same(one: AdapterStatistics, two: AdapterStatistics) -> None:
    assert [task.weighed for task in one.tasks] == [task.weighed for task in two.tasks]
    assert len(one.tasks) == len(two.tasks)
    for first, second in zip(one.tasks, two.tasks):
        for field in ("name", "samples", "images", "weight"):
            assert getattr(first, field) == getattr(second, field)
        for mapping in ("fingerprints", "input_of", "inputs", "projectors", "lora_A", "lora_B"):
            assert list(getattr(first, mapping)) == list(getattr(second, mapping))
        assert dict(first.fingerprints) == dict(second.fingerprints)
        assert first.projector_shapes == second.projector_shapes
        assert dict(first.input_of) == dict(second.input_of)
        for key, measured in first.inputs.items():
            assert measured.tokens == second.inputs[key].tokens
            assert_same_covariance(measured.covariance, second.inputs[key].covariance)
        pairs = [(seen, second.projectors[name]) for name, seen in first.projectors.items()]
        ours, theirs = first.prompts, second.prompts
        assert ours.answer_tokens == theirs.answer_tokens
        assert same_bits(ours.ids, theirs.ids)
        more = [(first.instructions, second.instructions), (ours.image_tokens, theirs.image_tokens)]
        for seen, other in [*pairs, *more]:
            assert seen.count == other.count
            assert same_bits(seen.prototype, other.prototype)
            assert_same_covariance(seen.spread, other.spread)
        for mapping in ("lora_A", "lora_B"):
            ours, theirs = getattr(first, mapping), getattr(second, mapping)
            assert all(same_bits(ours[name], theirs[name]) for name in ours)


def assert_same_covariance(one, two) -> None:
    assert type(one) is type(two)
    if one is not None:
        assert one.numbers() == two.numbers()
        assert list(one.tensors()) == list(two.tensors())
        assert all(map(same_bits, one.tensors().values(), two.tensors().values()))


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize(
    "statistics",
    [AdapterStatistics((task(),)), merged(), AdapterStatistics((task(weighed=True),))],
    ids=["single", "merge", "weighed"],
)
def test_what_is_saved_comes_back_to_the_bit(tmp_path, statistics):
    statistics.save(tmp_path)
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME)
    assert_same(loaded, statistics)
    assert loaded.tasks[0].covariance_of("a.q").matrix.dtype == torch.float64
    loaded.save(tmp_path)  # over the file that it is mapped from
    assert_same(AdapterStatistics.load(tmp_path / STATISTICS_NAME), statistics)
    assert_same(loaded, statistics)


def test_layers_that_share_an_input_share_one_tensor(tmp_path):
    AdapterStatistics((task(),)).save(tmp_path)
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME).tasks[0]
    assert loaded.covariance_of("a.q") is loaded.covariance_of("a.k")
    assert loaded.covariance_of("d") is None
    assert [loaded.tokens_of(layer) for layer in ("a.k", "c.o", "d")] == [7, 11, 0]
    covariances = [key for key in load_file(tmp_path / STATISTICS_NAME) if ".covariance." in key]
    assert covariances == ["0.covariance.a.q.matrix", "0.covariance.b.down.matrix", "0.covariance.c.o.factor"]


def test_the_columns_of_many_tasks_are_found_in_one_pass():
    """Layer by layer: adding up the ranks before each task by itself takes a time that grows with their square."""

    class Counted(dict):
        reads = 0

        def __getitem__(self, name):
            Counted.reads += 1
            return super().__getitem__(name)

    tasks = [task(t, lora_A=Counted({"a.q": torch.zeros(t + 1, WIDTH)})) for t in range(30)]
    tasks.insert(3, task(40, lora_A={"c.o": torch.zeros(2, WIDTH)}))
    statistics, start = AdapterStatistics(tuple(tasks)), 0
    for t, one in enumerate(tasks):
        if "a.q" in one.lora_A:
            rank = t + 1 if t < 3 else t
            assert statistics.columns_of(t, "a.q") == slice(start, start + rank)
            start += rank
    assert Counted.reads == 30


def test_layers_are_grouped_by_what_they_read_in_every_task():
    one = {"a.q": "a.q", "a.k": "a.q", "a.v": "a.q", "c.o": "c.o"}
    two = {"a.q": "a.q", "a.k": "a.q", "a.v": "b.down"}
    assert group_by_input(["a.k", "a.q", "a.v", "c.o", "x", "y"], [one, two]) == [
        ["a.k", "a.q"],
        ["a.v"],
        ["c.o"],
        ["x"],  # which nobody measured, as the next
        ["y"],
    ]


def test_it_is_shown_in_a_line_each():
    inputs = InputStatistics(DenseCovariance(0.0, torch.eye(64)), 7)
    task = TaskStatistics("clevr", 5, {"a": inputs}, {"a": "a", "b": "a"})
    assert repr(AdapterStatistics((task,))) == (
        "AdapterStatistics([<TaskStatistics of 'clevr': 5 samples, 0 images, 1 input of 2 layers>])"
    )
    assert "tensor" not in repr(inputs)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_what_was_truncated_is_saved_as_it_is(tmp_path, energy):
    statistics = AdapterStatistics((truncated(task(), Truncation(energy=energy)),))
    statistics.save(tmp_path)
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME)
    assert_same(loaded, statistics)
    for layer in loaded.tasks[0].input_of:
        assert isinstance(loaded.tasks[0].covariance_of(layer), LowRankCovariance)
        assert loaded.tasks[0].covariance_of(layer).factor.dtype == torch.float16
        loaded.tasks[0].covariance_of(layer).check()
    once = (tmp_path / STATISTICS_NAME).read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / STATISTICS_NAME).read_bytes() == once
    tensors = load_file(tmp_path / STATISTICS_NAME)
    assert sum(tensor.nbytes for tensor in tensors.values()) == statistics.tasks[0].nbytes


def test_eight_bits_come_back_to_the_bit_and_are_checked(tmp_path):
    eight = AdapterStatistics((truncated(task(), Truncation(energy=0.9, dtype=torch.int8)),))
    eight.save(tmp_path)
    path, key = tmp_path / STATISTICS_NAME, "0.covariance.a.q"
    assert_same(AdapterStatistics.load(path), eight)
    rewrite(path, {f"{key}.factor": torch.zeros(2, 3)})
    assert_refused(path, f"tensor '{key}.factor'", "float32", "int8")
    eight.save(tmp_path)
    rewrite(path, {f"{key}.column_exponents": None})
    assert_refused(path, f"lacks the tensor '{key}.column_exponents'")
    eight.save(tmp_path)
    rewrite(path, {f"{key}.row_scales": None})
    assert_refused(path, f"tensor '{key}.factor'", "int8", "floating-point")


def test_the_same_statistics_are_the_same_bytes(tmp_path):
    """safetensors writes several metadata entries in random order; 12 files would hardly agree by chance."""
    found = set()
    for _ in range(12):
        merged_twice = AdapterStatistics((task(0), task(5)))
        merged_twice.save(tmp_path)
        found.add((tmp_path / STATISTICS_NAME).read_bytes())
    assert len(found) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux tells it")
def test_loading_is_lazy(tmp_path):
    """Inference loads statistics too if they lie beside the adapter; that must cost neither time nor memory."""
    big = DenseCovariance(remainder=0.0, matrix=torch.eye(2048, dtype=torch.float64))
    inputs = {f"layer.{i}": InputStatistics(big if i == 0 else whole(i), 7) for i in range(3)}
    AdapterStatistics((task(inputs=inputs, input_of={key: key for key in inputs}),)).save(tmp_path)
    before = resident_memory()
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME)
    assert resident_memory() - before < big.matrix.nbytes / 4
    assert loaded.tasks[0].covariance_of("layer.0").trace == 2048
    assert torch.equal(loaded.tasks[0].covariance_of("layer.0").matrix, big.matrix)


def resident_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    AdapterStatistics((task(),)).save(tmp_path)
    before = (tmp_path / STATISTICS_NAME).read_bytes()

    def half(path, announced, metadata):
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_many.files.planned_tensors.lay_out", half)
    with pytest.raises(KeyboardInterrupt):
        merged().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATISTICS_NAME]
    assert (tmp_path / STATISTICS_NAME).read_bytes() == before


def test_the_file_is_readable_like_any_other(tmp_path):
    AdapterStatistics((task(),)).save(tmp_path)
    (tmp_path / "other").write_text("")
    assert (tmp_path / STATISTICS_NAME).stat().st_mode == (tmp_path / "other").stat().st_mode


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def path(tmp_path):
    merged().save(tmp_path)
    return tmp_path / STATISTICS_NAME


def rewrite(path, tensors=None, header=None):
    """Change tensors (None removes one) and the header, which is given as a dictionary."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    content = {**load_file(path), **(tensors or {})}
    if header is not None:
        metadata["peft_many"] = json.dumps(header)
    save_file({key: tensor for key, tensor in content.items() if tensor is not None}, path, metadata)


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["peft_many"])


def assert_refused(path, *words):
    with pytest.raises(StatisticsError) as caught:
        AdapterStatistics.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert re.search(re.escape(word), message), f"{word!r} not in: {message}"


def test_a_missing_file(tmp_path):
    assert_refused(tmp_path / STATISTICS_NAME, "does not exist")


@pytest.mark.parametrize("kept", [0, 4, 8, 40, 0.5, 0.999])
def test_a_truncated_file(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_refused(path, "damaged or truncated")


def test_a_file_of_something_else(path):
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 10)
    assert_refused(path, "damaged or truncated")
    save_file({"a": torch.zeros(1)}, path)
    assert_refused(path, "not a statistics file of peft_many")
    save_file({"a": torch.zeros(1)}, path, {"peft_many": "{not json"})
    assert_refused(path, "not a statistics file of peft_many")
    save_file({"a": torch.zeros(1)}, path, {"peft_many": "[]"})
    assert_refused(path, "not a statistics file of peft_many")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_format_version(path, version):
    rewrite(path, header={**header_of(path), "version": version})
    assert_refused(path, f"format {version}", f"format {FORMAT_VERSION}", "upgrade")


TENSORS = [
    "0.covariance.a.q.matrix",
    "0.covariance.c.o.factor",
    "0.spread.projector.factor",
    "0.prototype.projector",
    "0.lora_A.c.o",
    "0.lora_B.c.o",
    f"0.prototype.{IMAGE_TOKENS}",
]


@pytest.mark.parametrize("key", TENSORS)
def test_a_missing_tensor(path, key):
    rewrite(path, {key: None})
    assert_refused(path, "lacks the tensor", key.removesuffix(".matrix"))


@pytest.mark.parametrize("key", TENSORS)
def test_a_tensor_of_another_dtype_or_shape(path, key):
    tensor = load_file(path)[key]
    rewrite(path, {key: tensor.to(torch.int32)})
    assert_refused(path, f"tensor '{key}'", "int32")
    rewrite(path, {key: tensor[None]})
    assert_refused(path, f"tensor '{key}'", str(tuple(tensor[None].shape)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prototype_that_is_not_finite(path, bad):
    rewrite(path, {"0.prototype.projector": torch.tensor([0.0, bad])})
    assert_refused(path, "'0.prototype.projector'", "NaN or Inf")


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header["tasks"][0].pop("inputs"),
        lambda header: header["tasks"][0].update(inputs=3),
        lambda header: header["tasks"][0]["inputs"]["a.q"].update(tokens="many"),
        lambda header: header["tasks"][0]["inputs"]["a.q"].pop("remainder"),
        lambda header: header["tasks"][0].update(fingerprints=[1, 2]),
        lambda header: header["tasks"][0].update(projector_shapes=[1.5]),
        lambda header: header["tasks"][0]["projector_shapes"].update(projector=3),
        lambda header: header["tasks"][0]["projector_shapes"]["projector"].update(weight="wide"),
        lambda header: header["tasks"][0].update(input_of=["a.q"]),
        lambda header: header["tasks"][0]["input_of"].update(x=["a.q"]),
        lambda header: header["tasks"][0].update(lora_A=1.5),
        lambda header: header["tasks"][0].update(projectors=[1.5]),
        lambda header: header["tasks"][0]["projectors"].update(projector=1.5),
        lambda header: header["tasks"][0]["projectors"]["projector"].update(images=None),
        lambda header: header["tasks"][0].update(instructions=[1.5]),
        lambda header: header["tasks"][0]["instructions"].update(count=None),
        lambda header: header["tasks"][0].update(weight=None),
        lambda header: header.update(tasks=7),
        lambda header: header.update(tasks=["x"]),
    ],
)
def test_a_damaged_header(path, damage):
    header = header_of(path)
    damage(header)
    rewrite(path, header=header)
    assert_refused(path, f"not a statistics file of format {FORMAT_VERSION}")


def test_a_file_of_before_instructions_were_measured(path):
    header = header_of(path)
    before = AdapterStatistics.load(path)
    for one in header["tasks"]:
        del one["instructions"]
        assert all(set(about) == {"images", "spread"} for about in one["projectors"].values())
    rewrite(path, header=header)
    found = AdapterStatistics.load(path)
    assert [one.instructions for one in found.tasks] == [None] * len(before.tasks)
    assert [one.images for one in found.tasks] == [one.images for one in before.tasks]


def test_a_layer_that_reads_an_input_that_is_not_there(path):
    header = header_of(path)
    header["tasks"][0]["input_of"]["a.k"] = "elsewhere"
    rewrite(path, header=header)
    assert_refused(path, "'a.k'")


def test_a_spread_of_another_width_than_its_prototype(path):
    rewrite(path, {"0.prototype.projector": torch.zeros(5)})
    assert_refused(path, "spread of the images at 'projector' has width 12, and their prototype 5")
    rewrite(path, {"0.prototype.projector": torch.zeros(12), f"0.prototype.{INSTRUCTIONS}": torch.zeros(5)})
    assert_refused(path, "spread of the instructions has width 12, and their prototype 5")
    rewrite(path, {f"0.prototype.{INSTRUCTIONS}": torch.zeros(12), f"0.prototype.{IMAGE_TOKENS}": torch.zeros(5)})
    assert_refused(path, "spread of the image tokens has width 12, and their prototype 5")


@pytest.mark.parametrize("ids", [[[-1, -1], [1, 2]], [[-2, 1]], [[]], [[1, -1, 2]], [[1, -1]]])
def test_prompts_that_are_none(path, ids):
    rewrite(path, {"0.prompts": torch.tensor(ids, dtype=torch.int32)})
    assert_refused(path, "tensor '0.prompts' holds no prompts")


@pytest.mark.parametrize("tokens", [0, -1, 10**9])
def test_answers_of_a_length_that_nobody_waits_for(path, tokens):
    header = header_of(path)
    header["tasks"][0]["prompts"]["answer_tokens"] = tokens
    rewrite(path, header=header)
    assert_refused(path, f"{tokens} tokens long")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, "-inf"])
def test_a_weight_that_is_none(path, weight):
    header = header_of(path)
    header["tasks"][0]["weight"] = weight
    rewrite(path, header=header)
    assert_refused(path, "weights must be finite and not negative")


def asymmetric(matrix: Tensor) -> Tensor:
    matrix[0, 1] += 1.0
    return matrix


def negative(matrix: Tensor) -> Tensor:
    return matrix - 5 * torch.eye(len(matrix), dtype=matrix.dtype)


def not_a_number(matrix: Tensor) -> Tensor:
    matrix[2, 2] = math.nan
    return matrix


@pytest.mark.parametrize(
    ("damage", "reason"), [(asymmetric, "not symmetric"), (negative, "negative"), (not_a_number, "NaN or Inf")]
)
def test_numbers_that_are_no_covariance(damage, reason):
    broken = DenseCovariance(remainder=0.0, matrix=damage(whole(0).matrix.clone()))
    with pytest.raises(StatisticsError, match=f"^x: the covariance of 'a.q' is not a covariance: .*{reason}"):
        check_covariance(broken, "x: the covariance of 'a.q'")


@pytest.mark.parametrize("remainder", [-0.1, math.nan, math.inf])
def test_a_remainder_that_is_no_energy(path, remainder):
    header = header_of(path)
    header["tasks"][0]["inputs"]["c.o"]["remainder"] = remainder
    rewrite(path, header=header)
    covariance = AdapterStatistics.load(path).tasks[0].covariance_of("c.o")
    with pytest.raises(StatisticsError, match="remainder"):
        check_covariance(covariance, "'c.o'")


@pytest.mark.parametrize("tokens", [0, False, "", {}, []])
def test_image_tokens_that_are_nothing_in_another_way(path, tokens):
    header = header_of(path)
    header["tasks"][0]["prompts"]["image_tokens"] = tokens
    rewrite(path, header=header)
    with pytest.raises(StatisticsError):
        AdapterStatistics.load(path)


@pytest.mark.parametrize("count", [0, -8, 10**400])
def test_a_mean_of_no_number_of_features(path, count):
    untouched = header_of(path)
    for change in (lambda task: task["projectors"]["projector"], lambda task: task["prompts"]["image_tokens"]):
        header = json.loads(json.dumps(untouched))
        about = change(header["tasks"][0])
        about["images" if "images" in about else "count"] = count
        rewrite(path, header=header)
        assert_refused(path, f"the mean of {count}")
