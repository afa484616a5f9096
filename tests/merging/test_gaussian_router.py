"""`router="gaussian"`: images are told apart by how a task's images differ, and strange ones are left alone."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_many import MAnyConfig, merge_adapter_files, merge_adapter_sequence
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from peft_many.tuner.projector import ProjectorMixture
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, base, batches, logits, make


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    return [make(root / f"task {seed}", "llava", seed=seed, rows=8).folder for seed in range(3)]


def mixture_of(model):
    return next(module for module in model.modules() if isinstance(module, ProjectorMixture))


def merge(adapters, **options):
    return merge_adapter_sequence(base("llava"), adapters, progress=False, **{"router": "gaussian", **options})


def pooled_features(seed):
    """What the router sees of a batch, from the frozen tower."""
    model, seen = base("llava"), []
    model.get_submodule(PROJECTOR).register_forward_pre_hook(lambda module, args: seen.append(args[0].mean(1)))
    with torch.no_grad():
        for batch in batches(model, "llava", seed, rows=8):
            model(**batch)
    return torch.cat(seen)


def posterior(features, rows, temperature=1.0):
    """From the definition, dense, in float64: Gaussians about the means of `rows` with one shrunken covariance."""
    images, width = sum(map(len, rows)), features.shape[1]
    S = sum(len(part) / images * torch.cov(part.double().T) for part in rows)
    square, trace = (S @ S).trace(), S.trace()
    share = ((1 - 2 / width) * square + trace**2) / ((images + 1 - 2 / width) * (square - trace**2 / width))
    S = (1 - share) * S + share * trace / width * torch.eye(width, dtype=torch.float64)
    means = torch.stack([part.double().mean(0) for part in rows])
    difference = features.double()[:, None] - means
    distances = torch.einsum("mnd,de,mne->mn", difference, torch.linalg.inv(S), difference)
    return torch.softmax(-distances / (2 * temperature), dim=-1), distances


def test_weights_are_the_posterior(shelf):
    rows = [pooled_features(seed) for seed in range(3)]
    mixture = mixture_of(merge(shelf, temperature=20.0))
    for seed in (0, 1, 2, 5):
        features = pooled_features(seed)
        expected, _ = posterior(features, rows, temperature=20.0)
        torch.testing.assert_close(mixture.task_weights(features).double(), expected, rtol=1e-2, atol=1e-3)


def test_each_tasks_images_go_to_their_task(shelf):
    mixture = mixture_of(merge(shelf))
    for seed in range(3):
        assert (mixture.task_weights(pooled_features(seed)).argmax(1) == seed).all()


def test_images_that_resemble_a_task_do_not_go_through_the_base_projector_too(shelf):
    """Where one task has all the weight, the others' zeros are no abstaining."""
    plain, careful = merge(shelf, temperature=1e-3), merge(shelf, temperature=1e-3, abstain_above=1e9)
    weights = mixture_of(plain).task_weights(pooled_features(0))
    assert (weights == 0).any()
    torch.testing.assert_close(logits(careful, "llava"), logits(plain, "llava"))


def test_every_way_to_merge_and_load_gives_the_same(shelf, tmp_path):
    model = merge(shelf)
    model.save_pretrained(tmp_path / "saved")
    merge_adapter_files(shelf, tmp_path / "files", router="gaussian", progress=False)
    one, two = (load_file(tmp_path / folder / WEIGHTS) for folder in ("saved", "files"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    for folder in ("saved", "files"):
        loaded = PeftModel.from_pretrained(base("llava"), tmp_path / folder)
        assert torch.equal(logits(loaded, "llava"), logits(model, "llava"))
        config = MAnyConfig.from_pretrained(tmp_path / folder)
        assert (config.merge.options.router, config.merge.options.temperature) == ("gaussian", 1.0)


def test_merging_further_equals_merging_at_once_and_inherits_the_router(shelf, tmp_path):
    merge(shelf[:2]).save_pretrained(tmp_path / "two")
    further = merge_adapter_sequence(base("llava"), [tmp_path / "two", shelf[2]], progress=False)
    assert further.peft_config["default"].merge.options.router == "gaussian"
    expected = merge(shelf)
    assert torch.equal(logits(further, "llava"), logits(expected, "llava"))
    back = merge([tmp_path / "two", shelf[2]], router="cosine")
    plain = merge_adapter_sequence(base("llava"), shelf, progress=False)
    assert back.peft_config["default"].merge.options == plain.peft_config["default"].merge.options
    assert torch.equal(logits(back, "llava"), logits(plain, "llava"))


def test_strange_images_go_through_the_base_projector(shelf, tmp_path):
    rows = [pooled_features(seed) for seed in range(3)]
    strange = pooled_features(6)
    width = strange.shape[1]
    own = max(posterior(part, rows)[1].amin(1).max().item() for part in rows) / width
    nearest = posterior(strange, rows)[1].amin(1).min().item() / width
    assert nearest > 2 * own  # colours that no task has
    model = merge(shelf, abstain_above=(own + nearest) / 2)
    mixture = mixture_of(model)
    assert (mixture.task_weights(strange) == 0).all()
    assert (mixture.task_weights(rows[1]).argmax(1) == 1).all()
    outputs = []
    model.get_base_model().get_submodule(PROJECTOR).register_forward_hook(lambda m, args, out: outputs.append(out))
    plain = base("llava")
    plain.get_submodule(PROJECTOR).register_forward_hook(lambda m, args, out: outputs.append(out))
    part = batches(plain, "llava", 6, rows=8)[0]
    with torch.no_grad():
        model(**part)
        plain(**part)
    assert torch.equal(*outputs)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(base("llava"), tmp_path / "saved")
    assert mixture_of(loaded).abstain_above == pytest.approx((own + nearest) / 2)
    unloaded = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(unloaded(**part).logits, model(**part).logits, rtol=1e-4, atol=1e-4)


def test_images_of_the_tasks_do_not_pass_the_base_projector(shelf, monkeypatch):
    model = merge(shelf, abstain_above=1e6)
    weights = torch.tensor([0.3, 0.3, 0.4]) * (1 - 2**-23)  # whose sum is one but for rounding
    assert weights.sum() != 1
    monkeypatch.setattr(mixture_of(model), "task_weights", lambda pooled: weights.expand(len(pooled), -1))
    calls = []
    projector = model.get_base_model().get_submodule(PROJECTOR).original_module
    projector.register_forward_hook(lambda module, args, out: calls.append(out))
    logits(model, "llava")
    assert not calls


def test_the_metric_stays_float32(shelf):
    model = merge(shelf)
    mixture = mixture_of(model)
    before = {name: buffer.clone() for name, buffer in mixture.named_buffers(recurse=False)}
    assert set(before) == {"prototypes", "directions", "variances"}
    model.to(torch.bfloat16)
    for name, buffer in mixture.named_buffers(recurse=False):
        assert torch.equal(buffer, before[name])


def without_spread(folder, target):
    """As if it had seen a single image."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    loaded = AdapterStatistics.load(target / STATISTICS)
    (task,) = loaded.tasks
    projectors = {name: replace(seen, spread=None) for name, seen in task.projectors.items()}
    AdapterStatistics((replace(task, projectors=projectors),)).save(target)
    return target


def test_a_task_without_a_spread_is_refused_by_name(shelf, tmp_path):
    old = without_spread(shelf[0], tmp_path / "old")
    with pytest.raises(UnmergeableAdapterError, match=r"old.*router='gaussian'.*router='cosine'"):
        merge([old, shelf[1]])
    merge([old, shelf[1]], router="cosine")


def test_a_damaged_spread_is_an_error(shelf, tmp_path):
    target = without_spread(shelf[0], tmp_path / "damaged")
    (target / STATISTICS).write_bytes((shelf[0] / STATISTICS).read_bytes())
    tensors = load_file(target / STATISTICS)
    key = f"0.spread.{PROJECTOR}.factor"
    tensors[key][0, 0] = float("nan")
    from safetensors import safe_open

    with safe_open(target / STATISTICS, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, target / STATISTICS, metadata)
    with pytest.raises(ValueError, match="spread of the images"):
        merge([target, shelf[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "nearest"}, "'cosine', 'gaussian'"),
        ({"abstain_above": 0.0}, "positive"),
        ({"router": "cosine", "abstain_above": 2.0}, "router='gaussian'"),
        ({"projectors": "mean"}, "option of routed projectors"),
    ],
)
def test_impossible_options_are_refused(shelf, options, message):
    with pytest.raises(ValueError, match=message):
        merge(shelf, **options)


def test_an_unknown_router_in_a_config_is_refused(shelf, tmp_path):
    merge(shelf).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["merge"]["options"]["router"] = "magic"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`router`"):
        PeftModel.from_pretrained(base("llava"), tmp_path / "saved")
