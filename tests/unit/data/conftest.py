"""Makes ``tests/tiny_models.py`` importable, from whatever folder pytest is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
