#!/usr/bin/env bash
# install_sglang_cpu.sh DIR [PYTHON] : real SGLang that runs on this machine's CPU, in the virtual environment DIR.
#
# For the tests of --engine sglang where there is no GPU: slow, and for plain Llama and DeepSeek-V2 models only. Takes some
# minutes and 1.7 GB, and a Python 3.11 or newer. Afterwards: export ZIPHIUS_TEST_SGLANG_PYTHON=DIR/bin/python
# TORCH_INDEX=URL names a package index with torch's CPU builds, where pip's own configuration does not.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${1:?usage: install_sglang_cpu.sh DIR [PYTHON]}
python=${2:-python3}
version=0.5.23
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
exec 9<"$dir"
! command -v flock >/dev/null || flock 9 # two at once would work in the same place
[ "$(cat "$dir/.sglang-version" 2>/dev/null)" != "$version" ] || ! "$dir/bin/python" -c '' 2>/dev/null || exit 0

die() { printf 'install_sglang_cpu.sh: %s\n' "$*" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than 3.11"
"$python" -m venv --clear "$dir"
pip() {
  "$dir/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --retries 5 --timeout 20 "$@" \
    >"$dir/install.log" 2>&1 || die "pip failed: $(grep -v '^WARNING' "$dir/install.log" | tail -n 2)"
}
pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch==2.13.0
cuda=$("$dir/bin/python" -c 'import torch; print(torch.version.cuda or "")')
[ -z "$cuda" ] || printf 'note: this torch is built for CUDA %s; set TORCH_INDEX for a smaller one\n' "$cuda" >&2
# Their requirements name GPU packages, which the stand-ins below take the place of.
pip --no-deps "sglang==$version" xgrammar==0.2.7 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 openai-harmony==0.0.4 \
  accelerate
pip torch==2.13.0 transformers==5.19.0 tokenizers==0.23.2 openai==2.8.0 sentencepiece soundfile IPython pillow \
  aiohttp fastapi "uvicorn>=0.51" uvloop python-multipart requests pyzmq msgspec orjson pydantic partial_json_parser \
  jsonschema interegular einops scipy numpy gguf dill psutil setproctitle pybase64 tqdm loguru "prometheus-client>=0.20"
site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/sglang_cpu/gpu_stand_ins.py" "$site/gpu_stand_ins.py"
echo 'import gpu_stand_ins; gpu_stand_ins.install()' >"$site/gpu_stand_ins.pth"
SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 "$dir/bin/python" -W ignore -m sglang.launch_server --help >"$dir/install.log" 2>&1 ||
  die "SGLang does not start: $(tail -n 1 "$dir/install.log")"
echo "$version" >"$dir/.sglang-version"
