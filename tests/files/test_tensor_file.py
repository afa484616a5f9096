"""Safetensors files that are mapped and written in place: the library reads what is written, and it the library's."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_many.files.tensor_file import TensorFile, TensorFileWriter, bytes_of, lay_out

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits at all, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


tensors = st.builds(
    random_tensor,
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.integers(0, 2**31),
)
keys = st.one_of(
    st.lists(st.sampled_from(["model", "layers", "0", "q_proj", "größe", "层", "🙂"]), min_size=1).map(".".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
texts = st.text(st.characters(exclude_categories=["Cs"]))
contents = st.dictionaries(keys.filter(lambda key: key != "__metadata__"), tensors, max_size=6)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and bytes(bytes_of(one)) == bytes(bytes_of(two))


def assert_holds(found, content: dict[str, Tensor]) -> None:
    assert set(found) == set(content)
    for key, tensor in content.items():
        assert same_bits(found[key], tensor), key


def write(path: Path, content: dict[str, Tensor], order=None, metadata=None) -> Path:
    lay_out(path, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in content.items()}, metadata)
    with TensorFileWriter(path) as writer:
        for key in order if order is not None else content:
            writer.write(key, content[key])
    return path


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A path where no file has been; hypothesis runs a test many times."""
    root = tmp_path_factory.mktemp("files")
    return lambda: Path(tempfile.mkdtemp(dir=root)) / "file.safetensors"


# ------------------------------------------------------------------------------------------------- there and back


@given(contents, st.dictionaries(texts, texts, max_size=3), st.data())
def test_the_library_reads_what_is_written_in_any_order(fresh, content, metadata, data):
    order = data.draw(st.permutations(list(content)))
    path = write(fresh(), content, order, metadata)
    assert_holds(load_file(path), content)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata
        assert_holds({key: file.get_tensor(key) for key in file.keys()}, content)  # noqa: SIM118
    assert_holds(TensorFile(path), content)
    assert TensorFile(path).metadata == metadata


@given(contents, st.dictionaries(texts, texts, max_size=3))
def test_what_the_library_writes_is_read(fresh, content, metadata):
    path = fresh()
    save_file(content, path, metadata or None)  # no tensors and an empty dictionary are too little for the library
    file = TensorFile(path)
    assert_holds(file, content)
    assert file.metadata == metadata
    assert len(file) == len(content)
    for key, tensor in content.items():
        assert key in file
        assert file.shape(key) == tuple(tensor.shape)
        assert file.dtype(key) == tensor.dtype
    assert "no such key" not in file
    with pytest.raises(KeyError):
        file["no such key"]


@given(contents, st.data())
def test_equal_content_is_equal_bytes(fresh, content, data):
    paths = []
    for _ in range(2):
        announced = data.draw(st.permutations(list(content)))
        order = data.draw(st.permutations(list(content)))
        paths.append(write(fresh(), {key: content[key] for key in announced}, order, {"one": "1", "two": "2"}))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@given(contents)
def test_data_begins_where_its_dtype_wants_it(fresh, content):
    path = write(fresh(), content)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for key, about in header.items():
        assert (8 + length + about["data_offsets"][0]) % content[key].dtype.itemsize == 0


@given(contents, st.data())
def test_several_writers_at_once_do_not_disturb_each_other(fresh, content, data):
    path = fresh()
    lay_out(path, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in content.items()})
    with TensorFileWriter(path) as one, TensorFileWriter(path) as two:
        for key in data.draw(st.permutations(list(content))):
            data.draw(st.sampled_from([one, two])).write(key, content[key])
    assert_holds(load_file(path), content)


def test_what_was_written_can_be_read_and_the_rest_is_zero(tmp_path):
    path = tmp_path / "file"
    lay_out(path, {"written": (torch.float32, (3,)), "not yet": (torch.int16, (2, 2))})
    assert all(not tensor.any() for tensor in TensorFile(path).values())
    with TensorFileWriter(path) as writer:
        writer.write("written", torch.arange(3.0))
    assert torch.equal(TensorFile(path)["written"], torch.arange(3.0))
    assert torch.equal(load_file(path)["not yet"], torch.zeros(2, 2, dtype=torch.int16))


def test_views_are_written_as_they_look(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    content = {
        "transposed": matrix.T,
        "column": matrix[:, 1],
        "expanded": torch.ones(1).expand(2, 2),
        "trained": torch.nn.Parameter(matrix[1:, ::2]),
    }
    assert_holds(load_file(write(tmp_path / "file", content)), content)


def test_laying_out_replaces_what_was_there(tmp_path):
    write(tmp_path / "file", {"long": torch.ones(1000)})
    assert_holds(load_file(write(tmp_path / "file", {"short": torch.ones(1)})), {"short": torch.ones(1)})


@pytest.mark.parametrize("wrong", [torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, 1), torch.ones(2, 3).double()])
def test_another_shape_or_dtype_than_announced_is_refused(tmp_path, wrong):
    path = write(tmp_path / "file", {"model.q": torch.zeros(2, 3), "other": torch.arange(5)})
    before = path.read_bytes()
    with TensorFileWriter(path) as writer, pytest.raises(ValueError, match=r"'model\.q' is .* \(2, 3\) was announced"):
        writer.write("model.q", wrong)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------- the mapping


def test_a_file_that_is_deleted_or_replaced_stays_readable(tmp_path):
    content = {"a": torch.randn(50_000), "b": torch.arange(7)}
    write(tmp_path / "replaced", content)
    write(tmp_path / "deleted", content)
    files = [TensorFile(tmp_path / name) for name in ("replaced", "deleted")]
    early = [file["a"] for file in files]
    write(tmp_path / "new", {"a": torch.zeros(50_000)})
    os.replace(tmp_path / "new", tmp_path / "replaced")
    (tmp_path / "deleted").unlink()
    for file, tensor in zip(files, early):
        for _ in range(2):
            assert_holds(file, content)
            assert torch.equal(tensor, content["a"])
            file.release()
    assert not TensorFile(tmp_path / "replaced")["a"].any()


def test_a_tensor_outlives_its_file_object(tmp_path):
    content = {"a": torch.randn(5000)}
    tensor = TensorFile(write(tmp_path / "file", content))["a"]
    gc.collect()
    assert torch.equal(tensor, content["a"])


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux tells it")
def test_released_memory_goes_back(tmp_path):
    size = 64 * 2**20
    path = write(tmp_path / "file", {"a": torch.ones(size // 8), "b": torch.ones(size // 8)})
    file = TensorFile(path)
    before = resident_of_files()
    tensors = [file["a"], file["b"]]
    assert resident_of_files() - before < size / 8  # nothing is read yet
    for _ in range(2):
        assert [tensor.sum().item() for tensor in tensors] == [size / 8] * 2
        assert resident_of_files() - before > size * 0.8
        file.release()
        assert resident_of_files() - before < size / 8


def resident_of_files() -> int:
    """The mapped pages that are in memory, the process's share of them."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor)), Tensor.clone])
def test_a_copy_is_independent(tmp_path, copied):
    content = {"a": torch.randn(40), "large": torch.ones(100_000)}
    path = write(tmp_path / "file", content)
    file = TensorFile(path)
    copy_ = copied(file["a"])
    assert torch.equal(copy_, content["a"])
    copy_.zero_()
    assert_holds(file, content)
    assert_holds(load_file(path), content)
    assert len(pickle.dumps(file["a"])) < 5000  # not the whole file


# ----------------------------------------------------------------------------------------------------- damaged files


def craft(path: Path, header: dict | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), start: int = 0, end: int = 8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@given(contents.filter(bool), st.data())
def test_a_file_that_was_cut_or_grew_is_refused(fresh, content, data):
    path = write(fresh(), content)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:cut], whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(SafetensorError):
            TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"not json",
        {"a": entry(end=16)},
        {"a": entry(start=4, end=12)},
        {"a": entry(start=-4, end=4)},
        {"a": entry(), "b": entry()},
        {"a": entry(shape=(3,))},
        {"a": entry(shape=(2**62, 4))},
        {"a": entry(dtype="F128")},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": entry(), "__metadata__": {"number": 1}},
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    with pytest.raises(SafetensorError):
        TensorFile(craft(tmp_path / "file", header, bytes(8)))


def test_the_library_refuses_no_header_that_is_crafted_rightly(tmp_path):
    """So that what is refused above is refused for its damage."""
    assert torch.equal(TensorFile(craft(tmp_path / "file", {"a": entry()}, bytes(8)))["a"], torch.zeros(2))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        TensorFile(tmp_path / "file")


def test_data_that_other_writers_did_not_align_is_read(tmp_path):
    content = torch.randn(6, dtype=torch.float64)
    for length in range(8):
        header = json.dumps({"a": entry("F64", (6,), end=48)}).encode() + b" " * length
        tensor = TensorFile(craft(tmp_path / str(length), header, bytes(bytes_of(content))))["a"]
        assert torch.equal(tensor, content)
        assert torch.equal(tensor.float() @ tensor.float(), content.float() @ content.float())


@pytest.mark.parametrize(
    ("name", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("U16", 2), ("U32", 4), ("U64", 8), ("C64", 8)]
)
def test_a_dtype_that_nothing_here_uses_is_an_error_on_access(tmp_path, name, size):
    header = {"odd": entry(name, (2,), 0, 2 * size), "a": entry("U8", (1,), 2 * size, 2 * size + 1)}
    file = TensorFile(craft(tmp_path / "file", header, bytes(2 * size) + b"\7"))
    assert file["a"].item() == 7
    assert file.shape("odd") == (2,)
    for access in (file.dtype, file.__getitem__):
        with pytest.raises(TypeError, match=f"'odd' has the unknown dtype {name}"):
            access("odd")


def test_a_pointer_of_git_lfs_is_called_so(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(SafetensorError, match="git lfs pull"):
        TensorFile(path)


def test_a_piece_is_the_middle_of_a_tensor(tmp_path):
    tensors = {"a": torch.arange(100, dtype=torch.uint8), "b": torch.arange(3, dtype=torch.uint8), "c": torch.ones(0)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert [file.piece(key, 4) for key in "abc"] == [bytes([48, 49, 50, 51]), bytes([0, 1, 2]), b""]
