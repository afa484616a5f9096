"""Run by test_dying as one of two processes without a launcher: the second is killed in the middle of measuring."""

import datetime
import os
import signal
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import get_peft_model

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files
from tests import tiny
from tests.adapters import batches

what, folder = sys.argv[1:]
torch.set_num_threads(1)
limit = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=30))
accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
main = accelerator.is_main_process


def die(*_: object) -> None:
    if not main:
        print("dying", flush=True)
        os.kill(os.getpid(), signal.SIGKILL if what != "stall" else signal.SIGSTOP)


if what == "merge":
    import peft_many.merging.group

    real = peft_many.merging.group.merge_group

    def merge_group(*args, **kwargs):
        die()
        return real(*args, **kwargs)

    peft_many.merging.group.merge_group = merge_group
    merge_adapter_files([f"{folder}/a", f"{folder}/b"], f"{folder}/merged", across_processes=True, progress=False)
else:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=2))

    def forward(model, batch):
        die()
        return model(**batch)

    collect_statistics(model, batches(model, "llava", 0), forward_fn=forward, progress=False)
print("done")
