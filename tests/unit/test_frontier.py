"""The frontier as a picture, from a report's numbers alone."""

import io

import matplotlib.image
import pytest

from service import frontier
from service.domain.measures import FrontierPoint
from service.domain.slow_weights import AdapterVersion
from service.errors import NotFound
from tests.factories import ALICE, outcome_of, train_report
from workers.consolidation.work import Work

POINTS = tuple(
    FrontierPoint(
        scale=scale,
        kl_text_nats=0.02 * scale**2,
        kl_chat_nats=0.09 * scale**2,
        margin_alone=0.1 + 0.5 * scale,
        margin_with_context=0.6 + 0.1 * scale,
    )
    for scale in (0.25, 0.5, 0.75, 1.0)
)


def version(points: tuple[FrontierPoint, ...]) -> AdapterVersion:
    made = outcome_of(Work(tenant="acme", scope=ALICE, job="j", number=1, created=0.0, users={})).version
    assert made is not None
    return made.model_copy(update={"report": train_report().model_copy(update={"frontier": points})})


def test_the_picture_is_a_png_that_opens_and_is_drawn_from_the_numbers() -> None:
    drawn = frontier.png(version(POINTS))
    assert drawn.startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(io.BytesIO(drawn), format="png")
    height, width, _ = pixels.shape
    assert (width, height) == (1200, 504)
    # Neither blank nor the same for other numbers.
    assert pixels[..., :3].std() > 0.01
    lower = tuple(p.model_copy(update={"margin_alone": 0.1}) for p in POINTS)
    assert drawn == frontier.png(version(POINTS)) != frontier.png(version(lower))


def test_a_version_from_before_has_no_picture_and_says_why() -> None:
    with pytest.raises(NotFound, match="holds no frontier"):
        frontier.png(version(()))
