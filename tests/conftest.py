"""What every test needs: one thread each, since tests run in parallel, and no network."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

from tests import places

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, help="how many mutated adapters, and kills, to try (0: a few)")


@pytest.fixture(scope="session", autouse=True)
def shared_place(tmp_path_factory):
    places.root = tmp_path_factory.mktemp("shared")
