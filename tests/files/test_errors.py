"""Messages about other people's files are one printable line."""

import json
import pickle

import pytest

from peft_many import merge_adapter_files
from peft_many.files.errors import AdapterFileError, MalformedAdapterError, StatisticsError, UnmergeableAdapterError
from tests.adapters import make

HOSTILE = "a\nb\x1b[2J\x00\u2028\ud800\t"


@pytest.mark.parametrize("kind", [AdapterFileError, StatisticsError, UnmergeableAdapterError, MalformedAdapterError])
def test_what_cannot_be_printed_is_escaped(kind):
    error = kind(f"größe 🙂 {HOSTILE}")
    assert str(error) == r"größe 🙂 a\nb\x1b[2J\x00\u2028\ud800\t"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_name_in_a_file_cannot_write_to_the_terminal(tmp_path):
    make(tmp_path / "a", "llama", r=2)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "\x1b[2J"}))
    with pytest.raises(UnmergeableAdapterError) as error:
        merge_adapter_files([tmp_path / "a"], tmp_path / "merged", progress=False)
    assert r"\x1b[2J" in str(error.value)
    assert str(error.value).isprintable()
