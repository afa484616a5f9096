"""Write examples/merge_three_adapters.ipynb from the script of that name, whose cells begin with `# %%`.

python scripts/make_notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "merge_three_adapters.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
LANGUAGE = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def cells(script: str) -> list[tuple[str, str]]:
    """The kind of each cell, `markdown` or `code`, and its text."""
    parts = re.split(r"^# %%(?: \[(markdown)\])?\n", script, flags=re.M)[1:]
    found = []
    for kind, text in zip(parts[::2], parts[1::2]):
        prefix = r"^# ?" if kind else r"^# (?=%pip )"
        found.append((kind or "code", re.sub(prefix, "", text.strip("\n"), flags=re.M)))
    return found


def notebook(script: str) -> str:
    """The notebook file, without outputs."""
    made = []
    for number, (kind, text) in enumerate(cells(script)):
        ran = {"execution_count": None, "outputs": []} if kind == "code" else {}
        source = text.splitlines(keepends=True)
        made.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **ran, "source": source})
    content = {"cells": made, "metadata": LANGUAGE, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
