"""Whose turn it is among what waits."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from service.domain.turns import Turns


def waiting(names: Iterable[str]) -> Turns[str]:
    """Things named `<tenant><user><number>`, in the order in which they came."""
    turns: Turns[str] = Turns()
    for name in names:
        turns.add(name, tenant=name[0], user=name[1])
    return turns


def served(turns: Turns[str]) -> list[str]:
    return [turns.next() for _ in range(len(turns))]


def test_of_one_user_who_came_first_is_first() -> None:
    assert served(waiting(["ax1", "ax2", "ax3"])) == ["ax1", "ax2", "ax3"]


def test_tenants_take_turns_and_in_each_its_users() -> None:
    turns = waiting(["ax1", "ax2", "ax3", "ay1", "bx1", "bx2"])
    assert served(turns) == ["ax1", "bx1", "ay1", "bx2", "ax2", "ax3"]


def test_what_was_taken_out_has_no_turn() -> None:
    turns = waiting(["ax1", "ax2", "bx1"])
    turns.remove("ax1", tenant="a", user="x")
    turns.remove("ax9", tenant="a", user="x")
    turns.remove("cx1", tenant="c", user="x")
    assert served(turns) == ["ax2", "bx1"]


def test_a_newcomer_gets_the_place_of_the_newest_of_who_has_most() -> None:
    turns = waiting(["ax1", "ax2", "ax3", "ay1", "bx1"])
    assert turns.give_way(tenant="b", user="y") == "ax3"
    assert served(turns) == ["ax1", "bx1", "ay1", "ax2"]


def test_who_has_most_gets_nobodys_place() -> None:
    turns = waiting(["ax1", "ax2", "ax3", "ay1", "bx1"])
    assert turns.give_way(tenant="a", user="x") is None
    assert len(turns) == 5


def test_inside_the_tenant_with_most_a_users_longest_line_gives_way() -> None:
    assert waiting(["ax1", "ax2", "ax3", "bx1"]).give_way(tenant="a", user="y") == "ax3"


def test_of_equals_none_gives_way() -> None:
    assert waiting(["ax1", "bx1"]).give_way(tenant="c", user="x") is None
    assert waiting([]).give_way(tenant="a", user="x") is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=40))
def test_everything_that_waits_has_its_turn_and_none_waits_longer_than_for_one_of_each_other(
    who: list[tuple[str, str]],
) -> None:
    names = [f"{tenant}{user}{number}" for number, (tenant, user) in enumerate(who)]
    order = served(waiting(names))
    assert sorted(order) == sorted(names)
    firsts = [next(i for i, name in enumerate(order) if name[0] == tenant) for tenant in {t for t, _ in who}]
    assert sorted(firsts) == list(range(len(firsts)))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=200))
def test_a_full_line_comes_to_be_shared(who: list[tuple[str, str]]) -> None:
    room, turns = 6, waiting(f"ax{n}" for n in range(6))
    for number, (tenant, user) in enumerate(who):
        if len(turns) >= room and turns.give_way(tenant=tenant, user=user) is None:
            continue
        turns.add(f"{tenant}{user}{number}", tenant=tenant, user=user)
    assert len(turns) == room
    kept = [name[0] for name in served(turns)]
    for tenant in "bc":
        tried = sum(name == tenant for name, _ in who)
        assert kept.count(tenant) >= min(tried, room // 3)
