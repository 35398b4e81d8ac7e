"""Users who teach: they ask, read, and say what they think of it, until they have said something so many times."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as numbers
from typing import Any

from tests.benchmarks.learning.arms import CHANNELS
from tests.benchmarks.learning.client import Service
from tests.benchmarks.learning.prompts import Prompt
from tests.benchmarks.learning.records import Records
from tests.benchmarks.learning.users import Person, curriculum, judge, mood, react

SECOND_TEMPERATURE = 0.8
"""Of the second reply that a user compares the first with."""


@dataclass(frozen=True)
class Pupil:
    """A user as the service knows them, taught by one simulated user or, in the control, by others."""

    account: str
    teachers: tuple[Person, ...]
    """Whoever gives the feedback on the next reply is drawn from these."""

    def teacher(self, number: int, *, seed: int) -> Person:
        return random.Random(f"{seed} {self.account} teacher {number}").choice(self.teachers)


class School:
    """Gives feedback through the public interface, and records each step so that an interrupted run goes on."""

    def __init__(self, service: Service, records: Records, train: Sequence[Prompt], *, seed: int) -> None:
        self.service = service
        self.records = records
        self.train = train
        self.seed = seed

    def given(self, account: str, *, until: int | None = None) -> list[dict[str, Any]]:
        """The recorded interactions with feedback, the oldest first; the first `until` of them."""
        return [r for r in self.records.under("asked", account) if r["signals"]][:until]

    async def teach(self, pupil: Pupil, *, until: int) -> None:
        """Ask and answer until there have been `until` feedbacks; those of an earlier start count."""
        asks = curriculum(pupil.teachers[0], self.train, seed=self.seed)
        feedbacks = 0
        for number, prompt in zip(numbers(), asks):
            if feedbacks >= until:
                return
            record = self.records.get("asked", pupil.account, number)
            if record is None:
                record = await self._ask(pupil, number, prompt)
            if record["signals"]:
                await self._tell(pupil.account, number, record)
                feedbacks += 1

    async def _ask(self, pupil: Pupil, number: int, prompt: Prompt) -> dict[str, Any]:
        """One interaction, and what its reader is going to say of it."""
        teacher = pupil.teacher(number, seed=self.seed)
        felt = mood(teacher, number, seed=self.seed)
        messages = [{"role": "user", "content": prompt.ask}]
        personalization = CHANNELS["fast"].personalization
        reply = await self.service.chat(messages, user=pupil.account, personalization=personalization)
        verdict = judge(teacher, reply.text, prompt, self.train)
        second = other = None
        if felt.compares:
            second = await self.service.chat(
                messages,
                user=pupil.account,
                personalization=personalization,
                temperature=SECOND_TEMPERATURE,
                seed=number,
            )
            other = (second.id, judge(teacher, second.text, prompt, self.train))
        return self.records.put(
            "asked",
            pupil.account,
            number,
            ask=prompt.ask,
            teacher=teacher.name,
            reply=reply.fields(),
            other=second.fields() if second else None,
            satisfied=verdict.satisfied,
            signals=react(felt, teacher, prompt, verdict, other),
        )

    async def _tell(self, account: str, number: int, record: dict[str, Any]) -> None:
        """Give the recorded feedback, unless that is on record as well."""
        if self.records.get("told", account, number) is None:
            body = {"interaction_id": record["reply"]["id"], **record["signals"]}
            await self.service.feedback(account, body, key=f"{account}-{number}")
            self.records.put("told", account, number)
