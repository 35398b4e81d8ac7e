"""The learning benchmark's smallest size on the real stack: it runs, and what it says of the service makes sense.

By its name it comes last: what six users said is still being optimized when it ends, and whoever came after would wait for that.
"""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.learning.client import Service
from tests.benchmarks.learning.folder import open_run
from tests.benchmarks.learning.plan import plan
from tests.benchmarks.learning.session import execute
from tests.e2e.stack import MODEL, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


async def test_feedback_makes_replies_satisfy_and_only_for_those_who_gave_it(stack: Stack, tmp_path: Path) -> None:
    # The replies are asked for while contexts are optimized, as in life.
    smoke = plan("smoke", seed=0, arms=("base", "fast", "oracle"), points=(0, 5), settle_seconds=0.0)
    service = Service(stack.url, model=MODEL, client_key=stack.key("client"), admin_key=stack.key("admin"))
    try:
        run = open_run(tmp_path / "run", smoke, where="the end-to-end stack")
        text = await execute(run, smoke, service, concurrency=12, console=Console(stderr=True, width=100))
    finally:
        await service.close()
    print(text)  # shown by pytest -s
    line = json.loads(text)
    assert (line["bench"], line["size"], line["users"]) == ("learning", "smoke", smoke.users)
    arms = line["arms"]
    assert arms.keys() == line["ci"].keys() == line["context_tokens"].keys() == {"base", "fast", "oracle"}
    for arm, curve in arms.items():
        assert list(curve) == [str(point) for point in smoke.points]
        assert all(0 <= line["ci"][arm][at][0] <= score <= line["ci"][arm][at][1] <= 1 for at, score in curve.items())
    # Nothing is known of a new user; five noisy feedbacks tell much of what eight chosen exemplars would.
    assert arms["fast"]["0"] == arms["base"]["0"] <= 0.25
    assert arms["fast"]["5"] - arms["base"]["5"] >= 0.25
    assert line["oracle"] >= 0.75
    assert line["context_tokens"]["base"] == 0 < line["context_tokens"]["fast"] <= 512
    # It is learnt of the user and for nobody else.
    assert line["swap"]["mean"] >= 0.25
    assert line["shuffled"]["mean"] <= 0.25
