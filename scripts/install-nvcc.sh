#!/usr/bin/env bash
# Installs the pinned CUDA compiler with pip and prints the path of nvcc, and nothing else, on standard output:
#
#   export NVCC=$(scripts/install-nvcc.sh [DIR])
#
# DIR (default: nvcc-13.0 in inkling's cache folder) is made whole or not at all; where it is there already it is only
# checked. CUDA 13.0 wants a driver of 580 or later on the machine that runs the kernels, and nothing on this one.
# PYTHON: an interpreter with pip (default python3). nvcc itself needs a host C++ compiler.
set -euo pipefail

release=13.0
packages=(nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl)
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/inkling/nvcc-$release}
python=${PYTHON:-python3}

fail() {
    echo "install-nvcc: $*" >&2
    exit 1
}

work=$(mktemp -d)
trap 'rm -rf "$work" "$folder.$$"' EXIT
echo '__global__ void twice(float* x) { x[threadIdx.x] *= 2; }' > "$work/twice.cu"

# The compiler in a folder: is it this release, and does it compile?
check() {
    local nvcc=$1/nvidia/cu13/bin/nvcc
    "$nvcc" --version | grep -q "release $release," || fail "$nvcc is not release $release"
    "$nvcc" -fatbin -gencode=arch=compute_90a,code=sm_90a "$work/twice.cu" -o "$work/twice.fatbin" >&2 ||
        fail "$nvcc does not compile (is there a C++ compiler?)"
    [ -s "$work/twice.fatbin" ] || fail "$nvcc wrote no fatbin"
}

if [ ! -e "$folder" ]; then
    mkdir -p "$(dirname "$folder")"
    # A plain folder, as a virtual environment can't be moved; beside the final one, so that moving is one rename.
    "$python" -m pip install --quiet --root-user-action=ignore --no-deps --target "$folder.$$" \
        "${packages[@]/%/==$release.*}" >&2
    check "$folder.$$"
    mv -T "$folder.$$" "$folder" 2> /dev/null || true # another run may have been first: its result is checked below
fi
[ -x "$folder/nvidia/cu13/bin/nvcc" ] || fail "$folder holds no nvcc: remove it, or name another folder"
check "$folder"
echo "$(cd "$folder" && pwd)/nvidia/cu13/bin/nvcc"
