#!/usr/bin/env bash
# One command from a fresh checkout to a trained model on a CPU. Arguments are section.key=value overrides.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh ""
exec .venv/bin/python -m megatron_mapo launch local --config configs/quickstart.yaml "$@"
