"""`python -m peft_many.demo`, which is `peft-many demo`."""

from __future__ import annotations

import sys

from ..commands import app


def main() -> None:
    """Run the demo with the arguments of the command line."""
    app(["demo", *sys.argv[1:]], prog_name="peft-many")


if __name__ == "__main__":
    main()
