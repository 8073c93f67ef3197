"""Tiny random Hugging Face models with a real byte-level tokenizer, built without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = ("llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "mixtral")
"""What ``make_tiny_model`` builds; at least one of each family."""
BRIDGED = ("gemma", "nemotron")
"""It builds these, too: families that only ``model.fallback=megatron_bridge`` knows."""
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "n"), ("i", "n"), ("e", "r"), ("i", "s"), ("Ġ", "is"))
"""A few merges, so that one token can be several bytes."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 3 specials (ids 0, 1, 2; eos and pad are ``<|im_end|>`` = 2), 256 bytes, a few merges."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _build(arch: str, shape: dict, vocab: int) -> PreTrainedModel:
    common = {
        "vocab_size": vocab,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **shape,
    }
    if arch in ("llama", "llama_untied"):
        return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=arch == "llama"))
    if arch == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
    if arch == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16, tie_word_embeddings=True))
    if arch == "mistral":
        return MistralForCausalLM(MistralConfig(**{"sliding_window": 24} | common))
    if arch in ("gemma2", "gemma3_text"):
        # One head dimension that is not hidden / heads, another scale of the scores, a window in every other layer.
        gemma = {
            "hidden_act": "gelu_pytorch_tanh",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
        } | common
        if arch == "gemma2":
            return Gemma2ForCausalLM(
                Gemma2Config(**{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0} | gemma)
            )
        return Gemma3ForCausalLM(Gemma3TextConfig(**{"sliding_window_pattern": 2} | gemma))
    if arch == "qwen3_moe":
        moe = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **moe, head_dim=16))
    if arch == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2))
    if arch == "gemma":
        return GemmaForCausalLM(GemmaConfig(**common, head_dim=32))
    if arch == "nemotron":
        return NemotronForCausalLM(NemotronConfig(**common, head_dim=16))
    raise ValueError(f"unknown tiny architecture {arch!r}")


def make_tiny_model(
    path: str | Path,
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    vocab: int = 512,
    seed: int = 0,
    scale: float = 3.0,
    **shape: Any,
) -> Path:
    """Save a random tiny model and its tokenizer as a Hugging Face folder.

    Four heads of dimension 16, two key/value heads, two layers: fits tensor parallelism 2.

    Args:
        path: folder to write.
        arch: ``llama`` (tied embeddings), ``llama_untied``, ``qwen2`` (tied, q/k/v biases), ``qwen3`` (tied,
            q/k norms), ``mistral`` (untied, a window of 24), ``gemma2`` or ``gemma3_text`` (tied, a window of 24
            in the first of two layers), ``qwen3_moe`` or ``mixtral`` (4 experts, 2 of them a token), ``gemma``
            (tied, scaled embeddings), ``nemotron`` (untied, LayerNorm, an MLP without gate, half of a head rotates).
        dtype: type of the saved weights.
        vocab: vocabulary size, at least 267 (the tokenizer's).
        seed: of the weights. The global RNG is left as it was.
        scale: factor on the initial matrices, so that distributions are not nearly flat.
        shape: overrides of the config, e.g. ``num_hidden_layers=4``.

    Returns:
        The folder.
    """
    tokenizer = make_tokenizer()
    if vocab < len(tokenizer):
        raise ValueError(f"vocab must be at least {len(tokenizer)}")
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(arch, size, vocab)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
                else:  # norms away from 1 and biases away from 0: a swapped or forgotten one must show
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
