"""Run by test_training in two processes: training, measuring and saving under DistributedDataParallel."""

import sys

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from peft_many import MAnyConfig, collect_statistics
from tests import tiny
from tests.test_training import Samples, collate

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name="names"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
loader = DataLoader(Samples(model, 16), batch_size=4, collate_fn=collate)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
assert isinstance(prepared, DistributedDataParallel)
for _ in range(3):
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
assert torch.equal(*accelerator.gather(weights[None]).unbind()), "the processes have trained apart"
assert collect_statistics(prepared, loader, progress=False).tasks[0].samples == 8
assert not any("covariance" in name for name, _ in model.named_buffers()), "DDP broadcasts buffers at every forward"
model.save_pretrained(sys.argv[1], is_main_process=accelerator.is_main_process)
accelerator.wait_for_everyone()
