"""Examples in tokens: what each reply is set beside, and what a held-out margin says then; on a tiny random model."""

from collections import Counter

import pytest

from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message
from tests.candidates import random_adapter
from workers.consolidation.dataset import Example
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.margins import Arm, measure
from workers.consolidation.prepare import BASE_REPLY_TOKENS, prepare
from workers.consolidation.sampling import sample
from workers.consolidation.scoring import reply_logprobs

SHAPE = Shape(rank=4, alpha=8, targets=("q_proj", "v_proj"))


def example(number, kind="rating", **fields):
    asked = (Message(role="user", content=f"Question {number}?"),)
    return Example(id=f"i{number}", user="ann", kind=kind, messages=asked, reply=f"Reply {number}.", **fields)


def prepared(base, *examples):
    return prepare(base, examples, {"ann": FastWeights()}, budget_tokens=100, dropped=Counter())


def test_a_rated_reply_is_set_beside_what_the_base_says_by_itself(tiny_base):
    rated = prepared(tiny_base, example(1), example(2, rating=-1.0))
    for one in rated:
        [own] = sample(tiny_base, [one.alone.prompt], max_new_tokens=BASE_REPLY_TOKENS)
        spoken, other = one.alone.replies
        assert spoken == tiny_base.encode_reply(one.example.reply, ended=True)
        assert other == own


def test_of_a_pair_it_is_the_rejected_reply(tiny_base):
    [pair] = prepared(tiny_base, example(1, "correction", rejected="No."))
    assert pair.alone.replies[1] == tiny_base.encode_reply("No.", ended=True)


def test_the_same_examples_are_prepared_alike_whatever_is_beside_them(tiny_base):
    alone = prepared(tiny_base, example(1))
    beside = prepared(tiny_base, example(7, "preference", rejected="No."), example(1), example(2))
    assert alone[0] == beside[1]


def test_a_rating_counts_what_a_reply_gains_on_the_bases_own(tiny_base):
    """Drift alone, by which both fall, is no loss; and blame turns it round."""
    good, bad = prepared(tiny_base, example(1), example(1, rating=-1.0))
    with LoraStack.attached(tiny_base, SHAPE, slots=1) as stack:
        random_adapter(stack, 0, size=0.2)
        [[praised], [blamed]] = measure(tiny_base, stack, [Arm([of], [of.alone], 0) for of in (good, bad)])
        [means] = reply_logprobs(tiny_base, [good.alone], stack=stack, slots=[0])
    spoken, other = means.tolist()
    assert praised == pytest.approx(spoken - other, abs=1e-5)
    assert blamed == pytest.approx(-praised, abs=1e-5)
