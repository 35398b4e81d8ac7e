"""Replies of the model in training, scored by their verifier: temperature 1, no cut, old log-probabilities recorded.

They are drawn by this process (here) or by vLLM (`served.py`). Here the noise of a reply comes from a seed of its own, so that it does not
depend on what else is in the batch.

Letters: B rows, T tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from service.engine import Sampled
from service.verifiers import Problem, Verdict
from workers.consolidation.base import Base
from workers.consolidation.rows import Row, batches
from workers.consolidation.sampling import GumbelNoise, sample
from workers.fst.contexts import TaskContext
from workers.fst.policy import Policy

# Tokens of the caches of one batch, prompts with padding and replies: 90 KB each for the default model in float32.
BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}
# What is said of a reply without an end, as advice.
SHORTER = "Answer in fewer words."

T = TypeVar("T")
Tokens = tuple[int, ...]
Draw = Callable[[Sequence[Tokens], Sequence[Sequence[int]], int], list[list[Sampled]]]
"""(prompts, a seed for each reply to each of them, most tokens of a reply) -> replies to each prompt."""


@dataclass(frozen=True)
class Sampling:
    """How replies are made and looked at."""

    new_tokens: int
    """Most tokens of a reply."""
    count_cut_off: bool = False
    """Whether a reply that did not end within them is scored as it stands; else it earns 0."""
    rewarded: bool = True
    """Whether the verifier looks at them at all."""


@dataclass(frozen=True)
class Asked:
    """A problem to be answered under a context."""

    problem: Problem
    context: TaskContext
    place: int = 0
    """Of the context in its population: the noise differs by it, so that equal members don't say the same."""


@dataclass(frozen=True)
class Rollout:
    """A reply, in tokens with the end of turn where the model ended it."""

    asked: Asked
    prompt: Tokens
    reply: Tokens
    logprobs: tuple[float, ...]
    """Of each token as it was sampled, nats."""
    text: str
    verdict: Verdict | None = None
    """None where nothing asks for the reward."""

    @property
    def reward(self) -> float:
        """Raises ValueError where the reply was not scored: nothing must take it for 0."""
        if self.verdict is None:
            raise ValueError("this reply was not scored")
        return self.verdict.reward


Drawn = MutableMapping[tuple[str, TaskContext], Rollout]
"""(a problem's id, a context) -> a reply that was drawn for it."""


def scored(rollout: Rollout) -> dict[str, Any]:
    """A scored reply as `Material.with_reply` takes it and as it is written down."""
    return {
        "problem": rollout.asked.problem.id,
        "prompt": rollout.asked.problem.prompt,
        "reply": rollout.text,
        "reward": rollout.reward,
        "feedback": rollout.verdict.feedback if rollout.verdict else "",
    }


class Roller(Protocol):
    """Gives replies of one model: of the trained one as it is now, or of its base."""

    def roll(self, asked: Sequence[Asked], sampling: Sampling, *, samples: int, seed: str) -> list[Rollout]:
        """`samples` replies to each that is asked, one after the other, in the order of `asked`.

        Args:
            seed: of this call; the same gives the same replies.
        """
        ...


@dataclass(frozen=True)
class Rollers:
    """Of a policy."""

    trained: Roller
    frozen: Roller


@dataclass(frozen=True)
class InProcess:
    """The model of this process, inside a block that makes it the one that is asked."""

    entered: Callable[[], AbstractContextManager[Base]]

    def roll(self, asked: Sequence[Asked], sampling: Sampling, *, samples: int, seed: str) -> list[Rollout]:
        with self.entered() as model:

            def draw(prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], new_tokens: int) -> list[list[Sampled]]:
                return _drawn(model, prompts, seeds, new_tokens)

            return rolled(model, asked, sampling, draw, samples=samples, seed=seed)


def in_process(policy: Policy) -> Rollers:
    """Its replies by this process."""
    return Rollers(trained=InProcess(policy.trained), frozen=InProcess(policy.frozen))


def rolled(
    base: Base, asked: Sequence[Asked], sampling: Sampling, draw: Draw, *, samples: int, seed: str
) -> list[Rollout]:
    """What a `Roller` gives, its replies drawn like this."""
    prompts = [one.context.encode(base, one.problem.prompt) for one in asked]
    # A problem that is asked twice is not answered twice alike.
    seen: Counter[tuple[str, TaskContext, int]] = Counter()
    seeds = []
    for one in asked:
        key = (one.problem.id, one.context, one.place)
        first = seen[key]
        seen[key] += samples
        seeds.append([seed_of(seed, one.problem.id, one.place, first + n) for n in range(samples)])
    return [
        _rollout(base, one, prompt, reply, sampling)
        for one, prompt, replies in zip(asked, prompts, draw(prompts, seeds, sampling.new_tokens), strict=True)
        for reply in replies
    ]


def roll_groups(
    roller: Roller,
    problems: Sequence[Problem],
    population: Sequence[TaskContext],
    sampling: Sampling,
    *,
    rollouts: int,
    seed: str,
    drawn: Drawn | None = None,
) -> list[Rollout]:
    """`rollouts` replies to each problem, problem by problem, exactly the same number under each context in turn.

    Args:
        drawn: replies that are there already, by problem and context: each is one of the replies, once, and leaves the dictionary.

    Raises:
        ValueError: they can't be shared out equally.
    """
    each, left = divmod(rollouts, len(population))
    if left:
        raise ValueError(f"{rollouts} rollouts can't be shared out among {len(population)} contexts")
    asked = [Asked(problem, context, place) for problem in problems for place, context in enumerate(population)]
    there = [drawn.pop((one.problem.id, one.context), None) if drawn else None for one in asked]
    found = [[reply] if reply is not None else [] for reply in there]
    for lacking in {each - len(replies) for replies in found} - {0}:
        places = [i for i, replies in enumerate(found) if each - len(replies) == lacking]
        # A problem may be in both parts, and is not answered twice alike.
        of_part = seed if lacking == each else f"{seed} rest"
        new = roller.roll([asked[i] for i in places], sampling, samples=lacking, seed=of_part)
        for i, replies in zip(places, _groups(new, lacking), strict=True):
            found[i] += replies
    return [reply for replies in found for reply in replies]


def rows_of(rollouts: Sequence[Rollout]) -> list[Row]:
    """One row for each run of rollouts with the same prompt: its replies share the work on it."""
    rows: list[Row] = []
    for rollout in rollouts:
        if rows and rows[-1].prompt == rollout.prompt:
            rows[-1] = Row(rollout.prompt, (*rows[-1].replies, rollout.reply))
        else:
            rows.append(Row(rollout.prompt, (rollout.reply,)))
    return rows


def seed_of(*parts: object) -> int:
    """A seed from what it depends on, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _rollout(base: Base, asked: Asked, prompt: Tokens, reply: Sampled, sampling: Sampling) -> Rollout:
    text = base.tokenizer.decode(reply.tokens, skip_special_tokens=True)
    ended = reply.tokens[-1] == base.tokenizer.eos_token_id
    verdict = _verdict(asked.problem, text, ended=ended, sampling=sampling)
    return Rollout(asked, prompt, reply.tokens, reply.logprobs, text, verdict)


def _verdict(problem: Problem, text: str, *, ended: bool, sampling: Sampling) -> Verdict | None:
    if not sampling.rewarded:
        return None
    if not ended and not sampling.count_cut_off:
        return Verdict(reward=0.0, feedback=f"The reply did not end within {sampling.new_tokens} tokens. {SHORTER}")
    return problem.check(text)


def _drawn(
    base: Base, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], new_tokens: int
) -> list[list[Sampled]]:
    """As `Draw`, by the model in batches; each prompt has as many seeds as any other."""
    found: dict[int, list[Sampled]] = {}
    lengths = [len(of) * (len(prompt) + new_tokens) for prompt, of in zip(prompts, seeds, strict=True)]
    for batch in batches(prompts, lengths, max_tokens=BATCH_TOKENS[base.device.type]):
        noise = [one for i in batch for one in seeds[i]]
        drawn = _batch(base, [prompts[i] for i in batch], new_tokens=new_tokens, seeds=noise)
        found |= dict(zip(batch, _groups(drawn, len(noise) // len(batch)), strict=True))
    return [found[i] for i in range(len(prompts))]


def _batch(base: Base, prompts: Sequence[Tokens], *, new_tokens: int, seeds: Sequence[int]) -> list[Sampled]:
    """Replies, those to one prompt after each other, as many to each."""
    noise = _Recorded(seeds, device=base.device)
    asked = [prompt for prompt in prompts for _ in range(len(seeds) // len(prompts))]
    replies = sample(base, asked, max_new_tokens=new_tokens, noise=noise)
    logprobs_B_T = torch.stack(noise.logprobs, dim=1).tolist()
    return [Sampled(reply, tuple(of[: len(reply)])) for reply, of in zip(replies, logprobs_B_T, strict=True)]


class _Recorded(GumbelNoise):
    """Keeps the log-probability of each token that it lets through, nats."""

    def __init__(self, seeds: Sequence[int], *, device: torch.device) -> None:
        super().__init__(seeds, device=device)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores_B_V: Tensor) -> Tensor:
        noised_B_V = super().__call__(input_ids, scores_B_V)
        # The largest of these is what generate takes.
        chosen_B_1 = noised_B_V.argmax(dim=1, keepdim=True)
        scores_B_V = scores_B_V.float()
        self.logprobs.append(scores_B_V.gather(1, chosen_B_1)[:, 0] - scores_B_V.logsumexp(dim=1))
        return noised_B_V


def _groups(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
