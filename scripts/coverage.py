"""Put every family of transformers that takes images and text through `peft_many`, and write docs/families.md.

Usage:
    python scripts/coverage.py                 all families, about two minutes
    python scripts/coverage.py llava qwen2_vl  some of them, and only print

Families that need a package which the tests do not (timm) are left as they are in the table if it is not installed.
"""

import json
import logging
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.families.checks import Finding, check
from tests.families.reload import new_process, what_is_wrong
from tests.families.rows import FAMILIES, is_missing, row_of
from tests.families.table import RESULTS, TABLE, as_markdown, committed


def main(wanted: list[str]) -> None:
    unknown = [family for family in wanted if family not in FAMILIES]
    if unknown:
        sys.exit(
            f"{', '.join(unknown)}: not a model_type of transformers' auto class for images and text. If only the "
            "auto class leaves it out, enter it under `_MORE` in tests/families/rows.py; for a model that is not part "
            "of transformers see docs/how-to/your-own-model.md."
        )
    torch.set_num_threads(1)
    logging.captureWarnings(True)
    transformers.logging.set_verbosity_error()
    findings: list[Finding] = []
    with new_process() as process, tempfile.TemporaryDirectory() as folder:
        for family in tqdm(wanted or list(FAMILIES), unit="family"):
            if is_missing(family):
                findings.append(committed()[family])
                tqdm.write(f"{family} is left as it was found before: it needs {row_of(family).requires}")
                continue
            load = partial(lambda *args: process.submit(what_is_wrong, *args).result())
            findings.append(check(family, Path(folder) / family, load))
    if wanted:
        print(json.dumps([finding.as_dict() for finding in findings], indent=1))
        return
    RESULTS.write_text(json.dumps([finding.as_dict() for finding in findings], indent=1) + "\n")
    TABLE.write_text(as_markdown(findings))
    print(f"{sum(finding.routed for finding in findings)} of {len(findings)} families are routed exactly")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
