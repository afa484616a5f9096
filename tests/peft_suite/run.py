"""PEFT's own tests as a yardstick: what passes with `LoraConfig` must pass with `MAnyConfig` in its place.

    python tests/peft_suite/run.py                          # gets PEFT's source, of the installed version, through pip
    python tests/peft_suite/run.py peft-0.21.2.tar.gz       # has it already
    python tests/peft_suite/run.py --parts test_config test_lora_variants

Runs the parts with `MAnyConfig`, offline, with tiny random models in place of those on the Hub. What does not pass
runs with `LoraConfig`. What passes there, and makes a `LoraConfig`, runs with `MAnyConfig` once more, one at a time.
Exits with 1 if any of that still fails and is not among `EXCEPTIONS`, or if one of these is not needed any more.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

PARTS = [
    "test_arrow",
    "test_auto",
    "test_bdlora",
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_helpers",
    "test_hub_features",
    "test_initialization",
    "test_integrations",
    "test_lora_conversion",
    "test_lora_ga",
    "test_lora_intruders",
    "test_lora_megatron",
    "test_lora_variants",
    "test_lorafa",
    "test_loraplus",
    "test_low_level_api",
    "test_mapping",
    "test_mixed",
    "test_other",
    "test_quantization",
    "test_riemannian_lora",
    "test_seq_classifier",
    "test_target_parameters",
    "test_token_classification_qa",
    "test_trainable_tokens",
    "test_tuners_utils",
    "test_xlora",
]

# What a foreign PEFT type cannot do, or what a test says of the name LoRA: which tests, what their failure has to say
# to be this one, and why it is to be expected.
EXCEPTIONS: dict[str, tuple[str, str]] = {
    "tests/test_mixed.py::*": ("PeftMixedModel", "Mixed models take a fixed list of PEFT's own types."),
    "*::test_mixed_model_raises": ("PeftMixedModel", "Mixed models take a fixed list of PEFT's own types."),
    "*::test_mixed_model_from_pretrained_low_cpu_mem_usage_works*": (
        "not supported for mixed models",
        "Mixed models take a fixed list of PEFT's own types.",
    ),
    "*::test_no_infinite_recursion?PeftMixedModel?": (
        "PeftMixedModel",
        "Mixed models take a fixed list of PEFT's own types.",
    ),
    "*::test_add_adapter_rejects_duplicate_name_without_mutation?True?": (
        "PeftMixedModel",
        "Mixed models take a fixed list of PEFT's own types.",
    ),
    "*::TestHotSwapping::*": (
        "MANY",
        "Hotswapping takes the type LORA only; it would leave the projector and the statistics behind.",
    ),
    "*::test_lora_intruders_*": ("not using LoRA", "reduce_intruder_dimension() takes the type LORA only."),
    "*::TestModelAndLayerStatus::test_peft_types_*": ("MANY", "Asserts the name of the type LORA."),
    "*::TestModelAndLayerStatus::test_*": ("- LoraModel", "Asserts the name of the class LoraModel."),
    "*::test_fixed_rank_lora_config": ("isinstance", "convert_to_lora() gives a plain LoraConfig, as it should."),
    "*::test_converted_lora_to_lora_works_and_warns": ("DID NOT WARN", "PEFT warns for the type LORA only."),
    "*::test_save_pretrained_warns_for_unsharded_state_dict": ("DID NOT WARN", "PEFT warns for its own types only."),
}

Results = dict[str, dict[str, Any]]


def source_of_peft(folder: Path) -> Path:
    """Download the source distribution of the installed PEFT into `folder`."""
    wanted = f"peft=={importlib.metadata.version('peft')}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*download, "--dest", str(folder), wanted], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def unpack(source: Path, folder: Path) -> Path:
    """Unpack PEFT's tests, and make a package of them; their own conftest is not part of the source distribution."""
    with tarfile.open(source) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    root = next(path.parent for path in folder.glob("peft-*/tests"))
    (root / "tests" / "__init__.py").touch()
    # Not PEFT's settings: they measure coverage, and turn some warnings of other versions of transformers into errors.
    marks = ["single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"]
    (root / "offline.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {mark}\n" for mark in marks))
    return root


class Suite:
    """The unpacked tests, and the two environments to run them in."""

    def __init__(self, root: Path, work: Path, jobs: int) -> None:
        self.root, self.work, self.jobs = root, work, jobs

    def environment(self, config: str) -> dict[str, str]:
        paths = [HERE, HERE.parents[1], self.root, os.environ.get("PYTHONPATH")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "HF_HOME": str(self.work / f"hub of {config}"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PEFT_SUITE_REPLACE": str(int(config == "MAnyConfig")),
        }

    def fill_hub(self, config: str) -> None:
        command = [sys.executable, str(HERE / "tiny_hub.py"), config]
        subprocess.run(command, env=self.environment(config), stdout=subprocess.DEVNULL, check=True)

    def run(self, config: str, parts: list[str], jobs: int | None = None, **selection: list[str]) -> Results:
        """Run the parts, `only` some tests of theirs or all `but` some, and give the results by test id."""
        results = self.work / "results.json"
        environment = {**self.environment(config), "PEFT_SUITE_RESULTS": str(results)}
        for how, tests in selection.items():
            (self.work / f"{how}.json").write_text(json.dumps(tests))
            environment[f"PEFT_SUITE_{how.upper()}"] = str(self.work / f"{how}.json")
        jobs = self.jobs if jobs is None else jobs
        plugins = ["-p", "lora_replacement", "-p", "no:cacheprovider", *(["-n", str(jobs)] if jobs > 1 else [])]
        options = ["-q", "--tb=short", "--continue-on-collection-errors", "-c", "offline.ini"]
        files = ["--rootdir", str(self.root), *(f"tests/{part}.py" for part in parts)]
        command = [sys.executable, "-m", "pytest", *plugins, *options, *files]
        results.unlink(missing_ok=True)
        with (self.work / f"{config}.log").open("a") as log:
            code = subprocess.run(command, cwd=self.root, env=environment, stdout=log, stderr=log).returncode
        if code not in (0, 1, 5) or not results.exists():
            sys.exit(f"pytest ended with {code}:\n{(self.work / f'{config}.log').read_text()[-3000:]}")
        outcome: Results = json.loads(results.read_text())
        return outcome


def compare(suite: Suite, parts: list[str]) -> bool:
    """Run both ways and print what differs; whether that is what the exceptions say, no more and no less."""
    print("With MAnyConfig ...", flush=True)
    many = suite.run("MAnyConfig", parts)
    seconds: dict[str, float] = collections.Counter()
    for test, result in many.items():
        seconds[_part(test)] += result["seconds"]
    print("With LoraConfig, what did not pass ...", flush=True)
    # It leaves out what passed instead of naming what failed: tests that were not even collected must not be lost.
    lora = suite.run("LoraConfig", parts, but=[test for test in many if _passed(many, test)])
    failing = [test for test in lora if _passed(lora, test) and lora[test]["made_config"]]
    suspects = [test for test in failing if _exception(test, many) is None]
    if suspects:
        print(f"With MAnyConfig again, {len(suspects)} tests that pass with LoraConfig ...", flush=True)
        many |= suite.run("MAnyConfig", sorted({_part(test) for test in suspects}), jobs=1, only=suspects)

    passing = [test for test in many if _passed(many, test) and many[test]["made_config"]]
    if not passing:
        sys.exit("No test passed with MAnyConfig.")
    failing = [test for test in failing if not _passed(many, test)]
    excused = collections.Counter(_exception(test, many) for test in failing)
    for test in failing:
        if _exception(test, many) is None:
            print(f"DIFFERENT: {test}\n{_why(test, many)}")
    passed, failed = collections.Counter(map(_part, passing)), collections.Counter(map(_part, failing))
    for part in parts:
        print(f"{part:35} {passed[part]:5} pass, {failed[part]:3} with LoraConfig only; {seconds[part]:5.0f} s")
    unneeded = 0
    for pattern, (_, reason) in EXCEPTIONS.items():
        if excused[pattern]:
            print(f"excused ({excused[pattern]}): {pattern}\n    {reason}")
        elif any(fnmatch.fnmatchcase(test, pattern) for test in passing + failing):
            unneeded += 1
            print(f"no longer needed as an exception: {pattern}")
    print(
        f"{len(passing)} pass with MAnyConfig. With LoraConfig only pass {len(failing)}, "
        f"and {excused[None]} of these are no exceptions."
    )
    return not excused[None] and not unneeded


def _why(test: str, results: Results) -> str:
    return results[test]["why"] if test in results else "The test is not collected."


def _exception(test: str, results: Results) -> str | None:
    """The pattern among `EXCEPTIONS` that explains why the test fails."""
    applies = (
        p for p, (text, _) in EXCEPTIONS.items() if fnmatch.fnmatchcase(test, p) and text in _why(test, results)
    )
    return next(applies, None)


def _passed(results: Results, test: str) -> bool:
    return test in results and results[test]["outcome"] == "passed"


def _part(test: str) -> str:
    return Path(test.partition("::")[0]).stem


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs PEFT's own tests with LoraConfig and with MAnyConfig in its place, and compares."
    )
    parser.add_argument("source", nargs="?", type=Path, help="PEFT's source distribution; by default pip gets it")
    parser.add_argument("--parts", nargs="+", default=PARTS, metavar="PART", help="test modules to run")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="parallel workers, by pytest-xdist (default: all cores)"
    )
    parser.add_argument("--work", type=Path, help="folder for logs, results and models; default: a temporary one")
    arguments = parser.parse_args()
    if importlib.util.find_spec("datasets") is None:
        sys.exit("PEFT's tests import datasets, which is not installed: pip install datasets")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(tempfile.mkdtemp(dir=arguments.work) if arguments.work else temporary).resolve()
        root = unpack(arguments.source or source_of_peft(work), work)
        suite = Suite(root, work, arguments.jobs)
        for config in ("LoraConfig", "MAnyConfig"):
            suite.fill_hub(config)
        sys.exit(0 if compare(suite, arguments.parts) else 1)


if __name__ == "__main__":
    main()
