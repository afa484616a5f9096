# %% [markdown]
# # Merge three LoRA adapters of one multimodal model
#
# Each adapter was fine-tuned for one task. Here they become one adapter that does all three: nothing is trained, and
# the result is compared with each adapter alone and with PEFT's own `add_weighted_adapter`.
#
# You need the adapters, some hundred of the questions that each was trained on, and other questions to test with. A
# GPU is needed as far as the base model needs one: measuring and asking run it, merging does not.

# %%
# %pip install -q "peft-many[data,report]" torchvision

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from peft_many import ask_merge, evaluate_merge, inspect_adapter, measure_adapter, merge_adapter_files

# %% [markdown]
# ## Your adapters and data
#
# Replace all of these; `me/…` are not real. Adapters are folders or Hub ids. A file of questions has lines like
# `{"image": "images/1.png", "question": "How many cubes?", "answer": "3"}`; data sets of the Hub and conversations
# can be used as well.

# %%
BASE = "llava-hf/llava-1.5-7b-hf"
ADAPTERS = {"charts": "me/charts-lora", "clevr": "me/clevr-lora", "iconqa": "me/iconqa-lora"}
TRAINING = {"charts": "charts.jsonl", "clevr": "clevr.jsonl", "iconqa": "iconqa.jsonl"}
TEST = {"charts": "charts-test.jsonl", "clevr": "clevr-test.jsonl", "iconqa": "iconqa-test.jsonl"}
IMAGE, QUESTION = "images/1.png", "How many cubes are there?"

# %% [markdown]
# ## 1. Measure
#
# Merging needs to know what the adapted layers get as inputs on each task, and what the task's images are like. This
# runs the model on 256 training questions of each task, once. The measurements are saved beside the adapter's
# weights.

# %%
measured = [
    measure_adapter(adapter, TRAINING[task], f"measured/{task}", task_name=task, base_model=BASE, overwrite=True)
    for task, adapter in ADAPTERS.items()
]

# %% [markdown]
# ## 2. Merge
#
# The tasks' LoRAs are merged by least squares on those inputs. With `gate_lora`, an input that clearly resembles one
# task is answered with that task's own LoRA, and any other with the merged one. Without it, all inputs get the
# merged LoRA; that is made too, for comparison. Projectors, if the adapters trained them, are chosen for each image.

# %%
merged = merge_adapter_files(measured, "merged", gate_lora=True, overwrite=True)
one_lora = merge_adapter_files(measured, "merged-one-lora", overwrite=True)

# %% [markdown]
# ## 3. Look at the routing
#
# Before any test: which task's LoRA the inputs of each task are expected to get. Ones on the diagonal mean that the
# tasks look different. What a row lacks to one gets the merged LoRA.

# %%
expected = inspect_adapter(merged).expected_routing["gate_lora"]
figure, axes = plt.subplots(figsize=(4, 3.5))
axes.imshow(expected.matrix, vmin=0, vmax=1, cmap="Blues")
axes.set_xticks(range(len(expected.shares)), list(expected.shares))
axes.set_yticks(range(len(expected.shares)), list(expected.shares))
axes.set_xlabel("LoRA of")
axes.set_ylabel("inputs of")
for row, shares in enumerate(expected.matrix):
    for column, share in enumerate(shares):
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
figure.savefig("routing.png", bbox_inches="tight", dpi=130)
plt.show()

# %% [markdown]
# ## 4. Ask
#
# With `compare`, the base model and each task's adapter answer too. The merge contains all of them.

# %%
said = ask_merge(merged, QUESTION, IMAGE, compare=True, base_model=BASE)
print("merge:", said.answer, {task: round(weight, 2) for task, weight in said.gate.items()})
for who, answer in said.others.items():
    print(f"{who}: {answer}")

# %% [markdown]
# ## 5. Evaluate
#
# Right answers in per cent, by task: of the merge, of the base model and of each adapter alone.

# %%
scores = dict(evaluate_merge(merged, TEST, base_model=BASE).scores)
scores["merge, one LoRA"] = evaluate_merge(one_lora, TEST, base_model=BASE, alone="none").scores["merge"]

# %% [markdown]
# ## 6. Compare with `add_weighted_adapter`
#
# PEFT averages the LoRAs' weights and needs no measuring. It refuses adapters that trained the same projector; then
# it is left out of the table.

# %%
base = AutoModelForImageTextToText.from_pretrained(BASE, dtype="auto")
first, *others = ADAPTERS
model = PeftModel.from_pretrained(base, f"measured/{first}", adapter_name=first)
for task in others:
    model.load_adapter(f"measured/{task}", adapter_name=task)
try:
    model.add_weighted_adapter(list(ADAPTERS), [1 / len(ADAPTERS)] * len(ADAPTERS), "average", combination_type="cat")
except ValueError as refused:
    print(refused)
else:
    model.save_pretrained("weighted", selected_adapters=["average"])
del model, base
torch.cuda.empty_cache()

# %%
if Path("weighted/average").is_dir():
    found = evaluate_merge("weighted/average", TEST, base_model=BASE, alone="none").scores
    scores["add_weighted_adapter"] = found["adapter"]
for who, by_task in scores.items():
    print(f"{who:22}", *(f"{task} {score:5.1f}" for task, score in by_task.items()), sep="  ")

# %% [markdown]
# ## What next
#
# Load the merge like any adapter: `import peft_many`, then `PeftModel.from_pretrained(base, "merged")`. Add a task
# to it by `peft_many.add_task`, and take one out again by `peft_many.remove_task`; neither needs the other tasks'
# adapters.
