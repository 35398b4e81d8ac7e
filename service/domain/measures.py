"""The figures of a consolidation's report beside its divergence: what was compared example by example, and at what price."""

from service.domain.feedback import Frozen

# All of four differences are positive by chance alone in one of sixteen cases, which is more than 5 %; of five in one of 32.
FEW_EXAMPLES = 5


class Difference(Frozen):
    """How much higher the candidate is than something else, on the same examples: a paired comparison."""

    mean: float
    lower95: float
    """One-sided 95 % bound of the mean, by bootstrap over examples."""
    examples: int
    positive: int
    """On how many of them the candidate is higher."""

    @property
    def is_few(self) -> bool:
        """Whether the examples are too few for the bound to say much."""
        return self.examples < FEW_EXAMPLES


class FrontierPoint(Frozen):
    """What the candidate would be at one scale."""

    scale: float
    """What the trained LoRA was multiplied by."""
    kl_text_nats: float
    """Mean KL(base || adapter) on plain-text judge anchors, nats per token."""
    kl_chat_nats: float
    margin_alone: float
    """Mean held-out margin without a context, nats per token."""
    margin_with_context: float
    """With the whole context; equal to `margin_alone` where there is none."""
    value_nats: float | None = None
    """What it is worth with the whole context (`price.value_nats`); the candidate's scale is the one with the most at which replies keep
    the user's style."""


class Handed(Frozen):
    """One context item, asked whether the adapter makes it unnecessary."""

    item: str
    tokens: int
    """Of its text."""
    margin_cost_nats: float | None
    """What leaving it out alone takes from the mean held-out margin; None if it was only asked about together with others."""
    absorbed: bool


class Price(Frozen):
    """What the drift buys."""

    kl_text_nats: float
    kl_chat_nats: float
    tokens_saved: int
    """Of the rendered context, against what serves now."""
    margin_gain_nats: float
    """Mean held-out margin as it would be served, less that of what serves now."""
    value_nats: float
    """The gains less what the drift costs (`price.value_nats`)."""
    kl_per_hundred_tokens: float | None = None
    """Nats per token of chat KL spent for each hundred tokens saved; None where none are."""
    kl_per_margin_nat: float | None = None
    """Likewise for each nat of margin."""


class Ability(Frozen):
    """Multiple-choice questions of general knowledge: the candidate against the base, without any context."""

    questions: int
    base_accuracy: float
    accuracy: float
    accuracy_change: Difference
    """In shares of a question: 1 gained, -1 lost."""
    margin_change: Difference
    """Mean log p(right answer) less that of the likeliest wrong one, nats per token."""


class Generated(Frozen):
    """Greedy replies without a context, to held-out prompts and chat anchors: the candidate's beside the base's."""

    prompts: int
    base_repetition: float
    """Mean share of 4-grams that were there before in the same reply."""
    repetition: float
    base_loops: float
    """Share of replies that end by saying the same over and over."""
    loops: float
    base_tokens: float
    """Mean length, cut off at the longest that is generated."""
    tokens: float
    wanted_tokens: float | None = None
    """Mean length of the replies that users wanted, cut off likewise; None where they wrote or preferred none."""
    reverse_kl_nats: float | None = None
    """KL(adapter || base) on the adapter's own samples, exact over the vocabulary, nats per token."""
    adherence_before: float | None = None
    """Mean share of the scope's norms that replies hold as they are served now; None without norms."""
    adherence: float | None = None
    """As they would be served."""
    style_before: float | None = None
    """How near replies to the newest held-out prompts are to what the user wants, by what a program sees of a text, in [0, 1]: as they are
    served now. None for scopes of many users, and where no pair of replies shows what is wanted."""
    style: float | None = None
    """As they would be served."""
    style_change: Difference | None = None
    """The one less the other, prompt by prompt."""

    @property
    def length_drift(self) -> float:
        """By which factor the candidate's replies are longer or shorter than all that lies between the base's and the wanted ones."""
        wanted = self.base_tokens if self.wanted_tokens is None else self.wanted_tokens
        shortest, longest = sorted((self.base_tokens, wanted))
        tokens = max(self.tokens, 1.0)
        return max(tokens / max(longest, 1.0), max(shortest, 1.0) / tokens, 1.0)
