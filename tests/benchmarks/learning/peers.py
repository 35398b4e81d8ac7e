"""Rivals on the same work: any OpenAI-compatible endpoint, told the same of the same questions."""

from dataclasses import dataclass
from typing import Any

from tests.benchmarks.learning.arms import in_words, turn
from tests.benchmarks.learning.client import Endpoint
from tests.benchmarks.learning.records import Records


@dataclass(frozen=True)
class Peer:
    """One rival. With a feedback endpoint of our shape it gets the signals there, otherwise as words in the conversation."""

    name: str
    endpoint: Endpoint
    feedback_url: str = ""

    async def tell(self, account: str, given: list[dict[str, Any]], records: Records) -> None:
        """All feedback of a user so far, the oldest first; what an earlier call told is not told again."""
        for record in given:
            *_, number = record["key"]
            key = ("told peer", self.name, account, number)
            if records.get(*key) is None:
                reply = await self.endpoint.chat([{"role": "user", "content": record["ask"]}], user=account)
                await self._give(account, reply.id, reply.text, record)
                records.put(*key, reply=reply.fields())

    async def _give(self, account: str, interaction: str, reply: str, record: dict[str, Any]) -> None:
        signals = record["signals"]
        if self.feedback_url:
            body = {"interaction_id": interaction, **_by_text(signals, record)}
            await self.endpoint.post(self.feedback_url, body, **{"X-User-ID": account})
        else:
            said = {"role": "user", "content": in_words(signals, record)}
            await self.endpoint.chat([*turn(record["ask"], reply), said], user=account, max_tokens=1)


def _by_text(signals: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The signals without our interaction's id, which the peer does not know."""
    if "preference" not in signals:
        return signals
    better = signals["preference"]["better"]
    return signals | {"preference": {"text": record["other"]["text"], "better": better}}
