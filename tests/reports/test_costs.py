"""The report on a merge against the tasks' true deltas and inputs, from a model in memory."""

import itertools

import pytest
import torch
from peft import get_peft_model

from peft_many import MAnyConfig, merge_adapter_sequence, merge_report
from peft_many.reports.costs import MergeReport
from tests import adapters

TASKS = {"a": 0, "b": 1, "c": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return {name: adapters.make(root / name, seed=seed, task_name=name) for name, seed in TASKS.items()}


def merged(made, names="abc", **options):
    return merge_adapter_sequence(
        adapters.base("llava"), [made[name].folder for name in names], progress=False, **options
    )


def loss(task, delta, layer):
    own, found = (task.inputs[layer] @ d.T for d in (task.deltas[layer], delta))
    return ((found - own).norm() / own.norm()).item()


def test_residuals_are_how_far_outputs_are_from_the_tasks_own(made):
    report = merge_report(merged(made), progress=False)
    assert report.tasks == list(TASKS)
    assert set(report.layers) == set(made["a"].deltas)
    tasks = list(made.values())
    for row, layer in enumerate(report.layers):
        best = adapters.reference(tasks, layer, 1e-4, [1.0] * 3)
        for column, task in enumerate(tasks):
            assert report.residuals[row, column].item() == pytest.approx(loss(task, best, layer), rel=1e-3)
    assert report.interference == pytest.approx(dict(zip("abc", report.residuals.mean(0).tolist())))


def test_conflicts_are_the_residuals_of_merges_of_two(made):
    report = merge_report(merged(made, ridge=1e-3), progress=False)
    for (i, one), (j, two) in itertools.permutations(enumerate(made.values()), 2):
        losses = []
        for layer in report.layers:
            best = adapters.reference([one, two], layer, 1e-3, [1.0, 1.0])
            losses.append(loss(one, best, layer))
        assert report.conflicts[i, j].item() == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert report.conflicts.diagonal().isnan().all()
    pairs = report.conflicting_pairs(2)
    assert len(pairs) == 2
    assert pairs[0][2] == pytest.approx(report.conflicts.nan_to_num(0).max().item())
    assert pairs[0][2] >= pairs[1][2]


def test_a_merge_of_one_loses_nothing(made):
    report = merge_report(merged(made, "a"), progress=False)
    assert report.residuals.abs().max() < 1e-5
    assert report.conflicting_pairs() == []


def test_conflicts_can_be_left_out(made):
    report = merge_report(merged(made), conflicts=False, progress=False)
    assert report.conflicts is None
    assert report.to_dict()["conflicts"] is None


def test_merges_of_lower_rank_and_by_other_methods_are_reported_on(made):
    """Their `B` is not the tasks' side by side."""
    whole = merge_report(merged(made), conflicts=False, progress=False)
    for options in ({"rank": 4}, {"method": "ties"}):
        other = merge_report(merged(made, **options), conflicts=False, progress=False)
        assert torch.allclose(other.output_ranks, whole.output_ranks, rtol=1e-5)
        assert (other.residuals.mean(0) > whole.residuals.mean(0)).all()


def test_layers_that_a_task_did_not_train_are_unknown(made, tmp_path):
    few = adapters.make(tmp_path / "few", seed=5, task_name="few", target_modules=["q_proj"])
    model = merge_adapter_sequence(adapters.base("llava"), [made["a"].folder, few.folder], progress=False)
    report = merge_report(model, progress=False)
    for row, layer in enumerate(report.layers):
        assert report.residuals[row, 1].isnan() == (not layer.endswith("q_proj"))
    assert (
        report.to_dict()["residuals"][report.layers.index(next(x for x in report.layers if "v_proj" in x))][1] is None
    )
    assert not torch.tensor(list(report.interference.values())).isnan().any()


@pytest.mark.parametrize("router", ["cosine", "gaussian"])
def test_images_go_where_the_router_sends_draws_of_what_was_measured(made, router):
    report = merge_report(merged(made, router=router), conflicts=False, progress=False)
    weights = torch.tensor(report.routing[adapters.PROJECTOR].matrix, dtype=torch.float64)
    assert list(report.routing) == [adapters.PROJECTOR]
    assert list(report.routing[adapters.PROJECTOR].shares) == list(TASKS)
    assert torch.allclose(weights.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert (weights.argmax(1) == torch.arange(3)).all()


def test_rows_of_a_router_that_abstains_sum_to_less(made):
    report = merge_report(merged(made, router="gaussian", abstain_above=0.5), conflicts=False, progress=False)
    (expected,) = report.routing.values()
    assert min(map(sum, expected.matrix)) < 0.99


@pytest.mark.parametrize("by", ["images", "instructions", "both"])
def test_a_gated_merge_says_where_its_gates_send_inputs(made, by):
    report = merge_report(merged(made, gate_by=by), conflicts=False, progress=False)
    assert list(report.routing) == [adapters.PROJECTOR, "gate_lora"]
    assert report.routing["gate_lora"].by == by
    assert list(report.routing["gate_lora"].shares) == list(TASKS)
    assert report.to_dict()["routing_accuracy"]["gate_lora"] == report.routing["gate_lora"].accuracy


def test_sizes_are_those_of_the_tensors(made):
    model = merged(made)
    report = merge_report(model, conflicts=False, progress=False)
    weights = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name)
    assert report.weight_bytes == weights
    statistics = model.peft_config["default"].statistics
    assert report.statistics_bytes == {task.name: task.nbytes for task in statistics.tasks}


def test_only_merges_with_statistics_can_be_reported_on(made):
    model = get_peft_model(adapters.base("llava"), MAnyConfig())
    with pytest.raises(ValueError, match="no merge"):
        merge_report(model)
    model = merged(made)
    model.peft_config["default"].statistics = None
    with pytest.raises(ValueError, match="without its statistics"):
        merge_report(model)


def test_the_report_is_json(made):
    report = merge_report(merged(made), progress=False)
    assert isinstance(report, MergeReport)
    content = report.to_dict()
    assert content["residuals"] == report.residuals.tolist()
    assert set(content["interference"]) == set(TASKS)
