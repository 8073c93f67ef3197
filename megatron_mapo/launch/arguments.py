"""Command-line arguments that every way to start a run shares."""

from __future__ import annotations

import argparse


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
