"""One megatron runtime of a single process for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_mapo.config import Config, Dtype
from megatron_mapo.megatron import runtime as megatron_runtime
from megatron_mapo.megatron.runtime import Runtime


@pytest.fixture
def config() -> Config:
    """Defaults in float32."""
    config = Config()
    config.model.dtype = Dtype.float32
    return config


@pytest.fixture(scope="package")
def runtime() -> Iterator[Runtime]:
    """This process alone. The variables that torchrun would set are taken back at once."""
    before = dict(os.environ)
    config = Config()
    config.trainer.threads = 1
    try:
        found = megatron_runtime.initialize(config)
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield found
    found.close()
