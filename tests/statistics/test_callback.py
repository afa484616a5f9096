"""`MAnyCallback`: what it finds out before training, and that nothing at its end loses the trained adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import PeftWarning
from transformers import Trainer, TrainingArguments

from peft_many import MAnyCallback, MAnyConfig, merge_adapter_files
from peft_many.statistics.callback import LastCalls
from tests import tiny
from tests.tuner.test_training import Samples, collate, trainable


class Once(torch.utils.data.IterableDataset):
    """A stream that can be read once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


class Watched(MAnyCallback):
    """Notes how many rows of each batch it holds after a step."""

    kept = ()

    def on_step_end(self, args, state, control, **kwargs):
        self.kept = (*self.kept, [len(call["input_ids"]) for call in self._last.calls])


@pytest.fixture
def model():
    return get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name="names"))


def trainer_of(model, folder, callback, data=None, kind=Trainer, **options):
    usual = {"per_device_train_batch_size": 2, "max_steps": 3, "save_strategy": "no", "learning_rate": 1e-2}
    arguments = TrainingArguments(
        str(folder / "run"), report_to=[], disable_tqdm=True, use_cpu=True, **{**usual, **options}
    )
    data = Samples(model) if data is None else data
    callbacks = [callback] if callback else []
    return kind(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate, callbacks=callbacks)


def task_of(model):
    return model.peft_config["default"].statistics.tasks[0]


def is_clean(model):
    """Whether no hook of ours is left; transformers has its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return not any("peft_many" in str(getattr(hook, "func", hook).__module__) for hook in hooks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter_name": "clever"}, "There is no adapter 'clever'"),
        ({"max_samples": 0}, "max_samples"),
        ({"energy": 2.0}, "energy"),
        ({"dtype": torch.float64}, "dtype"),
        ({"max_sample": 3}, "max_sample"),
        ({"dataloader": {"input_ids": torch.ones(2, 3)}}, "put a single batch into a list"),
        ({"dataloader": "default"}, "this is a str"),
        ({"dataloader": ["hello"]}, "A batch is what the model is called with.*type str"),
        ({"dataloader": [[{"prompt": "hello"}]]}, "type list, of dict"),
        ({"forward_fn": 3}, "forward_fn"),
        ({"also_measure": ["nope"]}, "matches no linear layer"),
    ],
)
def test_mistakes_are_found_before_the_first_step(model, tmp_path, options, said):
    trainer = trainer_of(model, tmp_path, MAnyCallback(**options))
    with pytest.raises((ValueError, TypeError), match=said):
        trainer.train()
    assert trainer.state.global_step == 0
    assert is_clean(model)


def test_a_data_set_in_the_place_of_a_loader_is_found_before_the_first_step(model, tmp_path):
    rows = Samples(model)
    rows.rows = [{"input_ids": row["input_ids"][0]} for row in rows.rows]
    trainer = trainer_of(model, tmp_path, MAnyCallback(rows))
    with pytest.raises(ValueError, match="type dict, a single row"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]), "`trainable_token_indices`, so its"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "embed_tokens', which is no linear layer"),
    ],
)
def test_what_cannot_be_measured_is_found_before_the_first_step(tmp_path, config, reason):
    trainer = trainer_of(get_peft_model(tiny.build("llava"), config), tmp_path, MAnyCallback())
    with pytest.raises(ValueError, match=reason):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("on_way", ["once", "unread rest", "hf"])
def test_streams_are_measured_on_the_last_batches(model, tmp_path, on_way):
    samples = Samples(model, 8)
    if on_way == "hf":
        datasets = pytest.importorskip("datasets")
        data = datasets.IterableDataset.from_generator(lambda: (samples[i] for i in range(8))).with_format("torch")
    else:
        data = Once([samples[i] for i in range(6 if on_way == "once" else 8)])
    callback = Watched(max_samples=3)
    trainer = trainer_of(model, tmp_path, callback, data, remove_unused_columns=False)
    trainer.train()
    assert (task_of(model).samples, task_of(model).images) == (4, 4)
    assert callback.kept[-1] == [2, 2], "no more than was asked for"
    assert callback._last is None
    assert is_clean(model)
    trainer.save_model(str(tmp_path / "names"))
    merge_adapter_files([tmp_path / "names"], tmp_path / "merged", progress=False)


class WeighsRows(Trainer):
    """Takes from the batch what the model does not know."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs.pop("weight")
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_batches_that_the_model_does_not_take_are_measured_as_it_was_called(model, tmp_path):
    samples = Samples(model)
    samples.rows = [{**row, "weight": torch.ones(1)} for row in samples.rows]
    trainer_of(model, tmp_path, MAnyCallback(), samples, WeighsRows, remove_unused_columns=False).train()
    assert task_of(model).samples == 6, "three steps of two rows"


def test_ordinary_training_keeps_no_batch_and_gives_the_same_weights(model, tmp_path):
    other = copy.deepcopy(model)
    callback = Watched()
    trainer_of(model, tmp_path, callback).train()
    assert callback.kept == ([], [], [])
    assert task_of(model).samples == 8, "the dataloader's"
    trainer_of(other, tmp_path, None).train()
    torch.testing.assert_close(trainable(model), trainable(other), rtol=0, atol=0)


def test_a_failure_at_the_end_leaves_the_trained_adapter(model, tmp_path):
    def fail(model, batch):
        raise OSError("the disk is gone")

    trainer = trainer_of(model, tmp_path, MAnyCallback(forward_fn=fail))
    with pytest.warns(PeftWarning, match="could not be measured.*the disk is gone.*collect_statistics"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert model.training
    assert is_clean(model)
    trainer.save_model(str(tmp_path / "names"))
    assert PeftConfig.from_pretrained(tmp_path / "names").task_name == "names"


def test_ctrl_c_interrupts_measuring(model, tmp_path):
    def interrupt(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, tmp_path, MAnyCallback(forward_fn=interrupt)).train()
    assert is_clean(model)


@pytest.mark.parametrize("how", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_the_best_weights_are_measured_and_a_run_can_be_resumed(model, tmp_path, how):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_of(model, tmp_path, MAnyCallback(), **steps, **best, **how)
    trainer.train()
    assert trainer.state.best_global_step == 1, "the worst, so not the last"
    trainer.save_model(str(tmp_path / "best"))
    again = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name="more"))
    resumed = trainer_of(again, tmp_path, MAnyCallback(), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed.save_model(str(tmp_path / "resumed"))
    # Merging compares the weights with those that were measured.
    merge_adapter_files([tmp_path / "best", tmp_path / "resumed"], tmp_path / "merged", progress=False)
    assert not (tmp_path / "run" / "checkpoint-1" / "adapter_statistics.safetensors").exists()


def test_evaluation_and_reference_passes_are_not_remembered(model):
    batch = collate(Samples(model, 2).rows)
    last = LastCalls(model, 3, keys=None)
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert not last.calls
    model(**batch)
    model(**batch)
    model(**{name: tensor[:1] for name, tensor in batch.items()})
    assert [len(call["input_ids"]) for call in last.calls] == [2, 1]


def test_a_compiled_model_is_remembered_without_a_graph_of_it():
    class Double(torch.nn.Module):
        def forward(self, input_ids):
            return 2 * input_ids

    graphs = []
    model = Double()
    last = LastCalls(model, 3, keys=None)
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(3):
        compiled(input_ids=torch.ones(2, 2))
    assert len(last.calls) == 2
    assert len(graphs) == 1
