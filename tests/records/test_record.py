"""What a merge's config says of it: written as JSON and read back, and checked by its own types."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_many import MAnyConfig, MergeOptions
from peft_many.records import (
    MergeRecord,
    Operation,
    Origin,
    PooledTask,
    PoolRecord,
    RoutedProjector,
    RoutedTask,
    TaskRecord,
    merge_of,
)
from peft_many.records.checking import RecordError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WEIGHT = st.floats(0, 10) | st.integers(0, 10)
POOLED = st.builds(PooledTask, TEXT, WEIGHT, TEXT, st.none() | TEXT, st.none() | TEXT)
OPERATION = st.builds(Operation, TEXT, st.lists(TEXT), st.dictionaries(TEXT, st.integers()), TEXT, st.integers(0, 9))
ORIGIN = st.builds(
    Origin, TEXT, st.none() | TEXT, st.none() | TEXT, st.just({"r": 4}), st.lists(TEXT), st.lists(POOLED, max_size=2)
)


@st.composite
def records(draw: st.DrawFn) -> MergeRecord:
    names = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    tasks = [TaskRecord(name, draw(WEIGHT), draw(ORIGIN), draw(st.integers(0, 9))) for name in names]
    routed = [RoutedTask(name, draw(st.booleans())) for name in names]
    directions = draw(st.none() | st.integers(0, 5))
    distances = None if directions is None else [1.5] * len(names)
    return MergeRecord(
        options=MergeOptions(router="gaussian").filled_in([]),
        tasks=tasks,
        operations=draw(st.lists(OPERATION, max_size=2)),
        routing={"p": RoutedProjector(draw(st.integers(1, 9)), routed, directions, distances)},
        averaged_projectors={"q": names},
        task_ranks=draw(st.none() | st.just([2] * len(names))),
    )


@given(records())
def test_a_record_survives_json(record):
    assert MergeRecord.read(json.loads(json.dumps(record.to_json()))) == record


@given(st.builds(PoolRecord, st.lists(POOLED, max_size=3), st.lists(OPERATION, max_size=3)))
def test_a_pools_record_survives_json(record):
    assert PoolRecord.read(json.loads(json.dumps(record.to_json()))) == record


@given(records())
def test_a_config_carries_its_record(record):
    config = MAnyConfig(merge=record)
    assert config.is_merge
    assert merge_of(config) is record
    assert MAnyConfig(merge=config.to_dict()["merge"]).merge == record


def test_a_config_that_trains_shows_no_record():
    content = MAnyConfig(r=4).to_dict()
    assert (content["merge"], content["pool"]) == (None, None)
    assert not MAnyConfig().is_merge


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: TaskRecord("a", "1", Origin("x")), "`weight` cannot be 1"),
        (lambda: Origin(3), "`sha256` cannot be 3"),
        (lambda: RoutedTask("a", 1), "`trained` cannot be 1"),
        (lambda: MergeRecord(MergeOptions(), [3]), "`tasks` cannot be"),
    ],
)
def test_fields_have_their_types(record, message):
    with pytest.raises(TypeError, match=message):
        record()


@pytest.mark.parametrize("content", [1.5, 0.0, True, "merge", []])
@pytest.mark.parametrize("name", ["merge", "pool"])
def test_what_is_no_record_at_all_is_refused(name, content):
    with pytest.raises(RecordError, match=f"`{name}` cannot be used: a mapping is expected"):
        MAnyConfig(**{name: content})


def test_a_gaussian_router_knows_distances_to_abstain_by():
    tasks = [RoutedTask(name, True) for name in "ab"]
    assert RoutedProjector(6, tasks, 2, [5.0, 9.0]).limits(3.0) == [15.0, 27.0]
    assert RoutedProjector(6, tasks, 2, [5.0, 9.0]).limits(None) is None
    assert RoutedProjector(6, tasks).limits(3.0) is None  # cosines know no distance
    with pytest.raises(ValueError, match="None directions and the distances"):
        RoutedProjector(6, tasks, None, [5.0, 9.0])
    for distances in ([1.0], [1.0, 0.0], [1.0, -2.0], [], None):
        with pytest.raises(ValueError, match="a routed projector cannot have"):
            RoutedProjector(6, tasks, 2, distances)
