"""Put every family of transformers that takes images and text through `peft_many`, and write docs/families.md.

Usage:
    python scripts/coverage.py                 all families, about two minutes
    python scripts/coverage.py llava qwen2_vl  some of them, and only print
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
from tests.families.rows import FAMILIES
from tests.families.table import RESULTS, TABLE, as_markdown


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    logging.captureWarnings(True)
    transformers.logging.set_verbosity_error()
    findings: list[Finding] = []
    with new_process() as process, tempfile.TemporaryDirectory() as folder:
        for family in tqdm(wanted or list(FAMILIES), unit="family"):
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
