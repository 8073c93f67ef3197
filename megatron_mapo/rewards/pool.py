"""Rewards of responses: runs the verifiers of section ``reward`` and puts their judgements together."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megatron_mapo.algorithms.evaluation import is_right
from megatron_mapo.config import OnFailure, RewardComponent, RewardConfig
from megatron_mapo.errors import RewardError
from megatron_mapo.rewards.processes import Reply, VerifierProcesses
from megatron_mapo.rewards.registry import EXTRACT

_SHOWN = 200
"""Letters of a response in error messages."""


@dataclass(frozen=True)
class Failure:
    """Why a response could not be judged.

    Attributes:
        kind: ``timeout``, ``memory``, ``died``, or the name of an exception.
        text: what happened, for people.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What the verifiers say of one response.

    Attributes:
        reward: its reward; of a mixture the weighted sum of ``parts``.
        success: the component ``reward.success`` calls it a success; None where none is declared.
        parts: what each component of a mixture gives, by its label; empty without a mixture.
        failure: the first component's that failed and counted all the same (``reward.on_failure=wrong``).
    """

    reward: float
    success: bool | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None


class RewardPool:
    """The verifiers of section ``reward``, each in processes of its own (see ``processes``).

    A verifier that takes longer than ``reward.timeout`` seconds, or more than ``reward.memory_mb`` MiB, or ends its
    process, has its process replaced; the other responses are scored all the same. Calls may overlap, and come from
    different event loops. The processes end with this one, also if it is killed.

    Use it as a context manager, or call ``close``.

    Attributes:
        failures: verifications so far that failed and counted as wrong (``reward.on_failure=wrong``).
        extracts: ``extract`` can be called: there is an extractor beside the verifier, of a mixture that of
            ``reward.success``, else of the first component.

    Raises:
        ConfigError: a verifier is unknown or cannot be imported, or its options are wrong.
        RewardError: a verifier process does not start.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.failures = 0
        self._lock = threading.Lock()
        self._parts: list[VerifierProcesses] = []
        try:
            for index, component in enumerate(config.components):
                self._parts.append(VerifierProcesses(component, config.section_of(index), config))
                self._parts[-1].start()
            for part in self._parts:  # all of them import at the same time
                part.wait_ready()
        except BaseException:
            self.close()
            raise
        self._main = config.components.index(config.main)
        self.extracts = self._parts[self._main].extracts

    async def judge(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        prompts: Sequence[str] | None = None,
    ) -> list[Verdict]:
        """Judge N responses.

        Args:
            responses: N texts.
            answers: N reference answers.
            metadata: N rows' other columns.
            prompts: N questions, for verifiers that take them; None: empty ones.

        Returns:
            N verdicts, in order.

        Raises:
            RewardError: a verifier raised, hung, died or returned something else than a bool or a finite number,
                and ``reward.on_failure`` is ``error``.
        """
        questions = [""] * len(responses) if prompts is None else prompts
        rows = list(zip(responses, answers, metadata, questions, strict=True))
        asked = [
            asyncio.ensure_future(part.ask("judge", rows, functools.partial(self._accept, index)))
            for index, part in enumerate(self._parts)
        ]
        try:
            replies = await asyncio.gather(*asked)
        finally:
            for one in asked:
                one.cancel()
        return [self._verdict(of_row) for of_row in zip(*replies, strict=True)]

    async def score(
        self, responses: Sequence[str], answers: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> list[float]:
        """Rewards of N responses; see ``judge``."""
        return [verdict.reward for verdict in await self.judge(responses, answers, metadata)]

    async def extract(self, responses: Sequence[str]) -> list[str | None]:
        """The answers that N responses state, by the extractor beside the verifier.

        An extractor that takes too long or too much memory gives None for that response, and a warning: the
        response's reward is known all the same. One that raises gives an error or, with ``reward.on_failure=wrong``,
        None.

        Returns:
            N texts or None, in order.

        Raises:
            RewardError: the extractor raised or returned something that is neither text nor None.
        """
        rows = [(response,) for response in responses]
        replies = await self._parts[self._main].ask("extract", rows, self._accept_extracted)
        return [reply.get("answer") for reply in replies]

    def process_ids(self) -> list[int]:
        """Of all verifier processes that run now."""
        return [pid for part in self._parts for pid in part.process_ids()]

    def close(self) -> None:
        """End all processes, at once."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, index: int, reply: Reply, row: tuple[Any, ...]) -> None:
        """A failed judgement is an error or is counted."""
        if "error" not in reply:
            return
        if self.config.on_failure is OnFailure.error:
            raise self._error(index, "verifier", reply, row[0])
        with self._lock:
            self.failures += 1

    def _accept_extracted(self, reply: Reply, row: tuple[Any, ...]) -> None:
        limited = reply.get("kind") in ("timeout", "memory", "died")
        if "error" in reply and not limited and self.config.on_failure is OnFailure.error:
            raise self._error(self._main, f"verifier's `{EXTRACT}`", reply, row[0])

    def _verdict(self, replies: tuple[Reply, ...]) -> Verdict:
        """One response's verdict from its replies, one a component."""
        config = self.config
        values = [self._value(*pair) for pair in zip(config.components, replies, strict=True)]
        failure = next((Failure(reply["kind"], reply["error"]) for reply in replies if "error" in reply), None)
        if not config.mixture:
            return Verdict(values[0], failure=failure)
        # Exact but for one rounding: 0.7 + 0.2 + 0.1 reaches a threshold of 1.
        reward = math.fsum(component.weight * value for component, value in zip(config.mixture, values, strict=True))
        parts = {component.title: value for component, value in zip(config.mixture, values, strict=True)}
        success = None if config.success is None else self._is_success(replies[self._main])
        return Verdict(reward, success, parts, failure)

    def _value(self, component: RewardComponent, reply: Reply) -> float:
        """What a component gives; where it failed, the worse of right and wrong.

        With a negative weight that is right: else a response that makes the verifier of a penalty fail escapes it.
        """
        if "score" in reply:
            return reply["score"]
        right = component.weight < 0 if "error" in reply else reply["right"]
        return self.config.correct if right else self.config.wrong

    def _is_success(self, reply: Reply) -> bool:
        if "score" in reply:
            least = self.config.success_score
            return bool(is_right(reply["score"], self.config.correct if least is None else least))
        return reply.get("right", False)

    def _error(self, index: int, what: str, reply: Reply, response: str) -> RewardError:
        name, section = self.config.components[index].name, self.config.section_of(index)
        return RewardError(
            f"{section}.name={name!r}: the {what} {reply['error']} on the response {response[:_SHOWN]!r}"
            f"{'...' if len(response) > _SHOWN else ''}; mend it, raise reward.timeout={self.config.timeout:g} or "
            "reward.memory_mb, or set reward.on_failure=wrong"
        )
