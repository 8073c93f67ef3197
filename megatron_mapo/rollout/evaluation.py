"""Held-out prompts -> scored samples -> pass@k, maj@k and lengths, with intervals.

One path for evaluations during training (``RolloutSession.evaluate``) and ``megatron-mapo eval``. Samples are rows
of plain values, written as each prompt is finished; of them a ``Tally`` keeps the columns that the metrics need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mapo.algorithms.evaluation import bootstrap_interval, maj_at_n, pass_at_k, pass_at_k_sizes
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.rollout.client import Response
from megatron_mapo.rollout.sampler import Sampler
from megatron_mapo.rollout.scoring import Scorer, right_verdicts

Row = dict[str, Any]
GREEDY = "greedy"
"""``sample`` of a greedy response; sampled ones are numbered from 0."""


def row_order(row: Mapping[str, Any]) -> tuple[int, int]:
    """Sort key of samples: by prompt; a prompt's sampled responses, then the greedy one."""
    sample = row["sample"]
    return row["prompt_id"], 1 << 62 if sample == GREEDY else sample


class Tally:
    """What the metrics need of the samples: ``[P, S]`` columns, S responses a prompt.

    Args:
        prompts: P.
        samples: sampled responses a prompt.
        greedy: one greedy response a prompt beside them, in the last column.
        extracts: rows have the extracted answers, so maj@k can be told.

    Attributes:
        done: bool ``[P]``, all rows of the prompt were added.
        rewards, lens, truncated: ``[P, S]`` float64, int64, bool.
        right: bool ``[P, S]``, the response is right.
        answers: int64 ``[P, S]``, which of the prompt's different answers; -1: none was extracted.
    """

    def __init__(self, prompts: int, samples: int, greedy: bool, extracts: bool) -> None:
        if samples < 0 or samples + greedy == 0:
            raise ValueError("an evaluation needs at least one response a prompt")
        self.samples, self.greedy, self.extracts = samples, greedy, extracts
        shape = (prompts, samples + greedy)
        self.done = torch.zeros(prompts, dtype=torch.bool)
        self.rewards = torch.zeros(shape, dtype=torch.float64)
        self.right = torch.zeros(shape, dtype=torch.bool)
        self.lens = torch.zeros(shape, dtype=torch.int64)
        self.truncated = torch.zeros(shape, dtype=torch.bool)
        self.answers = torch.full(shape, -1, dtype=torch.int64)

    def add(self, rows: Sequence[Row]) -> None:
        """All rows of one prompt, in the order of ``row_order``."""
        prompt = rows[0]["prompt_id"]
        ids: dict[str, int] = {}
        self.rewards[prompt] = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
        self.right[prompt] = torch.tensor([row["right"] for row in rows])
        self.lens[prompt] = torch.tensor([row["length"] for row in rows])
        self.truncated[prompt] = torch.tensor([row["truncated"] for row in rows])
        answers = [row["extracted"] for row in rows]
        self.answers[prompt] = torch.tensor([-1 if a is None else ids.setdefault(a, len(ids)) for a in answers])
        self.done[prompt] = True

    def add_complete(self, rows: Iterable[Row]) -> list[Row]:
        """Add the prompts that are complete in ``rows``, and return their rows; half a prompt is left out."""
        expected = [*range(self.samples), *([GREEDY] if self.greedy else [])]
        prompts: dict[int, list[Row]] = {}
        for row in rows:
            prompts.setdefault(row["prompt_id"], []).append(row)
        kept = []
        for found in prompts.values():
            found.sort(key=row_order)
            if [row["sample"] for row in found] == expected:
                self.add(found)
                kept += found
        return kept

    def metrics(self, seed: int) -> dict[str, float]:
        """The numbers of an evaluation; a mean over prompts comes with ``NAME_low`` and ``NAME_high`` (95 %).

        ``greedy_accuracy``, ``pass_at_K`` for several K, ``maj_at_N`` if the verifier extracts answers, lengths,
        truncated and answered shares, mean rewards. Without sampled responses ``pass_at_1`` is of the greedy one.

        Args:
            seed: of the bootstrap.

        Raises:
            ValueError: a prompt is not done.
        """
        if not bool(self.done.all()):
            raise ValueError(f"{int((~self.done).sum())} prompts are not evaluated yet")
        columns = self._columns()
        values = torch.stack(list(columns.values()), dim=1)
        low, high = bootstrap_interval(values, seed)
        result = {"prompts": float(len(self.done)), "samples_per_prompt": float(self.samples)}
        for i, name in enumerate(columns):
            result |= {name: float(values[:, i].mean()), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
        return result

    def _columns(self) -> dict[str, Tensor]:
        """One value a prompt for every metric, float64 ``[P]``."""
        n = self.samples
        columns: dict[str, Tensor] = {}
        if self.greedy:
            columns["greedy_accuracy"] = self.right[:, n].double()
        sizes = pass_at_k_sizes(n) if n else [1]
        passes = pass_at_k(self.right[:, :n] if n else self.right, sizes)
        columns |= {f"pass_at_{k}": passes[:, i] for i, k in enumerate(sizes)}
        if n and self.extracts:
            columns[f"maj_at_{n}"] = maj_at_n(self.answers[:, :n], self.right[:, :n])
        kinds = {"sampled": slice(0, n)} if n else {}
        for kind, part in (kinds | ({"greedy": slice(n, n + 1)} if self.greedy else {})).items():
            columns[f"{kind}_length_mean"] = self.lens[:, part].double().mean(1)
            columns[f"{kind}_truncated"] = self.truncated[:, part].double().mean(1)
            columns[f"{kind}_reward_mean"] = self.rewards[:, part].mean(1)
            if self.extracts:
                columns[f"{kind}_answered"] = (self.answers[:, part] >= 0).double().mean(1)
        return columns


def metric_names(samples: int, greedy: bool, extracts: bool) -> list[str]:
    """Names of ``Tally.metrics``; the arguments are those of ``Tally``."""
    tally = Tally(1, samples, greedy, extracts)
    tally.done[:] = True
    return list(tally.metrics(0))


class Evaluator:
    """Samples, scores and extracts.

    Args:
        sampler: knows servers, temperature and length limit.
        scorer: text, rewards and extracted answers of responses.
        right_from: smallest reward that counts as right, where ``reward.success`` does not say what is.
    """

    def __init__(self, sampler: Sampler, scorer: Scorer, right_from: float) -> None:
        self.sampler, self.scorer, self.right_from = sampler, scorer, right_from

    def run(self, prompts: Sequence[Prompt], tally: Tally, seed: int, write: Callable[[list[Row]], None]) -> None:
        """Evaluate the prompts that ``tally`` does not have yet.

        Args:
            prompts: all prompts; ids are their positions.
            tally: takes the samples.
            seed: of this evaluation.
            write: called with all rows of a prompt, as soon as it is finished.

        Raises:
            DataError, RolloutError, RewardError: as ``Sampler.sample``.
        """

        async def arrived(prompt: Prompt, sampled: list[Response], greedy: list[Response]) -> None:
            rows = await self._rows(prompt, sampled, greedy)
            write(rows)
            tally.add(rows)

        missing = [prompts[i] for i in (~tally.done).nonzero().flatten().tolist()]
        if missing:
            self.sampler.evaluate(missing, tally.samples, tally.greedy, seed, arrived)

    async def _rows(self, prompt: Prompt, sampled: list[Response], greedy: list[Response]) -> list[Row]:
        responses = [*sampled, *greedy]
        texts = self.scorer.texts([r.token_ids for r in responses])
        verdicts, answers = await self.scorer.judge(prompt, texts), await self.scorer.extract(texts)
        right = right_verdicts(verdicts, self.right_from)
        return [
            {
                "prompt_id": prompt.id,
                "sample": index if index < len(sampled) else GREEDY,
                "prompt": prompt.question,
                "answer": prompt.answer,
                "response": text,
                "reward": verdict.reward,
                "right": right[index],
                **({"rewards": verdict.parts} if verdict.parts else {}),
                "extracted": answer,
                "truncated": response.truncated,
                "length": len(response.token_ids),
                "finish": response.finish_reason,
            }
            for index, (response, text, verdict, answer) in enumerate(
                zip(responses, texts, verdicts, answers, strict=True)
            )
        ]
