"""Rollouts by vLLM, which is given the trained adapter anew whenever its weights have changed, and lets go of the one before.

The log-probabilities are vLLM's, by its own kernels and its own precision: they are those that the replies were drawn by, so they are the
old policy's of the importance ratio.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from service.domain.slow_weights import Scope, version_name
from service.engine import Engine, Sampled
from service.errors import EngineUnavailable, JobFailed, UpstreamRejected
from service.settings import Settings
from service.vllm import VllmEngine
from workers.adapter_store import AdapterStore, adapter_store
from workers.adapter_store.versions import PROVENANCE, WEIGHTS, Unreported, sha256_of
from workers.consolidation.artifact import aside
from workers.fst.policy import Policy, snapshot
from workers.fst.rollouts import Asked, Rollers, Rollout, Sampling, Tokens, rolled
from workers.retention import replicas

log = logging.getLogger(__name__)

T = TypeVar("T")

TENANT = "fastslow-fst"
"""Of all runs' adapters, apart from those of every tenant that is served."""
# A vLLM that is started again takes minutes; a run that is stopped loses a cycle.
PATIENCE_SECONDS = 300.0


@contextmanager
def served(policy: Policy, *, out: Path, settings: Settings) -> Iterator[Rollers]:
    """The policy's replies by the vLLM of the settings, whose adapter store is theirs too; no adapter of the run is left afterwards.

    Args:
        out: the run's folder, by which its adapters are told from other runs'.

    Raises:
        EngineUnavailable: vLLM does not answer.
        JobFailed: it can't be given an adapter, or does not come back.
    """
    with asyncio.Runner() as runner:
        engine = runner.run(_opened(settings))
        adapters = _Adapters(policy, adapter_store(settings), runner, settings, run=_digest(out))
        try:
            runner.run(engine.ready())
            adapters.forget()
            with policy.frozen() as base:
                name = base.name
            yield Rollers(
                trained=OnVllm(policy, engine, runner, settings, model=adapters.current),
                frozen=OnVllm(policy, engine, runner, settings, model=lambda: name),
            )
        finally:
            adapters.forget()
            runner.run(engine.close())


@dataclass(frozen=True)
class OnVllm:
    """A `Roller` over vLLM.

    Args:
        model: what vLLM is asked for, asked itself before each call.
    """

    policy: Policy
    engine: Engine
    runner: asyncio.Runner
    settings: Settings
    model: Callable[[], str]

    def roll(self, asked: Sequence[Asked], sampling: Sampling, *, samples: int, seed: str) -> list[Rollout]:
        model = self.model()

        def draw(prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], new_tokens: int) -> list[list[Sampled]]:
            return self.runner.run(self._drawn(model, prompts, seeds, new_tokens, end=base.tokenizer.eos_token_id))

        with self.policy.frozen() as base:
            return rolled(base, asked, sampling, draw, samples=samples, seed=seed)

    async def _drawn(
        self, model: str, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], new_tokens: int, *, end: int
    ) -> list[list[Sampled]]:
        # No more than vLLM has in a batch: what waits in its queue can be refused.
        room = asyncio.Semaphore(max(self.settings.vllm_max_sequences // max(map(len, seeds)), 1))

        async def one(number: int) -> list[Sampled]:
            async with room:
                return await _patiently(
                    lambda: self.engine.sample(
                        prompts[number],
                        model=model,
                        samples=len(seeds[number]),
                        max_tokens=new_tokens,
                        end=end,
                        # Of the first reply; vLLM counts on from it.
                        seed=seeds[number][0],
                        cache_salt=TENANT,
                        request_id=f"fst-{seeds[number][0]:x}",
                    )
                )

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(number)) for number in range(len(prompts))]
        except ExceptionGroup as problems:
            # The others were cancelled over the first.
            raise problems.exceptions[0] from None
        return [task.result() for task in tasks]


class _Adapters:
    """The run's adapters in the store: one at a time."""

    def __init__(
        self, policy: Policy, store: AdapterStore, runner: asyncio.Runner, settings: Settings, *, run: str
    ) -> None:
        self._policy = policy
        self._store = store
        self._runner = runner
        self._settings = settings
        self._run = run
        self._scope = Scope(kind="user", name=run)
        self._weights: list[Tensor] = []
        self._name = ""
        self._number = 0

    def current(self) -> str:
        """The version of the weights as they are, published if it is not yet.

        Raises:
            JobFailed: the adapter store can't be written to.
        """
        weights = snapshot(self._policy)
        if self._name and all(torch.equal(a, b) for a, b in zip(weights, self._weights, strict=True)):
            return self._name
        before, self._name, self._weights = self._name, self._published(), weights
        if before and before != self._name:
            self._runner.run(self._forgotten([before]))
        return self._name

    def forget(self) -> None:
        """Remove all of them, those of an earlier process that was killed too. Where vLLM is away they stay until the run goes on."""
        prefix = f"fs-{self._scope.digest(TENANT)}-"
        names = [name for name in self._store.names() if name.startswith(prefix)]
        self._name = ""
        if names:
            self._runner.run(self._forgotten(names))

    def _published(self) -> str:
        with aside(self._store, job=self._run) as folder:
            files = self._policy.export(folder, scale=1.0)
            sha256 = sha256_of(files / WEIGHTS)
            self._number += 1
            name = version_name(self._scope, tenant=TENANT, number=self._number, content_sha256=sha256)
            with self._policy.frozen() as base:
                provenance = Unreported(
                    tenant=TENANT,
                    scope=str(self._scope),
                    job=self._run,
                    name=name,
                    base_model=base.name,
                    content_sha256=sha256,
                )
            (files / PROVENANCE).write_text(provenance.model_dump_json())
            # The same weights under the same number: an earlier process of the run could not take them back.
            with suppress(FileExistsError):
                self._store.put(files, name)
            return name

    async def _forgotten(self, names: Sequence[str]) -> None:
        async with replicas(self._settings) as evict:
            for name in names:
                try:
                    if await evict(name):
                        await asyncio.to_thread(self._store.delete, name)
                except EngineUnavailable as error:
                    log.warning("%s stays in the adapter store until the run goes on: %s", name, error)


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What is asked for, again and again while vLLM is away or busy.

    Raises:
        JobFailed: for too long; or it refuses.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE_SECONDS
    while True:
        try:
            return await ask()
        except UpstreamRejected as error:
            raise JobFailed(
                f"vLLM refuses to draw replies: {error.message} It must run with our plugin, over the adapter store of these settings."
            ) from error
        except EngineUnavailable as error:
            wait = error.retry_after_seconds or 1
            if loop.time() + wait > until:
                raise JobFailed(f"no rollouts for {PATIENCE_SECONDS:g} s: {error.message}") from error
            await asyncio.sleep(wait)


async def _opened(settings: Settings) -> VllmEngine:
    return VllmEngine(settings)


def _digest(out: Path) -> str:
    return f"run-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]}"
