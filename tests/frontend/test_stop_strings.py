from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ziphius.frontend.stop_strings import StopMatcher

LETTERS = st.text(alphabet="ab\n", max_size=12)


def run(stops, pieces):
    """(text, matched, text seen after each piece)."""
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        scan = matcher.push(piece)
        text += scan.text
        if scan.matched is not None:
            return text, scan.matched
    return text + matcher.flush(), None


def first_match(stops, whole):
    """By the definition: read on until some stop string ends; of several, the longest."""
    for end in range(len(whole) + 1):
        found = [s for s in stops if whole[:end].endswith(s)]
        if found:
            best = max(found, key=len)
            return whole[: end - len(best)], best
    return whole, None


@given(
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.lists(LETTERS, max_size=8),
)
def test_cuts_between_pieces_do_not_matter(stops, pieces):
    assert run(stops, pieces) == first_match(stops, "".join(pieces))


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3), LETTERS)
def test_only_what_may_be_a_start_is_held_back(stops, text):
    matcher = StopMatcher(stops)
    scan = matcher.push(text)
    if scan.matched is None:
        held = text[len(scan.text) :]
        assert scan.text + held == text
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[i:]) for i in range(len(scan.text)) for stop in stops)


def test_a_stop_over_three_pieces():
    matcher = StopMatcher(["END."])
    assert matcher.push("the E") == ("the ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("D. more") == ("", "END.")


def test_text_that_only_began_like_a_stop_comes_back():
    matcher = StopMatcher(["END."])
    assert matcher.push("EN").text == ""
    assert matcher.push("tire") == ("ENtire", None)
    assert matcher.push("E").text == ""
    assert matcher.flush() == "E"
