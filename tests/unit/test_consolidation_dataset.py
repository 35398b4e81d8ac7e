"""What of a log is learnt from, and what judges."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.fast_weights import FastWeights
from service.domain.feedback import FeedbackEvent, Interaction, Message, Preference, Signals, VersionTuple
from service.domain.fold import fold
from service.domain.slow_weights import Scope
from service.errors import JobFailed
from tests.consolidation_data import corrections, user_log
from workers.consolidation.dataset import Example, build, example_of, mix, most_of_one, split, usable, without_own
from workers.consolidation.work import UserLog, Work


def interaction(number, signals, *, prompt=None, reply="the served reply", finish_reason="stop", user="ann"):
    return Interaction(
        id=f"chatcmpl-{user}-{number}",
        tenant="acme",
        user=user,
        created=float(number),
        messages=(Message(role="user", content=f"prompt {number}" if prompt is None else prompt),),
        reply=reply,
        finish_reason=finish_reason,
        version=VersionTuple(model="tiny"),
        signals=signals,
    )


def events(signals_of, *, user="ann"):
    return [
        FeedbackEvent(revision=i, at=float(i), interaction=interaction(i, signals, user=user))
        for i, signals in enumerate(signals_of, start=1)
    ]


def work(users, *, number=1):
    return Work(
        tenant="acme",
        scope=Scope(kind="user", name="ann") if len(users) == 1 else Scope(kind="global"),
        job="job-1",
        number=number,
        created=1.0,
        users=users,
    )


def examples(prompts):
    return [
        Example(
            id=str(i),
            user="ann",
            kind="correction",
            messages=(Message(role="user", content=prompt),),
            reply=f"wanted {i}",
            rejected="served",
        )
        for i, prompt in enumerate(prompts)
    ]


@given(st.lists(st.sampled_from([f"prompt {i}" for i in range(12)]), min_size=2, max_size=40))
def test_no_prompt_is_on_both_sides_and_nothing_is_lost(prompts):
    given_examples = examples(prompts)
    train, heldout = split(given_examples)
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    assert sorted(e.id for e in train + heldout) == sorted(e.id for e in given_examples)


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=60, unique=True))
def test_different_prompts_give_each_side_its_share(numbers):
    train, heldout = split(examples([f"prompt {i}" for i in numbers]))
    assert len(heldout) >= 2
    assert len(train) >= len(numbers) // 2


def test_the_newest_feedback_judges():
    train, heldout = split(examples([f"prompt {i}" for i in range(20)]))
    assert [e.id for e in heldout] == ["15", "16", "17", "18", "19"]
    assert [e.id for e in train] == [str(i) for i in range(15)]


def test_what_was_trained_on_does_not_judge_later():
    """Nor does another reply to a prompt that was: all that lies before the watermark may have been trained on."""
    old = [e.model_copy(update={"new": False}) for e in examples([f"prompt {i}" for i in range(12)])]
    new = examples([f"prompt {i}" for i in range(10, 22)])
    _, heldout = split(old + new)
    assert {e.prompt for e in heldout} == {"prompt 19", "prompt 20", "prompt 21"}
    _, again = split(old + examples(["prompt 3", "prompt 4", "prompt 5", "prompt 6"]))
    assert again == []


def test_a_comment_alone_does_not_judge():
    given_examples = examples([f"prompt {i}" for i in range(8)])
    given_examples[-1] = given_examples[-1].model_copy(update={"kind": "comment", "rejected": None, "rating": 0.0})
    assert [e.id for e in split(given_examples)[1]] == ["5", "6"]


def test_case_and_spacing_do_not_make_another_prompt():
    train, heldout = split(examples(["What is  jazz?", "what is jazz?", "other", "third", "fourth"]))
    sides = [{e.id for e in side} & {"0", "1"} for side in (train, heldout)]
    assert sorted(map(len, sides)) == [0, 2]


@pytest.mark.parametrize(
    ("signals", "reply", "reason"),
    [
        (Signals(correction="the served reply "), "the served reply", "both replies the same"),
        (Signals(correction=" "), "the served reply", "an empty reply"),
        (Signals(correction="better"), "", "an empty reply"),
        (Signals(rating=0.0), "the served reply", "no signal to learn from"),
        (Signals(rating=1.0), " ", "an empty reply"),
        (Signals(comment="be brief"), "", "an empty reply"),
    ],
)
def test_what_teaches_nothing_is_left_out_and_counted(signals, reply, reason):
    dropped: Counter[str] = Counter()
    log = user_log([FeedbackEvent(revision=1, at=1.0, interaction=interaction(1, signals, reply=reply))])
    assert usable("ann", log, dropped) == []
    assert dropped == {reason: 1}


def test_a_comment_says_something_of_the_reply_it_is_of_unless_it_only_praises_or_blames():
    told = example_of(interaction(1, Signals(comment="Please be brief.")), user="ann", new=True)
    assert (told.kind, told.comment, told.rating, told.judges) == ("comment", "be brief.", 0.0, False)
    both = example_of(interaction(1, Signals(comment="Please be brief.", rating=-1.0)), user="ann", new=True)
    assert (both.kind, both.comment, both.rating) == ("rating", "be brief.", -1.0)
    blamed = example_of(interaction(1, Signals(comment="terrible")), user="ann", new=True)
    assert (blamed.kind, blamed.comment, blamed.rating) == ("rating", None, -1.0)


def test_a_correction_is_wanted_against_what_was_served():
    example = example_of(interaction(1, Signals(correction="better", rating=-1.0)), user="ann", new=True)
    assert (example.kind, example.reply, example.rejected) == ("correction", "better", "the served reply")


def test_a_served_reply_that_was_cut_off_does_not_teach_to_end_there():
    preferred = Signals(preference=Preference(other="the other", better="this"))
    other = Signals(preference=Preference(other="the other", better="other"))
    this = example_of(interaction(1, preferred, finish_reason="length"), user="ann", new=True)
    that = example_of(interaction(1, other, finish_reason="length"), user="ann", new=True)
    assert (this.reply, this.reply_ended, this.rejected_ended) == ("the served reply", False, True)
    assert (that.reply, that.reply_ended, that.rejected_ended) == ("the other", True, False)


def test_the_same_feedback_twice_counts_once():
    dropped: Counter[str] = Counter()
    twice = [
        FeedbackEvent(
            revision=i, at=float(i), interaction=interaction(i, Signals(correction="better"), prompt="same prompt")
        )
        for i in (1, 2)
    ]
    found = usable("ann", user_log(twice), dropped)
    assert [e.id for e in found] == ["chatcmpl-ann-2"]
    assert dropped == {"said twice": 1}


def test_what_is_past_the_watermark_is_new_and_older_feedback_is_a_third_of_the_mix():
    log = user_log(corrections("ann"), watermark=10)
    found = usable("ann", log, Counter())
    assert [e.new for e in found] == [False] * 10 + [True] * 6
    mixed = mix(found, 100, salt=1)
    assert sum(not e.new for e in mixed) == 3
    assert sum(e.new for e in mixed) == 6


def test_another_version_replays_other_old_feedback():
    found = [e.model_copy(update={"new": int(e.id) >= 30}) for e in examples([f"prompt {i}" for i in range(40)])]
    drawn = [{e.id for e in mix(found, 100, salt=number) if not e.new} for number in range(1, 5)]
    assert len({frozenset(ids) for ids in drawn}) > 1


def test_a_mix_keeps_to_its_size_with_the_newest():
    found = examples([f"prompt {i}" for i in range(40)])
    assert [e.id for e in mix(found, 10, salt=1)] == [str(i) for i in range(30, 40)]


def test_one_user_of_many_has_at_most_twice_an_equal_share():
    loud = user_log(events([Signals(correction=f"wanted {i}") for i in range(60)], user="loud"))
    quiet = [
        (f"user-{n}", user_log(events([Signals(correction=f"wanted {i}") for i in range(4)], user=f"user-{n}")))
        for n in range(5)
    ]
    dataset = build(work({"loud": loud, **dict(quiet)}), min_examples=4, max_train=1000)
    counts = Counter(e.user for e in dataset.train + dataset.heldout)
    # Twice a sixth of what is kept: ten and the others' twenty.
    assert counts["loud"] <= 10
    assert dataset.dropped["over one user's share"] == 50


@pytest.mark.parametrize(
    ("counts", "most"),
    [([], 1), ([7], 7), ([1, 90], 90), ([4] * 5 + [60], 10), ([10] * 19 + [200], 21), ([5] * 4, 5), ([1, 1, 300], 4)],
)
def test_a_user_has_at_most_twice_an_equal_share_of_what_is_kept(counts, most):
    assert most_of_one(counts) == most
    kept = sum(min(count, most) for count in counts)
    assert len(counts) < 2 or most <= 2 * kept / len(counts)


def said_alone(user, count, *, watermark=0):
    """A log of corrections, each to a prompt that nobody else has."""
    said = [
        FeedbackEvent(
            revision=i,
            at=float(i),
            interaction=interaction(i, Signals(correction=f"wanted {i}"), prompt=f"{user} asks {i}", user=user),
        )
        for i in range(1, count + 1)
    ]
    return user_log(said, watermark=watermark)


@pytest.mark.parametrize("watermark", [0, 8])
def test_of_many_users_each_trains_and_judges_with_an_equal_share_of_their_newest_feedback(watermark):
    users = {f"user-{n}": said_alone(f"user-{n}", 20, watermark=watermark) for n in range(50)}
    dataset = build(work(users), min_examples=4, max_train=120)
    trained, judged = (Counter(e.user for e in side if e.new) for side in (dataset.train, dataset.heldout))
    assert len(trained) == 50
    assert max(trained.values()) - min(trained.values()) <= 1
    assert (len(judged), set(judged.values())) == (32, {1})
    newest = {f"chatcmpl-user-{n}-20" for n in range(50)}
    assert {e.id for e in dataset.heldout} <= newest


def test_no_user_s_feedback_is_trained_on_that_is_newer_than_what_judges_of_them():
    users = {f"user-{n}": said_alone(f"user-{n}", n + 1) for n in range(12)}
    dataset = build(work(users), min_examples=4, max_train=1000)

    def revisions(side, user):
        return [int(e.id.rsplit("-", 1)[1]) for e in side if e.user == user]

    for user in {e.user for e in dataset.heldout}:
        trained, judging = revisions(dataset.train, user), revisions(dataset.heldout, user)
        assert trained + judging == sorted(trained + judging)


def test_who_has_said_one_thing_is_in_turn_trained_on_and_held_out():
    users = {f"user-{n}": said_alone(f"user-{n}", 1) for n in range(8)} | {"talker": said_alone("talker", 2)}
    datasets = [build(work(users, number=number), min_examples=4, max_train=1000) for number in range(1, 20)]
    for user in users:
        assert any(user in {e.user for e in dataset.train} for dataset in datasets)
        assert any(user in {e.user for e in dataset.heldout} for dataset in datasets)


def test_a_flood_has_no_larger_share_of_either_side_than_the_cap_leaves_it_of_the_whole():
    users = {f"user-{n}": said_alone(f"user-{n}", 10) for n in range(19)} | {"loud": said_alone("loud", 200)}
    dataset = build(work(users), min_examples=4, max_train=60)
    kept = 21
    for side in (dataset.train, dataset.heldout):
        assert Counter(e.user for e in side)["loud"] <= len(side) * kept / (kept + 190) + 1


def test_one_user_s_feedback_stays_in_the_order_in_which_it_was_said():
    log = said_alone("ann", 40, watermark=16)
    dataset = build(work({"ann": log}), min_examples=4, max_train=1000)
    new = [e.id for e in (*dataset.train, *dataset.heldout) if e.new]
    assert new == [f"chatcmpl-ann-{i}" for i in range(17, 41)]


@pytest.mark.parametrize(
    ("users", "words"),
    [
        ({"ann": user_log(corrections("ann", count=3))}, "3 usable feedbacks, 3 of them new"),
        ({"ann": user_log(corrections("ann"), watermark=16)}, "16 usable feedbacks, 0 of them new"),
        ({"ann": user_log(events([Signals(rating=0.0)] * 5))}, "5 with no signal to learn from"),
        ({"ann": user_log(events([Signals(comment="be brief")] * 5))}, "nothing of it can be held out"),
    ],
)
def test_too_little_data_fails_with_the_counts(users, words):
    with pytest.raises(JobFailed, match=words):
        build(work(users), min_examples=4, max_train=100)


def test_feedback_on_one_prompt_alone_can_not_be_judged():
    one = [
        FeedbackEvent(
            revision=i, at=float(i), interaction=interaction(i, Signals(correction=f"wanted {i}"), prompt="the prompt")
        )
        for i in range(1, 7)
    ]
    with pytest.raises(JobFailed, match="two new prompts"):
        build(work({"ann": user_log(one)}), min_examples=4, max_train=100)


def test_an_examples_own_answer_is_not_in_its_context():
    log = corrections("ann", count=6)
    state = fold(log)
    for example in usable("ann", user_log(log), Counter()):
        left = without_own(state, example)
        assert all(example.id not in item.sources for item in left.exemplars.values())
        assert len(left.exemplars) == len(state.exemplars) - 1


def test_another_interactions_answer_to_the_same_prompt_is_not_in_the_context_either():
    said = [
        FeedbackEvent(
            revision=i, at=float(i), interaction=interaction(i, Signals(correction=f"wanted {i}"), prompt=prompt)
        )
        for i, prompt in enumerate(["What is jazz?", "what is  jazz?", "What is tea?"], start=1)
    ]
    first = usable("ann", user_log(said), Counter())[0]
    assert [item.prompt for item in without_own(fold(said), first).exemplars.values()] == ["What is tea?"]


def test_a_guideline_that_others_support_too_stays():
    said = events([Signals(comment="be brief", rating=1.0), Signals(comment="be brief"), Signals(comment="be kind")])
    first = usable("ann", user_log(said), Counter())[0]
    kept = {item.text for item in without_own(fold(said), first).guidelines.values()}
    assert kept == {"be brief", "be kind"}


def test_a_log_knows_its_head_and_the_revision_of_each_interaction():
    log = UserLog.of(corrections("ann", count=5), watermark=2, fast_weights=FastWeights())
    assert (log.head, log.watermark) == (5, 2)
    assert log.revisions["chatcmpl-ann-4"] == 4
