"""The fast half: contexts made of what verifiers said and of good replies, and the search among them."""

from random import Random

import pytest

from service.verifiers import Problem, Verdict
from workers.context_search.reflection import ReflectionUnavailable
from workers.fst.contexts import EMPTY, Shown, TaskContext
from workers.fst.edits import MOST_GUIDELINES, Edits
from workers.fst.evolution import evolve
from workers.fst.material import MOST_SHOWN, Material
from workers.fst.reflection import MOST_FAILURES, Reflection
from workers.fst.rollouts import Asked, Rollout
from workers.fst.standing import Standing, Standings

RULE = "Write in lowercase letters only."


def check(reply):
    raise AssertionError("the roll below scores by itself")


PROBLEMS = [Problem(f"p{n}", f"Question {n}", check) for n in range(8)]


def replied(asked, reward, feedback=f"Not held: {RULE} It had 2 others."):
    verdict = Verdict(reward=reward, feedback=feedback)
    return Rollout(asked, (1,), (2,), (-1.0,), f"reply to {asked.problem.id}", verdict)


def roll_by(reward):
    """A model whose replies earn what a function of the context says."""
    rolled = []

    def roll(asked):
        found = [replied(one, reward(one.context)) for one in asked]
        rolled.extend(found)
        return found

    return roll, rolled


def evolved(reward, *, members=(EMPTY,), size=2, budget=60, reflection=None, material=None, seed=0, **told):
    roll, rolled = roll_by(reward)
    edits = Edits(material or Material(), fits=lambda context: True, random=Random(seed))

    def heard(asked):
        found = roll(asked)
        for rollout in found:
            edits.material = edits.material.with_reply(
                problem=rollout.asked.problem.id,
                prompt=rollout.asked.problem.prompt,
                reply=rollout.text,
                reward=rollout.reward,
                feedback=rollout.verdict.feedback,
                at=len(rolled),
            )
        return found

    found = evolve(
        members,
        PROBLEMS,
        size=size,
        budget=budget,
        roll=heard,
        edits=edits,
        price=lambda context: len(context.guidelines) + len(context.exemplars),
        reflection=reflection,
        seed=seed,
        **told,
    )
    return found, rolled


def test_the_verifiers_advice_becomes_a_guideline_where_it_helps():
    found, _ = evolved(lambda context: 0.9 if RULE in context.guidelines else 0.2)
    assert RULE in found.population[0].guidelines
    assert found.rewards[0] == pytest.approx(0.9)


def test_good_replies_become_exemplars_where_they_help():
    found, _ = evolved(lambda context: min(0.2 + 0.3 * len(context.exemplars), 0.8))
    assert len(found.population[0].exemplars) >= 1
    assert found.rewards[0] >= 0.5


def test_where_nothing_helps_the_population_stays():
    found, _ = evolved(lambda context: 0.5 if context == EMPTY else 0.1)
    assert found.population == (EMPTY, EMPTY)


def test_the_population_has_as_many_members_as_were_asked_for_the_best_first():
    found, _ = evolved(lambda context: 0.1 + 0.2 * len(context.guidelines) + 0.1 * len(context.exemplars), size=3)
    assert len(found.population) == 3
    assert list(found.rewards) == sorted(found.rewards, reverse=True)


def test_replies_stay_within_the_budget_and_none_is_asked_for_twice():
    found, rolled = evolved(lambda context: 0.2 + 0.1 * len(context.guidelines), budget=40)
    assert found.samples == len(rolled) <= len(PROBLEMS) + 40
    assert len({(r.asked.context, r.asked.problem.id) for r in rolled}) == len(rolled)


def test_members_are_scored_again_and_the_better_one_leads():
    good, bad = TaskContext(guidelines=("good",)), TaskContext(guidelines=("bad",))
    found, rolled = evolved(lambda context: 0.8 if context == good else 0.3, members=(bad, good, bad), budget=0)
    assert found.population == (good, bad)
    assert len(rolled) == 2 * len(PROBLEMS)


def test_what_members_earned_in_the_steps_outweighs_luck_on_the_anchors():
    good, lucky = TaskContext(guidelines=("good",)), TaskContext(guidelines=("lucky",))

    def reward(context):
        return 0.5 if context == good else 0.6

    lucky_first, _ = evolved(reward, members=(good, lucky), budget=0)
    assert lucky_first.population == (lucky, good)
    told = (
        Standing(context=good, replies=24, advantage=0.15),
        Standing(context=lucky, replies=24, advantage=-0.15),
    )
    found, rolled = evolved(reward, members=(good, lucky), budget=0, standings=told)
    assert found.population == (good, lucky)
    assert len(rolled) == 2 * len(PROBLEMS)
    # By what the anchors say of both, (0.5 + 0.6) / 2: (8 * 0.5 + 24 * 0.7) / 32 against (8 * 0.6 + 24 * 0.4) / 32.
    child = TaskContext(guidelines=("good", "child"))
    between, _ = evolved(
        lambda c: 0.6 if c in (lucky, child) else 0.5, members=(good, lucky, child), budget=0, size=3, standings=told
    )
    assert between.population == (good, child, lucky)


def test_standings_compare_replies_to_the_same_problems():
    good, bad = TaskContext(guidelines=("good",)), TaskContext(guidelines=("bad",))
    standings = Standings()
    for problem, rewards in ((PROBLEMS[0], (1.0, 0.5)), (PROBLEMS[1], (0.4, 0.0))):
        standings.add([replied(Asked(problem, c), r) for c, r in zip((good, bad), rewards, strict=True)])
    standings.add([])
    assert {s.context: (s.replies, s.advantage) for s in standings.found()} == {
        good: (2, pytest.approx(0.225)),
        bad: (2, pytest.approx(-0.225)),
    }


def test_an_edit_that_breaks_is_not_hidden():
    class Broken(Reflection):
        def edit(self, parent, rollouts):
            raise RuntimeError("no edit")

    with pytest.raises(RuntimeError, match="no edit"):
        evolved(lambda context: 0.2, reflection=Broken.__new__(Broken), budget=200)


@pytest.fixture
def reflecting(tiny_settings):
    def build(answer):
        async def ask(prompt, *, settings):
            prompts.append(prompt)
            if isinstance(answer, Exception):
                raise answer
            return answer

        prompts = []
        return Reflection(tiny_settings, ask=ask), prompts

    return build


def test_a_reflection_model_sees_the_verdicts_and_adds_a_guideline(reflecting):
    reflection, prompts = reflecting("```\n- Use small letters.\n```")
    found, _ = evolved(
        lambda c: 0.9 if "Use small letters." in c.guidelines else 0.2, reflection=reflection, budget=200
    )
    assert "Use small letters." in found.population[0].guidelines
    assert RULE in prompts[0]
    assert "Question" in prompts[0]


def test_an_endpoint_that_is_away_stops_being_asked_and_other_edits_go_on(reflecting):
    reflection, prompts = reflecting(ReflectionUnavailable("away"))
    found, _ = evolved(lambda c: 0.9 if RULE in c.guidelines else 0.2, reflection=reflection, budget=400)
    assert RULE in found.population[0].guidelines
    assert 1 <= len(prompts) <= MOST_FAILURES


def material_of(*replies):
    material = Material()
    for number, (problem, reward, feedback) in enumerate(replies):
        material = material.with_reply(
            problem=problem, prompt=problem, reply=f"{problem} {number}", reward=reward, feedback=feedback, at=number
        )
    return material


@pytest.mark.parametrize(
    ("feedback", "advice"),
    [
        ("The reply did not end within 32 tokens. Answer in fewer words.", ["Answer in fewer words."]),
        (
            "Not held: At most 20 words. But it has 33 words; cut it to 20 or fewer.",
            ["At most 20 words.", "cut it to 20 or fewer."],
        ),
        (
            "The reply holds no answer; expected a number between <answer> and </answer>.",
            ["expected a number between <answer> and </answer>."],
        ),
    ],
)
def test_what_a_reply_was_like_is_no_advice(feedback, advice):
    assert [said.text for said in material_of(("a", 0.0, feedback), ("b", 0.0, feedback)).advice] == advice


def test_what_is_said_of_one_problem_alone_is_no_advice():
    material = material_of(
        ("a", 0.0, f"Wrong: the answer is 7 not 9. {RULE}"), ("b", 0.0, f"Wrong: the answer is 4 not 1. {RULE}")
    )
    assert [said.text for said in material.advice] == [RULE]


def test_the_best_reply_of_a_problem_is_kept_and_only_the_best_are_shown():
    material = material_of(
        ("a", 0.5, "x y z."), ("a", 1.0, ""), ("a", 0.2, "x y z."), ("b", 0.5, "x y z."), ("c", 1.0, "")
    )
    assert [f.shown.reply for f in material.good] == ["c 4", "a 1"]


def test_a_reply_that_is_hardly_right_is_no_exemplar():
    assert material_of(("a", 0.02, "x y z."), ("b", 0.1, "x y z.")).good == ()
    assert [f.shown.reply for f in material_of(("a", 0.02, "x y z."), ("b", 0.5, "x y z.")).good] == ["b 1"]


def test_newer_replies_push_the_old_tasks_out_of_what_is_shown():
    old = material_of(*((f"old{n}", 1.0, "") for n in range(40)))
    both = old
    for n in range(MOST_SHOWN):
        both = both.with_reply(problem=f"new{n}", prompt=f"new{n}", reply="r", reward=1.0, feedback="", at=100 + n)
    assert all(f.shown.prompt.startswith("new") for f in both.good)


def test_edits_change_one_thing_and_none_comes_twice():
    material = material_of(*((f"p{n}", 1.0, "") for n in range(6)), *((f"q{n}", 0.0, RULE) for n in range(3)))
    edits = Edits(material, fits=lambda context: True, random=Random(1))
    parent = TaskContext(guidelines=("g",), exemplars=(Shown(prompt="p0", reply="r"),))
    children = [edits.child(parent, [EMPTY], [RULE]) for _ in range(12)]
    there = [child for child in children if child is not None]
    assert len(set(there)) == len(there) > 5
    for child in there:
        assert len(child.guidelines) <= MOST_GUIDELINES
        assert len({shown.prompt for shown in child.exemplars}) == len(child.exemplars)


def test_a_context_that_does_not_fit_is_never_tried():
    material = material_of(*((f"p{n}", 1.0, "") for n in range(6)))
    edits = Edits(material, fits=lambda context: len(context.exemplars) < 2, random=Random(1))
    children = [edits.child(EMPTY, [], []) for _ in range(8)]
    assert any(children)
    assert all(len(child.exemplars) < 2 for child in children if child is not None)
