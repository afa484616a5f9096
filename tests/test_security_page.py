"""The security page: each claim names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_claim_points_to_a_test():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 25
    for path, name in named:
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path} has no {name}"
    claims = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("| Claim", "|---"))]
    assert all("`tests/" in claim for claim in claims)
