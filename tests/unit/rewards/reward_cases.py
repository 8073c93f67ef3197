"""Verifiers that behave and misbehave, for test_pool.py: found by import path, run in real worker processes."""

import os
import re
import sys
import time


def equal(response, answer, metadata):
    return response == answer


def score(response, answer, metadata):
    return float(response)


def by_metadata(response, answer, metadata):
    return metadata["day"].year == int(answer)


def process_id(response, answer, metadata):
    print("verifiers may print", flush=True)
    return os.getpid()


def is_loaded(response, answer, metadata):
    return response in sys.modules


def obey(response, answer, metadata):
    """Do what the response says; otherwise compare."""
    if response == "raise":
        raise ValueError("bad response")
    if response == "spin":
        while True:
            pass
    if response == "hold the interpreter lock":
        return re.match(r"(a+)+$", "a" * 60 + "b") is None
    if response == "sleep":
        time.sleep(1000)
    if response == "die":
        os._exit(7)
    if response == "eat":
        return len(bytearray(4 << 30)) > 0
    if response == "text":
        return "yes"
    if response == "none":
        return None
    return response == answer


not_a_function = 3


def extract(response):
    """What the verifiers of this file would read: they obey, so does this."""
    if response == "raise in extract":
        raise ValueError("cannot read")
    if response == "number":
        return 3
    obey(response, "", {})
    return response.lower() or None
