"""A real server on a tiny random model: one token there and back."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_mapo.config import Config, ModelConfig
from megatron_mapo.doctor.finding import Finding, failure, ok
from megatron_mapo.errors import RolloutError
from megatron_mapo.hardware import native_dtype
from megatron_mapo.rollout.client import Response, RolloutClient, Sampling
from megatron_mapo.rollout.server import ServerGroup

_VOCAB = 256


def check(config: Config) -> Iterator[Finding]:
    """Start a server on a free loopback port, sample one token, end the server."""
    settings = dataclasses.replace(
        config.rollout.server,
        count=1,
        host="127.0.0.1",
        port=0,
        tensor=1,
        max_total_tokens=2048,
        max_running_requests=4,
        mem_fraction=0.3,
        extra_args=[],
    )
    key = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig(path=str(make_model(Path(folder) / "model")), dtype=native_dtype())
        begin = time.monotonic()
        try:
            with ServerGroup(settings, model, Path(folder) / "logs", key) as servers:
                ready = time.monotonic() - begin
                (response,) = asyncio.run(_sample(servers.urls[0], key))
        except RolloutError as error:
            yield failure("server", str(error), "scripts/setup.sh, or docs/install.md for CUDA")
            return
    yield ok("server", f"ready after {ready:.0f} s; one token, log-prob {response.logprobs[0]:.3f}")


async def _sample(url: str, key: str) -> list[Response]:
    client = RolloutClient([url], key, timeout=60.0, retries=0, vocab_size=_VOCAB)
    try:
        return await client.generate([5, 6, 7], 1, Sampling(max_tokens=1))
    finally:
        await client.close()


def make_model(path: Path) -> Path:
    """A random Llama of two layers with a tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()  # among the lines of the report it would look like one
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, _VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
