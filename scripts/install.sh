#!/usr/bin/env bash
# Make a virtual environment and install clipworks into it: scripts/install.sh VENV [EXTRA]
#
# On a machine without an NVIDIA GPU this never installs the CUDA build of torch (several GB): it looks for a CPU build
# in what pip is set up to use, then at PyTorch's own index, then takes the plain wheel only if it brings no NVIDIA
# package with it. With a GPU it takes pip's default. A torch that is already in VENV is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: scripts/install.sh VENV [EXTRA]}
extra=${2:-}
version=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

log=$(mktemp)
constraint=$(mktemp)
trap 'rm -f "$log" "$constraint"' EXIT
say() { echo "install: $*" >&2; }
stop() { say "$@"; exit 1; }

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || stop "Python 3.10 or later is needed; name one with PYTHON=python3.12 make ..."
    "${PYTHON:-python3}" -m venv "$venv" \
        || stop "no virtual environment could be made in $venv (on Debian: apt install python3-venv)"
fi
python=$venv/bin/python
pip() { "$python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }
torch_version() { "$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }

# pip's plan for the plain wheel, as JSON; true if it holds no NVIDIA package
plain_is_cpu() {
    local report
    report=$(mktemp)
    pip install --dry-run --ignore-installed --report "$report" "torch==$version" >/dev/null 2>&1 \
        && ! grep -qiE '"name": *"(nvidia-|cuda-|triton)' "$report"
    local result=$?
    rm -f "$report"
    return $result
}

install_cpu_torch() {
    pip install "torch==$version+cpu" 2>>"$log" && return
    say "looking for a CPU build of torch at $cpu_index"
    pip install --retries 1 --timeout 20 "torch==$version+cpu" --extra-index-url "$cpu_index" 2>>"$log" && return
    if plain_is_cpu; then pip install "torch==$version" && return; fi
    tail -n 5 "$log" >&2
    stop "no CPU build of torch $version was found, and the default one would bring several GB of CUDA libraries." \
        "Put a wheel of it into a folder and set PIP_FIND_LINKS to that folder, or install the torch of your choice" \
        "with $python -m pip install torch and run this again."
}

if [ -z "$(torch_version)" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then
        say "an NVIDIA GPU is here: installing torch with CUDA"
        pip install "torch>=2.10"
    else
        say "no NVIDIA GPU: installing the CPU build of torch"
        install_cpu_torch
    fi
fi

say "installing clipworks${extra:+[$extra]} beside torch $(torch_version)"
echo "torch==$(torch_version)" >"$constraint" # nothing below may replace it
pip install --constraint "$constraint" --editable ".${extra:+[$extra]}"
