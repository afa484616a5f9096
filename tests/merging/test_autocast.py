"""A user's autocast, as around a training step, and torch's default dtype change nothing of what is merged."""

import warnings

import pytest
import torch
from peft import PeftModel

from peft_many import (
    collect_statistics,
    export_lora,
    inspect_adapter,
    merge_adapter_files,
    merge_adapter_sequence,
    merge_report,
    pool_adapters,
    refit_merge,
)
from peft_many.methods import METHODS
from tests.adapters import base, batches, files, logits, make, make_loha
from tests.kernels import without_half_precision


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    made = [make(root / f"task {seed}", seed=seed, rows=8).folder for seed in range(3)]
    return [*made, *(make_loha(root / f"loha {seed}", seed).folder for seed in range(2))]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    without_half_precision(monkeypatch)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("method", ["lpm", "gaussian", "half", *METHODS])
def test_merges_are_equal_to_the_bit(shelf, tmp_path, method):
    options = {"gaussian": {"router": "gaussian"}, "half": {"dtype": torch.float16}}.get(method, {"method": method})
    merge_adapter_files(shelf[:3], tmp_path / "plain", progress=False, **options)
    with autocast():
        merge_adapter_files(shelf[:3], tmp_path / "cast", progress=False, **options)
    assert files(tmp_path / "cast") == files(tmp_path / "plain")


def test_merges_of_other_adapter_types_are_equal_to_the_bit(shelf, tmp_path):
    merge_adapter_files(shelf[3:], tmp_path / "plain", progress=False)
    with autocast():
        merge_adapter_files(shelf[3:], tmp_path / "cast", progress=False)
    assert files(tmp_path / "cast") == files(tmp_path / "plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_made_of_a_merge_is_equal_to_the_bit(shelf, tmp_path, dtype):
    merge_adapter_files(shelf[:3], tmp_path / "merge", dtype=dtype, progress=False)

    def everything(name):
        pool_adapters(shelf[:3], tmp_path / name / "pool", progress=False)
        merge_adapter_files([tmp_path / "merge"], tmp_path / name / "again", ridge=1e-3, progress=False)
        export_lora(tmp_path / "merge", tmp_path / name / "lora")
        seen = [repr(inspect_adapter(tmp_path / "merge")), repr(merge_report(tmp_path / "merge", progress=False))]
        return seen, files(tmp_path / name)

    expected = everything("plain")
    with autocast():
        assert everything("cast") == expected


def test_a_merge_on_a_model_is_equal_to_the_bit_and_routes_alike(shelf):
    expected = merge_adapter_sequence(base("llava"), shelf[:3], router="gaussian", progress=False)
    with autocast():
        model = merge_adapter_sequence(base("llava"), shelf[:3], router="gaussian", progress=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert torch.equal(logits(model, "llava"), logits(expected, "llava"))


def test_refitting_works_under_autocast(shelf):
    model = merge_adapter_sequence(base("llava"), shelf[:2], progress=False)
    samples = {f"task {seed}": batches(model, "llava", seed) for seed in range(2)}
    with autocast():
        refit_merge(model, samples, progress=False)
    assert logits(model, "llava").isfinite().all()


@pytest.mark.parametrize("rank", [None, 4])
def test_what_is_measured_under_autocast_is_what_passes_through(shelf, rank):
    """The activations are rounded, as they are when the model is used so; what is made of them is not."""
    model = PeftModel.from_pretrained(base("llava"), shelf[0]).eval()
    loader = batches(model, "llava", 0, rows=32)
    options = {"progress": False, **({"energy": 1.0} if rank is None else {"rank": rank, "energy": 1.0})}
    seen = {}

    def note(name):
        def hook(module, args):
            seen.setdefault(name, []).append(args[0].clone())

        return hook

    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    plain = collect_statistics(model, loader, **options).tasks[0]
    seen.clear()
    with autocast(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* samples have no `labels`")
        cast = collect_statistics(model, loader, **options).tasks[0]
    for hook in hooks:
        hook.remove()
    assert cast.fingerprints == plain.fingerprints
    for name in layers:
        masks = [batch["attention_mask"].bool() for batch in loader]
        rows = torch.cat([part[mask] for part, mask in zip(seen[name], masks)]).double()
        covariance = cast.covariance_of(name)
        assert covariance.trace == pytest.approx((rows.square().sum() / len(rows)).item(), rel=1e-3)
        if rank is None:
            torch.testing.assert_close(covariance.dense(), rows.T @ rows / len(rows), atol=1e-9, rtol=1e-9)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing_either(shelf, tmp_path, default_dtype, dtype):
    adapted = PeftModel.from_pretrained(base("llava"), shelf[0]).eval()
    loader = batches(adapted, "llava", 0, rows=32)
    model = merge_adapter_sequence(base("llava"), shelf[:3], router="gaussian", progress=False)
    merge_adapter_files(shelf[:3], tmp_path / "plain", router="gaussian", progress=False)
    answers, inputs = logits(model, "llava"), batches(model, "llava", 50)
    known = collect_statistics(adapted, loader, rank=4, progress=False).tasks[0]
    default_dtype(dtype)
    merge_adapter_files(shelf[:3], tmp_path / "other", router="gaussian", progress=False)
    with torch.no_grad():
        assert torch.equal(torch.cat([model(**batch).logits.flatten() for batch in inputs]), answers)
    measured = collect_statistics(adapted, loader, rank=4, progress=False).tasks[0]
    assert files(tmp_path / "other") == files(tmp_path / "plain")
    for name, found in measured.inputs.items():
        assert torch.equal(found.covariance.factor, known.inputs[name].covariance.factor)
