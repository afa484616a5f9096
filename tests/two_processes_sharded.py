"""Run by test_training in two processes: a model whose weights FSDP2 has sharded is measured like a whole one."""

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from peft_many import MAnyConfig, collect_statistics
from tests import tiny
from tests.adapters import covariances
from tests.tuner.test_training import Samples, collate

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name="names", init_lora_weights=False))
plain = DataLoader(Samples(model, 8), batch_size=2, collate_fn=collate)
whole = collect_statistics(model, plain, energy=1.0, across_processes=False, progress=False).tasks[0]
mesh = init_device_mesh("cpu", (accelerator.num_processes,))
base = model.get_base_model()
for layer in base.model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
weight = base.model.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight
assert weight.to_local().shape[0] < weight.shape[0], "nothing was sharded"
sharded = collect_statistics(model, accelerator.prepare(plain), energy=1.0, progress=False).tasks[0]
assert sharded.samples == 8
for name, covariance in covariances(whole).items():
    torch.testing.assert_close(sharded.covariance_of(name).dense(), covariance.dense(), atol=1e-6, rtol=1e-4)
for name, values in whole.fingerprints.items():
    torch.testing.assert_close(sharded.fingerprints[name], values)
for name, seen in whole.projectors.items():
    torch.testing.assert_close(sharded.projectors[name].prototype, seen.prototype)
accelerator.wait_for_everyone()
accelerator.end_training()
