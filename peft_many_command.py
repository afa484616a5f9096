"""What the command `peft-many` runs.

It is outside the package because importing any part of that imports PEFT. The package defers this where it finds this
module loaded, so that help, completion and wrong usage are answered at once.
"""


def main() -> None:
    """Run the command line."""
    from peft_many.commands import app

    app()
