"""Replies in batches: what begins alike is run once, and nobody's reply is another one for that."""

from contextlib import contextmanager
from random import Random

import pytest
import torch

from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.sampling import GumbelNoise, sample

CHANCE = Random(0)
CONTEXTS = [tuple(CHANCE.choices(range(3, 90), k=40)) for _ in range(2)]
ASKED = [tuple(CHANCE.choices(range(3, 90), k=k)) for k in (1, 7, 3, 12)]
LONG = tuple(CHANCE.choices(range(3, 90), k=60))
# Out of order; one twice, one whose beginning is another whole one, some that have nothing in common with any.
PROMPTS = [
    CONTEXTS[0] + ASKED[0],
    ASKED[1],
    CONTEXTS[1] + ASKED[1],
    CONTEXTS[0] + ASKED[1],
    CONTEXTS[0],
    CONTEXTS[1] + ASKED[3],
    LONG,
    CONTEXTS[0] + ASKED[0],
    CONTEXTS[0] + ASKED[2],
]
SLOTS = [0, 1, 1, 0, 0, 1, 0, 1, 1]


@pytest.fixture
def stack(tiny_base, tiny_settings):
    with LoraStack.attached(tiny_base, Shape.of(tiny_settings), slots=2, seed=1) as stack:
        with torch.no_grad():
            stack.weights_U_N.copy_(
                torch.randn(stack.weights_U_N.shape, generator=torch.Generator().manual_seed(0)) * 0.3
            )
        yield stack


@contextmanager
def tokens_run(base):
    """How many positions go through the model, padding too."""
    counted = []
    hook = base.model.get_input_embeddings().register_forward_hook(lambda _, args, __: counted.append(args[0].numel()))
    try:
        yield counted
    finally:
        hook.remove()


@pytest.mark.parametrize("drawn", [False, True])
def test_a_reply_is_the_same_as_alone_whatever_it_shares(tiny_base, stack, drawn):
    def said(rows):
        noise = GumbelNoise([7 + i for i in rows], device=tiny_base.device) if drawn else None
        prompts, slots = [PROMPTS[i] for i in rows], [SLOTS[i] for i in rows]
        return sample(tiny_base, prompts, max_new_tokens=12, noise=noise, stack=stack, slots=slots)

    together = said(range(len(PROMPTS)))
    assert together == [reply for i in range(len(PROMPTS)) for reply in said([i])]
    # Equal prompts under other adapters, or with other noise, are replied to otherwise.
    assert together[0] != together[7]
    assert len(set(together)) > 5


def test_without_slots_what_is_on_replies(tiny_base, stack):
    some = PROMPTS[:3]
    with stack.on(1):
        one = sample(tiny_base, some, max_new_tokens=8)
    assert one == sample(tiny_base, some, max_new_tokens=8, stack=stack, slots=[1] * 3)
    assert one != sample(tiny_base, some, max_new_tokens=8)


def test_what_prompts_of_one_adapter_begin_with_is_run_once(tiny_base, stack):
    prompts = [CONTEXTS[0] + asked for asked in ASKED]
    with tokens_run(tiny_base) as shared:
        sample(tiny_base, prompts, max_new_tokens=1, stack=stack, slots=[0] * 4)
    # The context, and the four questions padded to the longest.
    assert sum(shared) == len(CONTEXTS[0]) + 4 * len(ASKED[3])
    with tokens_run(tiny_base) as apart:
        sample(tiny_base, prompts, max_new_tokens=1, stack=stack, slots=[0, 1, 0, 1])
    assert sum(apart) == 2 * len(CONTEXTS[0]) + 4 * len(ASKED[3])


def test_nothing_is_replied_to_nothing(tiny_base):
    assert sample(tiny_base, [], max_new_tokens=4) == []
