"""Runs over sequences by vLLM's engine, for scoring."""

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import RetryableRequestError
from vllm.inputs import tokens_input

from workers.vllm_plugin.scoring import told


class EngineRuns:
    """The runs of one request (`scoring.Runs`).

    Args:
        engine: vLLM's `EngineClient`.
        adapter: vLLM's `LoRARequest`; None for the base model.
        cache_salt: whose part of the prefix cache is read and written.
        priority: runs with a smaller one come first.
        request_id: begins the ids of the runs.
    """

    def __init__(self, engine: Any, *, adapter: Any, cache_salt: str, priority: int, request_id: str) -> None:
        self._engine = engine
        self._adapter = adapter
        self._cache_salt = cache_salt
        self._priority = priority
        self._request_id = request_id
        self._count = 0

    async def fill(self, tokens: list[int]) -> None:
        await self._generate(tokens, SamplingParams(max_tokens=1, temperature=0, detokenize=False))

    async def run(self, tokens: list[int]) -> Sequence[float]:
        """The last token is sampled as the only one allowed; vLLM's log-probabilities are those of before that restriction.

        Raises:
            RetryableRequestError: see `told`.
        """
        *prompt, last = tokens
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            allowed_token_ids=[last],
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            flat_logprobs=True,
            skip_reading_prefix_cache=False,
            detokenize=False,
        )
        logprobs = told(tokens, await self._generate(prompt, params))
        if logprobs is None:
            raise RetryableRequestError("The engine put a sequence aside while it scored it; please retry.")
        return logprobs

    async def _generate(self, tokens: list[int], params: SamplingParams) -> Any:
        self._count += 1
        outputs = self._engine.generate(
            tokens_input(tokens, cache_salt=self._cache_salt),
            params,
            f"{self._request_id}-{self._count}",
            lora_request=self._adapter,
            priority=self._priority,
        )
        return [output async for output in outputs][-1]
