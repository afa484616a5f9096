"""The table of families in the documentation, and the results that it is made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .checks import Finding

_DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
RESULTS = _DOCS / "results" / "families.json"
TABLE = _DOCS / "families.md"

_HEAD = """# Model families

<!-- Made by scripts/coverage.py; do not edit. -->

Every family of transformers that takes images and text, built tiny with random weights and put through `peft_many`:
`MAnyConfig()` with nothing else, a training step, `collect_statistics`, a merge of two tasks, `save_pretrained`, and
loading in a new process.

- **Routed**: in a batch of rows with one, two and no image, of two tasks, each image gets one decision, for its own
  task, and every row gets what it gets alone.
- **Generates**: `generate` likewise.
- **Reloads**: in a new process the saved merge gives the same.
- **Features**: what arrives at the (first) projector.
"""

_FOREIGN = """
## Models that transformers does not know

Of remote code and classes of your own the parts are found by what they are made of: a vision tower begins with a
convolution over colours, or is a model of transformers that reads pixels; the language model holds the token
embeddings and a list of layers; the projector lies beside or inside the tower, and leads from its width to that of the
token embeddings. Where that leaves a doubt, an error says what was seen and which argument to give. Tested are:

| layout | language model | projector | routed and generates |
|---|---|---|---|
| InternVLChat | `language_model.model` | `mlp1` | yes |
| LLaVA's own code (`LlavaLlamaForCausalLM`) | `model.layers` | `model.mm_projector` | yes |
| Qwen-VL (the first) | `transformer.h` | `transformer.visual.attn_pool` | parts only |
| Phi-3-vision | `model.layers` | `model.vision_embed_tokens.img_projection` | parts only |
| MiniCPM-V | `llm.model` | `resampler` | parts only |

- InternVLChat: the tiles in a run of the model's `img_context_token_id` are one image; where that is not set or does
  not fit, each tile is one. Tiles whose `image_flags` are 0 are none.
- LLaVA's own code: each entry of `images` is one image, with its tiles; what a row without an image brings is none. A
  tower with `delay_load` has to be loaded first.
- In others each entry of the first dimension of what arrives at the projector is an image, be it a tile, until
  [a layout is registered](how-to/your-own-model.md#a-model-family-of-your-own).
"""


def committed() -> dict[str, Finding]:
    """The findings that the table in the documentation shows."""
    return {row["family"]: Finding(**row) for row in json.loads(RESULTS.read_text())}


def as_markdown(findings: Sequence[Finding]) -> str:
    """The page of the documentation."""
    routed = [finding for finding in findings if finding.routed]
    rest = [finding for finding in findings if not finding.routed]
    lines = [_HEAD, f"## The {len(routed)} families that are routed exactly", ""]
    lines += ["All of them generate and reload, but where a note below the table says otherwise.", ""]
    lines += ["| family | projector | features | video |", "|---|---|---|---|"]
    notes = []
    for one in routed:
        paths = ", ".join(f"`{name}`" for name in one.projectors)
        video, _, why_not = one.video.partition(": ")
        lines.append(f"| {one.family} | {paths} | {one.layout} | {video} |")
        faults = {"does not generate": one.generated, "does not reload": one.reloaded}
        said = [one.note, why_not and f"no video: {why_not}", *(fault for fault, right in faults.items() if not right)]
        notes += [f"- {one.family}: {note}" for note in said if note]
    lines += ["", *notes]
    lines += ["", f"## The {len(rest)} others", "", "| family | why |", "|---|---|"]
    lines += [f"| {one.family} | {one.note} |" for one in rest]
    return "\n".join(lines) + "\n" + _FOREIGN
