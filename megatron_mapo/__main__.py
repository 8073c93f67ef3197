"""``python -m megatron_mapo`` is ``megatron-mapo``."""

import sys

from megatron_mapo.cli import main

if __name__ == "__main__":
    sys.exit(main())
