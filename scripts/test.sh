#!/usr/bin/env bash
# Linters, types, tests: `scripts/test.sh [--all] [pytest arguments]`. --all adds the tests marked slow.
# Two processes share the test files, because many tests wait for a server or use one core (-n 0: one process).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh --dev

selection=()
if [ "${1:-}" = --all ]; then
  selection=(-m "")
  shift
fi

python=.venv/bin/python
failed=()
"$python" -m ruff check . || failed+=("ruff check")
"$python" -m ruff format --check . || failed+=("ruff format")
"$python" -m mypy || failed+=("mypy")
"$python" -m pytest -n 2 --dist loadfile "${selection[@]}" "$@" || failed+=("pytest")
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
