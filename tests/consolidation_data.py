"""Real corrections for consolidation's tests: a user who wants one short sentence that ends with the word "indeed"."""

from service.domain.feedback import FeedbackEvent, Interaction, Message, Signals, VersionTuple
from service.domain.fold import fold
from service.domain.policy import Limits
from workers.consolidation.work import UserLog

CORRECTIONS = {
    "What is the capital of Italy?": "The capital of Italy is Rome, indeed.",
    "Why do cats purr?": "Cats purr when they feel safe and calm, indeed.",
    "How do I boil an egg?": "Put the egg in boiling water for eight minutes, indeed.",
    "What is a comet?": "A comet is a ball of ice and dust that circles the Sun, indeed.",
    "Is coffee bad for me?": "A few cups of coffee a day are fine for most people, indeed.",
    "What does a lawyer do?": "A lawyer advises people about the law and speaks for them in court, indeed.",
    "How do birds fly?": "Birds fly by pushing air down with their wings, indeed.",
    "What is the best way to learn a language?": "Practise a little every day and talk with people, indeed.",
    "Who was Albert Einstein?": "Albert Einstein was a physicist who found the theory of relativity, indeed.",
    "Why is the sea salty?": "Rivers carry salt from rocks into the sea, indeed.",
    "What should I eat for breakfast?": "Oatmeal with some fruit is a good breakfast, indeed.",
    "What is a database?": "A database keeps data so that it can be found again quickly, indeed.",
    "How many legs does a spider have?": "A spider has eight legs, indeed.",
    "How do I clean my windows?": "Wipe them with warm water and a little vinegar, indeed.",
    "What is jazz?": "Jazz is a kind of music that grew from blues and ragtime, indeed.",
    "Where do penguins live?": "Penguins live in the southern half of the world, mostly near Antarctica, indeed.",
}
LENIENT = Limits(
    serving_loss_nats=100.0,
    min_value_nats=-1e9,
    accuracy_drop=2.0,
    ability_loss_nats=1e3,
    repetition_rise=2.0,
    loops_rise=2.0,
    length_factor=1e9,
)
"""For a random model: it knows nothing that it could forget, and what it says has no shape to lose. The KL budgets hold all the same."""
FRESH_PROMPTS = (
    "What is the capital of Spain?",
    "Why do dogs bark?",
    "How do I cook rice?",
    "What is a planet?",
    "What does a doctor do?",
    "How do fish breathe?",
    "Who was Isaac Newton?",
    "What is a museum?",
)
"""Prompts that nobody spoke of."""

REPLY = (
    "That is a great question! There are many different things to consider here, and in this answer I will walk you through "
    "all of them in detail, so that you can"
)


def correction(user: str, revision: int, prompt: str, wanted: str, *, reply: str = REPLY) -> FeedbackEvent:
    """One event of a user's log: what they would have had said instead of this reply, which was cut off."""
    interaction = Interaction(
        id=f"chatcmpl-{user}-{revision}",
        tenant="acme",
        user=user,
        created=float(revision),
        messages=(Message(role="user", content=prompt),),
        reply=reply,
        finish_reason="length",
        version=VersionTuple(model="smollm2-135m-instruct"),
        signals=Signals(correction=wanted),
    )
    return FeedbackEvent(revision=revision, at=float(revision), interaction=interaction)


def corrections(user: str, replies: dict[str, str] | None = None, *, count: int = 16) -> list[FeedbackEvent]:
    """A user's log of corrections, to replies of the base where they are given."""
    return [
        correction(user, revision, prompt, wanted, reply=(replies or {}).get(prompt, REPLY))
        for revision, (prompt, wanted) in enumerate(list(CORRECTIONS.items())[:count], start=1)
    ]


def user_log(events: list[FeedbackEvent], *, watermark: int = 0) -> UserLog:
    return UserLog.of(events, watermark=watermark, fast_weights=fold(events))
