"""Command-line arguments that every way to start a run shares."""

from __future__ import annotations

import argparse
import re

_SECRET = re.compile(
    r"""((?:api_?key|token|password|secret)["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,}]+)|(://)[^\s/@]+@""", re.IGNORECASE
)


def parse_run(program: str, argv: list[str] | None) -> tuple[str | None, list[str]]:
    """``--config FILE`` and ``section.key=value`` overrides.

    Returns:
        the file (None if not given) and the overrides, as ``config.load_config`` takes them.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that replace the file's")
    arguments = parser.parse_args(argv)
    return arguments.config, arguments.overrides


def hidden(text: str) -> str:
    """``text`` of a command line without the values of what is named like a secret, and without users of addresses.

    ``mapo_hidden`` in ``slurm_job.sh`` is the same for the shell.
    """
    return _SECRET.sub(lambda found: f"{found[1]}***" if found[1] else f"{found[3]}***@", text)
