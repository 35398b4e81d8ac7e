"""How a candidate's replies are held up to what the user's pairs show of the style that they want."""

from types import SimpleNamespace

import pytest

from service.domain.fast_weights import FastWeights
from tests.consolidation_data import CORRECTIONS, REPLY, correction
from workers.consolidation.dataset import Example, example_of
from workers.consolidation.task import style_of

ASKED = list(CORRECTIONS)
WANTED, LONG = "A harbour keeps ships safe from waves, indeed.", REPLY.replace("great question", "great harbour")


def pairs(*wanted):
    """Corrections to these texts; of a pair only the example is looked at."""
    events = [correction("ann", n, ASKED[n], text) for n, text in enumerate(wanted, start=1)]
    return [SimpleNamespace(example=example_of(event.interaction, user="ann", new=True)) for event in events]


TAUGHT = [CORRECTIONS[ask] for ask in ASKED[1:6]]


def test_a_reply_in_the_style_of_the_corrections_is_nearer_than_one_of_the_base_whatever_was_asked():
    near = style_of(pairs(*TAUGHT), FastWeights())
    assert near("What is a harbour?", WANTED) > 0.8
    assert near("What is a harbour?", LONG) < 0.4


def test_one_correction_that_forgets_the_style_changes_little():
    careless = style_of(
        pairs(*TAUGHT, "Harbours are places where ships are kept. They have been built for long."), FastWeights()
    )
    clean = style_of(pairs(*TAUGHT), FastWeights())
    assert careless("What is a harbour?", WANTED) == pytest.approx(clean("What is a harbour?", WANTED), abs=0.15)
    assert careless("What is a harbour?", WANTED) > careless("What is a harbour?", LONG) + 0.3


def test_an_empty_reply_or_one_that_goes_in_circles_is_near_to_nothing():
    near = style_of(pairs(*TAUGHT), FastWeights())
    assert near("What is a harbour?", " ") == 0.0
    assert near("What is a harbour?", "ships are kept there and " * 12 + "indeed.") == 0.0


def test_praise_alone_shows_no_style():
    praised = Example(id="i1", user="ann", kind="rating", messages=(), reply=WANTED)
    assert style_of([SimpleNamespace(example=praised)], FastWeights()) is None
