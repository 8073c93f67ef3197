"""A small model that can do a reasoning-gym task a little: the start of the baseline comparisons.

    python benchmarks/warm_start.py chain_sum --output build/chain_sum

A Llama of about a million parameters with one token a character is trained from scratch on question and answer until
its sampled accuracy on other questions reaches ``--accuracy``. Reinforcement learning takes it from there. The folder
is an ordinary Hugging Face model, with ``train.jsonl`` and ``heldout.jsonl`` beside it: entries of reasoning-gym, of
whose questions only the part that differs is kept (``17 + 4 =``), which is a sixth of the tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 10},
}
"""Options of the tasks."""
SEED = 77_000_000
"""Of the rows that the warm start sees; far from those of training and evaluation."""
FILES = {"train": (0, 20_000), "heldout": (50_000_000, 256)}
"""Seed and rows of each file."""
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
    "{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LONGEST_ANSWER = 14


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three special tokens."""
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(vocab: int) -> LlamaForCausalLM:
    """Four layers, about a million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def rows_of(task: str, seed: int, size: int) -> list[tuple[str, str]]:
    """Question, without the sentence that all have, and answer of a task's entries."""
    data = reasoning_gym.create_dataset(task, seed=seed, size=size, **TASKS[task])
    return [(entry["question"].rpartition(": ")[2], entry["answer"]) for entry in data]


def write_rows(task: str, folder: Path) -> None:
    """The files of training and evaluation; what is held out is in neither training nor warm start."""
    held_out = dict.fromkeys(rows_of(task, *FILES["heldout"]))
    train = [row for row in rows_of(task, *FILES["train"]) if row not in held_out]
    for name, rows in (("train", train), ("heldout", list(held_out))):
        lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def encode(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The prompt as the trainer will send it."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def batches(tokenizer: PreTrainedTokenizerFast, task: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless tokens and labels, ``[size, L]`` each; only answers are labels."""
    seed, held_out = SEED, set(rows_of(task, *FILES["heldout"]))
    while True:
        rows = [row for row in rows_of(task, seed, size) if row not in held_out]
        seed += size  # entry i of a data set is made from seed + i
        full = []
        for question, answer in rows:
            prompt = encode(tokenizer, question)
            target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            full.append((prompt + target, [-100] * len(prompt) + target))
        longest = max(len(tokens) for tokens, _ in full)
        tokens = torch.tensor([t + [0] * (longest - len(t)) for t, _ in full])
        labels = torch.tensor([t + [-100] * (longest - len(t)) for _, t in full])
        yield tokens, labels


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> float:
    """Share of questions whose one sampled answer is right."""
    prompts = [encode(tokenizer, question) for question, _ in rows]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=LONGEST_ANSWER, do_sample=True, top_k=0, pad_token_id=0
    )
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return sum(text.strip() == answer for text, (_, answer) in zip(texts, rows, strict=True)) / len(rows)


def train(task: str, wanted: float, longest: float, size: int, lr: float) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train until the sampled accuracy is ``wanted``, at most ``longest`` seconds."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    rows, start, reached = rows_of(task, SEED - 1000, 256), time.monotonic(), 0.0
    for step, (tokens, labels) in enumerate(batches(tokenizer, task, size), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 100)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            reached = accuracy(model.eval(), tokenizer, rows)
            model.train()
            print(f"step {step}: loss {loss.item():.3f}, accuracy {reached:.3f}", flush=True)
            if reached >= wanted or time.monotonic() - start > longest:
                break
    return model, {"steps": step, "accuracy": reached, "seconds": round(time.monotonic() - start)}


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--accuracy", type=float, default=0.25, help="sampled accuracy to reach (default: 0.25)")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this long in any case")
    parser.add_argument("--batch", type=int, default=128, help="rows of a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    arguments = parser.parse_args()
    model, reached = train(arguments.task, arguments.accuracy, arguments.seconds, arguments.batch, arguments.lr)
    model.save_pretrained(arguments.output)
    make_tokenizer().save_pretrained(arguments.output)
    write_rows(arguments.task, arguments.output)
    (arguments.output / "warm_start.json").write_text(json.dumps({"task": arguments.task, **reached}) + "\n")
    print(f"{arguments.output}: {reached}")


if __name__ == "__main__":
    main()
