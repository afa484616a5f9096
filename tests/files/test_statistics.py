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

from peft_many import merge_adapter_files
from peft_many.algebra.covariance import CovarianceAccumulator, DenseCovariance, LowRankCovariance
from peft_many.algebra.spectrum import truncate
from peft_many.files.statistics import (
    FORMAT_VERSION,
    STATISTICS_NAME,
    AdapterStatistics,
    StatisticsError,
    TaskStatistics,
    check_covariance,
)
from tests.adapters import WEIGHTS, make

WIDTH = 12


def whole(seed: int, width: int = WIDTH, tokens: int = 7) -> DenseCovariance:
    accumulator = CovarianceAccumulator(width)
    accumulator.update(torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)))
    return accumulator.result()


def factored(seed: int, remainder: float = 0.25) -> LowRankCovariance:
    factor = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    return LowRankCovariance(remainder=remainder, tokens=11, factor=factor)


def task(seed: int = 0, **changes) -> TaskStatistics:
    shared = whole(seed)
    values = {
        "name": f"task {seed}",
        "samples": 5,
        "images": 4,
        "covariances": {"a.q": shared, "a.k": shared, "b.down": whole(seed + 1, 6), "c.o": factored(seed)},
        "prototypes": {"projector": torch.arange(4.0) / 3, "projector.2": torch.tensor([1e-30])},
        "fingerprints": {"a.q": [0.1 + 0.2], "c.o": [math.pi, -1.0]},
    }
    return TaskStatistics(**{**values, **changes})


def merged() -> AdapterStatistics:
    deltas = {"a.q": torch.randn(2, WIDTH), "c.o": torch.randn(1, WIDTH)}
    return AdapterStatistics((task(0, weight=1 / 3, deltas=deltas), task(9, name=None, weight=0.0, deltas={})))


def assert_same(one: AdapterStatistics, two: AdapterStatistics) -> None:
    assert len(one.tasks) == len(two.tasks)
    for first, second in zip(one.tasks, two.tasks):
        for field in ("name", "samples", "images", "weight"):
            assert getattr(first, field) == getattr(second, field)
        assert dict(first.fingerprints) == dict(second.fingerprints)
        assert list(first.covariances) == list(second.covariances)
        for module, covariance in first.covariances.items():
            assert_same_covariance(covariance, second.covariances[module])
        for mapping in ("prototypes", "deltas"):
            ours, theirs = getattr(first, mapping), getattr(second, mapping)
            assert list(ours) == list(theirs)
            assert all(same_bits(ours[name], theirs[name]) for name in ours)


def assert_same_covariance(one, two) -> None:
    assert type(one) is type(two)
    assert (one.tokens, one.remainder) == (two.tokens, two.remainder)
    name = "matrix" if isinstance(one, DenseCovariance) else "factor"
    assert same_bits(getattr(one, name), getattr(two, name))


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("statistics", [AdapterStatistics((task(),)), merged()], ids=["single", "merge"])
def test_energy_one_comes_back_to_the_bit(tmp_path, statistics):
    statistics.save(tmp_path, energy=1.0)
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME)
    assert_same(loaded, statistics)
    assert loaded.tasks[0].covariances["a.q"].matrix.dtype == torch.float64
    loaded.save(tmp_path, energy=1.0)  # over the file that it is mapped from
    assert_same(AdapterStatistics.load(tmp_path / STATISTICS_NAME), statistics)
    assert_same(loaded, statistics)


def test_layers_that_share_an_input_share_one_tensor(tmp_path):
    AdapterStatistics((task(),)).save(tmp_path, energy=1.0)
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME).tasks[0]
    assert loaded.covariances["a.q"] is loaded.covariances["a.k"]
    assert [modules for _, modules in loaded.groups()] == [["a.q", "a.k"], ["b.down"], ["c.o"]]
    assert sum(".covariance." in key for key in load_file(tmp_path / STATISTICS_NAME)) == 3


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_truncation_keeps_the_trace_and_the_energy(tmp_path, energy):
    statistics = AdapterStatistics((task(),))
    statistics.save(tmp_path, energy)
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME).tasks[0].covariances
    for module, before in statistics.tasks[0].covariances.items():
        after = loaded[module]
        assert isinstance(after, LowRankCovariance)
        assert after.tokens == before.tokens
        assert after.trace == pytest.approx(before.trace, rel=1e-3)  # rounded to float16
        after.check()
        if isinstance(before, DenseCovariance):
            assert after.factor.dtype == torch.float16
            eigenvalues = torch.linalg.eigvalsh(before.dense()).flip(0)
            kept = len(after.factor)
            assert eigenvalues[:kept].sum() >= energy * before.trace
            assert eigenvalues[: kept - 1].sum() < energy * before.trace
            assert torch.allclose(torch.linalg.eigvalsh(after.dense()).flip(0)[:kept], eigenvalues[:kept], rtol=3e-3)
    assert_same_covariance(loaded["c.o"], statistics.tasks[0].covariances["c.o"])  # truncated before: as it was


def test_eight_bits_come_back_to_the_bit_and_are_checked(tmp_path):
    before = task()
    eight = {module: truncate(covariance, 0.9).in_eight_bits() for module, covariance in before.covariances.items()}
    AdapterStatistics((replace(before, covariances=eight),)).save(tmp_path, 0.5)
    path = tmp_path / STATISTICS_NAME
    for module, covariance in AdapterStatistics.load(path).tasks[0].covariances.items():
        assert_same_covariance(covariance, eight[module])
        assert all(same_bits(*pair) for pair in zip(covariance.scales, eight[module].scales))
    rewrite(path, {"0.covariance.0.factor": torch.zeros(2, 3)})
    assert_refused(path, "tensor '0.covariance.0.factor'", "float32", "int8")
    AdapterStatistics((replace(before, covariances=eight),)).save(tmp_path, 0.5)
    rewrite(path, {"0.covariance.0.column_exponents": None})
    assert_refused(path, "lacks the tensor '0.covariance.0.column_exponents'")
    AdapterStatistics((replace(before, covariances=eight),)).save(tmp_path, 0.5)
    rewrite(path, {"0.covariance.0.row_scales": None})
    assert_refused(path, "tensor '0.covariance.0.factor'", "int8", "floating-point")


def test_truncating_twice_changes_nothing_more(tmp_path):
    AdapterStatistics((task(),)).save(tmp_path, 0.9)
    once = (tmp_path / STATISTICS_NAME).read_bytes()
    AdapterStatistics.load(tmp_path / STATISTICS_NAME).save(tmp_path, 0.5)
    assert (tmp_path / STATISTICS_NAME).read_bytes() == once


def test_the_same_statistics_are_the_same_bytes(tmp_path):
    """safetensors writes several metadata entries in random order; 12 files would hardly agree by chance."""
    found = set()
    for _ in range(12):
        merged_twice = AdapterStatistics((task(0), task(5)))
        merged_twice.save(tmp_path, energy=1.0)
        found.add((tmp_path / STATISTICS_NAME).read_bytes())
    assert len(found) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux tells it")
def test_loading_is_lazy(tmp_path):
    """Inference loads statistics too if they lie beside the adapter; that must cost neither time nor memory."""
    big = DenseCovariance(remainder=0.0, tokens=1, matrix=torch.eye(2048, dtype=torch.float64))
    AdapterStatistics((task(covariances={f"layer.{i}": big if i == 0 else whole(i) for i in range(3)}),)).save(
        tmp_path, energy=1.0
    )
    before = resident_memory()
    loaded = AdapterStatistics.load(tmp_path / STATISTICS_NAME)
    assert resident_memory() - before < big.matrix.nbytes / 4
    assert loaded.tasks[0].covariances["layer.0"].trace == 2048
    assert torch.equal(loaded.tasks[0].covariances["layer.0"].matrix, big.matrix)


def resident_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    AdapterStatistics((task(),)).save(tmp_path)
    before = (tmp_path / STATISTICS_NAME).read_bytes()

    def half(path, announced, metadata):
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_many.files.statistics.lay_out", half)
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
    merged().save(tmp_path, energy=1.0)
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


@pytest.mark.parametrize(
    "key", ["0.covariance.0.matrix", "0.covariance.2.factor", "0.prototype.projector", "0.lora_A.c.o"]
)
def test_a_missing_tensor(path, key):
    rewrite(path, {key: None})
    assert_refused(path, "lacks the tensor", key.removesuffix(".matrix"))


@pytest.mark.parametrize(
    "key", ["0.covariance.0.matrix", "0.covariance.2.factor", "0.prototype.projector", "0.lora_A.c.o"]
)
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
        lambda header: header["tasks"][0].pop("covariances"),
        lambda header: header["tasks"][0].update(covariances=3),
        lambda header: header["tasks"][0]["covariances"][0].update(tokens="many"),
        lambda header: header["tasks"][0]["covariances"][0].pop("remainder"),
        lambda header: header["tasks"][0].update(fingerprints=[1, 2]),
        lambda header: header["tasks"][0]["covariances"][0].update(modules=[None]),
        lambda header: header["tasks"][0].update(projectors=[1.5]),
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
    broken = DenseCovariance(remainder=0.0, tokens=3, matrix=damage(whole(0).matrix.clone()))
    with pytest.raises(StatisticsError, match=f"^x: the covariance of 'a.q' is not a covariance: .*{reason}"):
        check_covariance(broken, "x: the covariance of 'a.q'")


@pytest.mark.parametrize("remainder", [-0.1, math.nan, math.inf])
def test_a_remainder_that_is_no_energy(path, remainder):
    header = header_of(path)
    header["tasks"][0]["covariances"][2]["remainder"] = remainder
    rewrite(path, header=header)
    covariance = AdapterStatistics.load(path).tasks[0].covariances["c.o"]
    with pytest.raises(StatisticsError, match="remainder"):
        check_covariance(covariance, "'c.o'")


# ------------------------------------------------------------------------------------------- files of format 1


def as_format_1(path) -> None:
    """Rewrite a file as the first release wrote it: float32 factors, which had no scale, and no `lora_B`."""
    header, tensors = header_of(path), load_file(path)
    for t, described in enumerate(header["tasks"]):
        assert described.pop("lora_B") == []
        for g, group in enumerate(described["covariances"]):
            if "scale" in group:
                key = f"{t}.covariance.{g}.factor"
                tensors[key] = tensors[key].float() * group.pop("scale")
    assert not any(word in json.dumps(header) for word in ("scale", "lora_B"))
    save_file(tensors, path, {"peft_many": json.dumps({**header, "version": 1})})


@pytest.mark.parametrize("energy", [0.9, 1.0])
def test_a_file_of_format_1_is_read(tmp_path, energy):
    merged().save(tmp_path, energy)
    path = tmp_path / STATISTICS_NAME
    now = AdapterStatistics.load(path)
    as_format_1(path)
    before = AdapterStatistics.load(path)
    for old, new in zip(before.tasks, now.tasks):
        assert old.lora_B == {}
        assert (old.name, old.weight, old.fingerprints) == (new.name, new.weight, new.fingerprints)
        assert [modules for _, modules in old.groups()] == [modules for _, modules in new.groups()]
        for module, covariance in new.covariances.items():
            found = old.covariances[module]
            assert getattr(found, "scale", 1.0) == 1.0
            assert (found.tokens, found.remainder) == (covariance.tokens, covariance.remainder)
            assert torch.equal(found.dense(), covariance.dense())
            check_covariance(found, module)
        for mapping in ("prototypes", "deltas"):
            ours, theirs = getattr(old, mapping), getattr(new, mapping)
            assert list(ours) == list(theirs)
            assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_a_file_of_format_1_is_saved_in_todays(tmp_path):
    AdapterStatistics((task(),)).save(tmp_path, 0.9)
    path = tmp_path / STATISTICS_NAME
    as_format_1(path)
    loaded = AdapterStatistics.load(path)
    loaded.save(tmp_path)
    assert header_of(path)["version"] == FORMAT_VERSION == FORMAT_VERSION
    assert_same(AdapterStatistics.load(path), loaded)


def test_adapters_of_format_1_are_merged_and_merges_of_it_further(tmp_path):
    """The numbers are the same, so the merge is."""
    made = [
        make(tmp_path / name, "llama", seed, task_name=name, energy=0.99).folder for seed, name in enumerate("abc")
    ]
    first = merge_adapter_files(made[:2], tmp_path / "first", progress=False)
    expected = [load_file(merge_adapter_files(made, tmp_path / "at once", progress=False) / WEIGHTS)]
    expected.append(load_file(first / WEIGHTS))
    for folder in (*made, first):
        as_format_1(folder / STATISTICS_NAME)
    further = merge_adapter_files([first, made[2]], tmp_path / "further", progress=False)
    again = merge_adapter_files(made[:2], tmp_path / "again", progress=False)
    for folder, tensors in zip((further, again), expected):
        found = load_file(folder / WEIGHTS)
        assert list(found) == list(tensors)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert header_of(further / STATISTICS_NAME)["version"] == FORMAT_VERSION
