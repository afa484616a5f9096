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


def committed() -> dict[str, Finding]:
    """The findings that the table in the documentation shows."""
    return {row["family"]: Finding(**row) for row in json.loads(RESULTS.read_text())}


def as_markdown(findings: Sequence[Finding]) -> str:
    """The page of the documentation."""
    routed = [finding for finding in findings if finding.routed]
    rest = [finding for finding in findings if not finding.routed]
    lines = [_HEAD, f"## The {len(routed)} families that are routed exactly", ""]
    lines += [
        "| family | projector | features | generates | reloads | video | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in routed:
        paths = ", ".join(f"`{name}`" for name in one.projectors)
        marks = " | ".join("yes" if mark else "no" for mark in (one.generated, one.reloaded))
        lines.append(f"| {one.family} | {paths} | {one.layout} | {marks} | {one.video} | {one.note} |")
    lines += ["", f"## The {len(rest)} others", "", "| family | why |", "|---|---|"]
    lines += [f"| {one.family} | {one.note} |" for one in rest]
    return "\n".join(lines) + "\n"
