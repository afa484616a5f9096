"""Each family does what the table in the documentation says of it; `python scripts/coverage.py` writes that table."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from tests.families.checks import check
from tests.families.reload import new_process, what_is_wrong
from tests.families.rows import FAMILIES, is_missing, row_of
from tests.families.table import TABLE, as_markdown, committed

# The table is of transformers 5.23. What 5.19 and 5.20, the last ones for Python 3.10, cannot run themselves or run in
# another way.
IS_OLDER = Version(transformers.__version__) < Version("5.21")
OTHERWISE_IN_OLDER = {
    "cohere_compass",
    "fuyu",
    "gemma4",
    "gemma4_unified",
    "granite4_vision",
    "minimax_m3_vl",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "video_llava",
    "vipllava",
}


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str, Path], str]]:
    with new_process() as process:
        yield lambda family, folder: process.submit(what_is_wrong, family, folder).result()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_right(family: str, load: Callable[[str, Path], str], tmp_path: Path) -> None:
    if IS_OLDER and family == "vision-encoder-decoder":
        pytest.skip(f"transformers {transformers.__version__} has no config of it without its parts")
    if is_missing(family):
        pytest.skip(f"needs {row_of(family).requires}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finding = check(family, tmp_path, load)
    if IS_OLDER and family in OTHERWISE_IN_OLDER and finding != committed()[family]:
        pytest.xfail(f"transformers {transformers.__version__} does otherwise: {finding.note}")
    assert finding == committed()[family]


def test_the_table_is_made_from_the_results() -> None:
    findings = committed()
    assert [family for family in findings if family in FAMILIES] == list(FAMILIES)
    assert IS_OLDER or len(findings) == len(FAMILIES)
    assert TABLE.read_text() == as_markdown(list(findings.values()))
