"""The scaled sum of the deltas against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from peft_many.methods import TaskArithmetic
from tests.methods.layers import dense, dense_deltas, layer_tasks, relative_error, seeds


@given(seeds, st.sampled_from([0.4, 1.0, -0.2]))
def test_it_is_the_scaled_sum_of_the_deltas(seed, scaling):
    tasks = layer_tasks(seed, ranks=[2, 0, 4])
    expected = scaling * sum(task.weight * delta for task, delta in zip(tasks, dense_deltas(tasks), strict=True))
    assert relative_error(dense(TaskArithmetic(scaling).merge(tasks)), expected) < 1e-12
