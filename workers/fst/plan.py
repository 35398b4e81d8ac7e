"""How a run of Fast-Slow Training is made. The same plan on the same machine makes the same run. Imports no torch."""

import math
from typing import Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from service.domain.feedback import Frozen
from service.errors import InvalidRequest

Arm = Literal["fst", "rl", "context", "distill"]
"""fst: contexts and weights in turn. rl: weights alone, no context. context: contexts alone, weights fixed. distill: contexts evolve
under the frozen base, and the weights learn the best one's behaviour without any reward."""
ARMS: tuple[Arm, ...] = get_args(Arm)
Weights = Literal["lora", "full"]
RolloutsBy = Literal["worker", "vllm"]

# The paper's 1e-6 is for all weights of 8B; a LoRA adapter of a small model moves usefully at a few hundred times that.
LEARNING_RATE: dict[Weights, float] = {"lora": 2e-4, "full": 2e-6}


class Plan(Frozen):
    """All that decides what a run does. Defaults are the paper's where a single GPU bears them."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Of the registry of verifiers; the first one, or in turn where `switch_steps` says so."""
    arm: Arm = "fst"
    steps: int = Field(60, ge=1)
    """Policy-gradient steps; for `context` what they would be, since its cycles see as many problems."""
    steps_per_cycle: int = Field(6, ge=1)
    """T: steps between two evolutions of the contexts."""
    contexts: int = Field(4, ge=1)
    """K: members of the population."""
    rollouts: int = Field(8, ge=2)
    """G: replies to a problem in a step, G/K under each context."""
    batch_problems: int = Field(32, ge=1)
    rollouts_by: RolloutsBy = "worker"
    """What generates: the worker itself in batches, or the vLLM of the settings, which is given each step's adapter."""
    new_tokens: int = Field(64, ge=1)
    """Most tokens of a reply."""
    count_cut_off: bool = False
    """Whether a reply that did not end within them is scored as it stands. A norm such as "at most 20 words" can't be judged then."""
    context_tokens: int = Field(384, ge=0)
    """Most tokens of a context."""
    evolution_calls: int = Field(96, ge=0)
    """Most replies scored for new contexts in a cycle; the population's own scores come before that."""
    anchor_problems: int = Field(16, ge=1)
    """Problems of the coming steps that contexts are scored on."""
    train_problems: int = Field(256, ge=1)
    """Problems to draw from, in shuffled epochs."""
    test_problems: int = Field(32, ge=1)
    test_samples: int = Field(1, ge=1)
    """Replies to each of them at a measurement."""
    switch_steps: int = Field(0, ge=0)
    """Go on to the next task after so many steps; 0 stays at the first."""
    weights: Weights = "lora"
    learning_rate: float = Field(0.0, ge=0)
    """0 takes the default for what is trained."""
    warmup_steps: int = Field(10, ge=0)
    kl_coefficient: float = Field(1e-3, ge=0)
    """Weight of KL(trained || base) on the sampled replies."""
    seed: int = 0
    start: str = ""
    """Folder of another run, whose weights to begin with."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.arm == "fst" and self.rollouts % self.contexts:
            raise ValueError(f"{self.rollouts} rollouts can't be shared out among {self.contexts} contexts")
        if self.switch_steps % self.steps_per_cycle:
            raise ValueError("tasks can switch only between cycles: switch-steps must be a multiple of steps-per-cycle")
        if self.rollouts_by == "vllm" and self.weights == "full":
            raise ValueError("vLLM is given adapters, not all weights: use --weights lora, or --rollouts-by worker")
        return self

    @property
    def cycles(self) -> int:
        return math.ceil(self.steps / self.steps_per_cycle)

    @property
    def population(self) -> int:
        """Contexts that serve at the same time: a distilled one is alone, since weights can follow one teacher only."""
        return {"fst": self.contexts, "context": self.contexts, "distill": 1, "rl": 1}[self.arm]

    @property
    def evolves(self) -> bool:
        return self.arm != "rl"

    @property
    def trains(self) -> bool:
        return self.arm != "context"

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or LEARNING_RATE[self.weights]

    def task_at(self, step: int) -> str:
        """The task's name at a step, counted from 0."""
        turn = step // self.switch_steps if self.switch_steps else 0
        return self.tasks[turn % len(self.tasks)]


def checked_plan(**fields: object) -> Plan:
    """A plan of these fields.

    Raises:
        InvalidRequest: one of them is not valid; which and why.
    """
    try:
        return Plan.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else ""
        if name == "arm":
            raise InvalidRequest(
                f"There is no arm '{fields['arm']}': choose one of {', '.join(ARMS)}.", param="arm"
            ) from None
        reason = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"--{name}: {reason}." if name else f"{reason}.", param=name or None) from None
