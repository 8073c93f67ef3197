"""The document about models lists what the trainer knows."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mapo.megatron.families import FAMILIES

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def test_every_family_has_a_row_in_the_document() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == list(FAMILIES)
