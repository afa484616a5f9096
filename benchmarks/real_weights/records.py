"""What a run has found so far, as JSON: written after each stage, by several processes if need be."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_many.files.atomic import replace_file


class Records:
    """The stages of a run and what each gave, in a file.

    Args:
        path (`Path`): The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> dict[str, Any]:
        """By stage, its `"result"` and the `"seconds"` that it took."""
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        return found

    def __contains__(self, stage: str) -> bool:
        return stage in self.all()

    def __getitem__(self, stage: str) -> Any:
        return self.all()[stage]["result"]

    def record(self, stage: str, make: Callable[[], Any]) -> Any:
        """What a stage gave, made now or by an earlier run."""
        if stage not in self:
            started = time.perf_counter()
            found = {"result": make(), "seconds": round(time.perf_counter() - started, 1)}
            self._add(stage, found)
            gc.collect()  # models are full of cycles
            print(f"{stage}: done in {found['seconds']:.0f} s", flush=True)
        return self[stage]

    def _add(self, stage: str, found: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            text = json.dumps({**self.all(), stage: found}, indent=1, ensure_ascii=False)
            with replace_file(self.path) as temporary:
                temporary.write_text(f"{text}\n", encoding="utf-8")
