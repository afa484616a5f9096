"""Regular expressions of configs: what is looked up without them is what PEFT finds with them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key

from peft_many import merge_adapter_files, merge_adapter_sequence
from peft_many.files import patterns
from peft_many.files.errors import MalformedAdapterError
from peft_many.files.patterns import ByPattern, check_patterns
from tests.adapters import base, make

DEFAULT = r"model\.language_model\..*\b(?:down_proj|q_proj|v_proj)"

parts = st.sampled_from(["model", "layers", "0", "1", "10", "q_proj", "proj", "my-layer"])
layers = st.lists(parts, min_size=1, max_size=5).map(".".join)
names = layers.map(lambda layer: layer.replace(".", r"\.").replace("my-layer", r"my\-layer"))
others = st.one_of(layers, layers.map(lambda layer: f"^{layer}"), st.sampled_from([r".*proj", r"(q|v)_proj", r"\d+"]))


@given(st.lists(names, max_size=5), layers)
def test_names_are_found_as_peft_finds_them(keys, layer):
    assert_same(keys, layer)


@given(st.lists(st.one_of(names, others), max_size=5), layers)
def test_so_is_everything_else(keys, layer):
    assert_same(keys, layer)


def assert_same(keys, layer):
    pattern = {key: place for place, key in enumerate(keys)}
    assert ByPattern(pattern, -1)[layer] == pattern.get(get_pattern_key(pattern, layer), -1)


def test_a_config_without_patterns_says_the_same_of_all_layers():
    assert ByPattern(None, 8)["layers.0"] == ByPattern({}, 8)["layers.0"] == 8


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.0\.q_proj", "layers.0", "^model.layers.0.q_proj$", DEFAULT])
def test_names_and_the_default_need_no_process_of_their_own(monkeypatch, pattern):
    monkeypatch.setattr(patterns.sys, "executable", "/there/is/none")
    check_patterns(LoraConfig(rank_pattern={pattern: 2}, target_modules=pattern), ["layers.0.q_proj"], "x")
    with pytest.raises(MalformedAdapterError, match="no process can be started"):
        check_patterns(LoraConfig(target_modules="(.*)*x"), ["layers.0.q_proj"], "x")


LONG = f".*({'|'.join(['a'] * 200)})b"  # a thousand times as slow


@pytest.mark.parametrize(
    "pattern", [".*(a|b)(a|b)", ".*a.*", "(a|b)*", "a+", r"a\.*b", r"a\\.*", ".*(a|.*)", "[", "(", LONG]
)
def test_others_are_tried(monkeypatch, pattern):
    monkeypatch.setattr(patterns.sys, "executable", "/there/is/none")
    with pytest.raises(MalformedAdapterError, match="no process can be started"):
        check_patterns(LoraConfig(target_modules=pattern), ["layers.0.q_proj"], "x")


def test_merging_files_asks_only_for_ranks():
    check_patterns(LoraConfig(target_modules="["), ["layers.0.q_proj"], "x", only_ranks=True)
    with pytest.raises(MalformedAdapterError, match=r"x: .*unterminated character set"):
        check_patterns(LoraConfig(target_modules="["), ["layers.0.q_proj"], "x")


def test_unusual_ones_are_tried_once(monkeypatch, tmp_path):
    """Each trial starts a process."""
    tried, run = [], patterns.subprocess.run
    monkeypatch.setattr(patterns.subprocess, "run", lambda *args, **kwargs: tried.append(args) or run(*args, **kwargs))
    usual = make(tmp_path / "usual", seed=0).folder
    unusual = make(tmp_path / "unusual", seed=1, target_modules=r".*language_model.*\.(q|v)_proj").folder
    PeftModel.from_pretrained(base("llava"), usual)
    merge_adapter_files([usual, unusual], tmp_path / "merged", progress=False)
    assert not tried
    PeftModel.from_pretrained(base("llava"), unusual)
    assert len(tried) == 1
    merge_adapter_sequence(base("llava"), [unusual], progress=False)
    assert len(tried) == 2
