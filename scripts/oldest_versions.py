"""Pins for pip to the lowest versions that pyproject.toml allows, of the dependencies and the extras that are named.

python scripts/oldest_versions.py demo test > oldest.txt     # needs packaging, and tomli before Python 3.11
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(project: dict[str, Any], lines: list[str]) -> Iterator[Requirement]:
    """What the lines require; an extra of the project itself stands for what it requires."""
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                yield from requirements(project, project["optional-dependencies"][extra])
        else:
            yield requirement


def lowest(requirement: Requirement) -> str:
    """The requirement at its lower bound. To pip, `==2.7` is 2.7.0, and no other 2.7."""
    bounds = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"`{requirement}` in {PYPROJECT.name} needs a lower bound, such as `>=1.0`.")
    return f"{requirement.name}=={bounds[0]}" + (f"; {requirement.marker}" if requirement.marker else "")


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [*project["dependencies"], f"{project['name']}[{','.join(sys.argv[1:])}]"]
    print(*sorted({lowest(requirement) for requirement in requirements(project, wanted)}), sep="\n")


if __name__ == "__main__":
    main()
