"""The n-gram drafter: its probabilities by hand, its trees against exhaustive search, and what it learns."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from edgemoe.draft.ngram_drafter import (
    HALF_LIFE,
    LENGTHS,
    MAX_FOLLOWERS,
    PRIOR_WEIGHT,
    SHARED_WEIGHT,
    Kind,
    Matches,
    NgramCalibration,
    NgramDrafter,
)
from edgemoe.draft.reply_memory import ReplyMemory
from edgemoe.draft.suffix_automaton import Follower, Match
from edgemoe.model.draft_tree import Candidate, DraftTree
from edgemoe.prefetch.calibration import CalibratedRate

DECAY = 0.5 ** (1 / HALF_LIFE)
NOWHERE = Matches(Match(0, 0), Match(0, 0))


def drafter_of(prompt: list[int], calibration: NgramCalibration | None = None, **options: object) -> NgramDrafter:
    drafter = NgramDrafter(calibration or NgramCalibration(), **options)  # type: ignore[arg-type]
    drafter.read(prompt)
    return drafter


def kind(
    length: int, rank: int = 0, *, rival: bool = False, repeated: bool = False, from_replies: bool = False
) -> Kind:
    follower = Follower(0, length, sole=not (rival and rank == 0), repeated=repeated)
    return Kind.of(rank, follower, longest=length if rival else length + 1, from_replies=from_replies)


def nodes(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """The drafted texts and their path probabilities, in the order they were added."""
    return {tuple(tree.text(node)): tree.probabilities[node] for node in range(1, len(tree))}


def grown(
    drafter: NgramDrafter, root: int, most: int = 99, depth: int = 4, least: float = 0.0, **how: bool
) -> DraftTree:
    tree = DraftTree(root)
    drafter.grow(tree, most, depth, least, **how)
    return tree


def random_drafter(seed: int, letters: int = 3, length: int = 60) -> tuple[NgramDrafter, list[int]]:
    """A drafter that has learnt a text with many repetitions."""
    draw = random.Random(seed)
    text = [draw.randrange(letters) for _ in range(length)]
    drafter = drafter_of(text[: length // 2])
    drafter.extend(text[length // 2 :])
    return drafter, text


# --- probabilities -------------------------------------------------------------------------------


def test_kinds_differ_by_length_rank_rivals_and_repetition() -> None:
    forms = [(rank, rival, repeated) for rank in (0, 1, 2) for rival in (True, False) for repeated in (True, False)]
    kinds = [kind(5, rank, rival=rival, repeated=repeated) for rank, rival, repeated in forms]
    assert kinds == [(4, *form, False) for form in forms]
    assert kind(5, 3) == kind(5, 2)


def test_a_later_follower_has_a_rival_where_it_shares_the_first_ones_suffix() -> None:
    sole, other = Follower(7, 4, sole=True, repeated=False), Follower(7, 4, sole=False, repeated=False)
    assert not Kind.of(0, sole, longest=4).rival
    assert Kind.of(0, other, longest=4).rival
    assert Kind.of(1, other, longest=4).rival
    assert not Kind.of(1, other, longest=5).rival


def test_lengths_share_a_kind_only_within_a_bucket() -> None:
    buckets = [kind(length).bucket for length in range(1, 40)]
    assert buckets[:10] == [0, 1, 2, 3, 4, 4, 5, 5, 5, 6]
    assert [length for length in range(1, 39) if buckets[length] != buckets[length - 1]] == list(LENGTHS)
    assert kind(10_000).bucket == len(LENGTHS)


def test_priors_rise_with_the_match_length() -> None:
    for rank in (0, 1, 2):
        for rival in (True, False):
            for repeated in (True, False):
                lengths = (*LENGTHS, LENGTHS[-1] + 1)
                rates = [kind(length, rank, rival=rival, repeated=repeated).prior for length in lengths]
                assert rates == sorted(rates)
                assert rates[0] <= 0.3
    first = [kind(5, repeated=True), kind(5), kind(5, rival=True, repeated=True), kind(5, rival=True)]
    assert [each.prior for each in first] == [0.8, 0.65, 0.4, 0.15]
    later = [kind(5, 1, rival=True, repeated=True), kind(5, 1, repeated=True), kind(5, 2, rival=True), kind(5, 2)]
    assert [each.prior for each in later] == [0.3, 0.2, 0.15, 0.12]


def test_a_rate_is_the_share_of_hits_blended_with_the_prior() -> None:
    rate = CalibratedRate(DECAY)
    assert rate.blended(0.25, 4) == 0.25
    for hit in (True, False, True):
        rate.observe(hit)
    assert rate.hits == pytest.approx(DECAY**2 + 1)
    assert rate.tries == pytest.approx(DECAY**2 + DECAY + 1)
    assert rate.blended(0.25, 4) == pytest.approx((DECAY**2 + 1 + 4 * 0.25) / (DECAY**2 + DECAY + 1 + 4))


def test_after_a_half_life_an_observation_counts_for_half() -> None:
    rate = CalibratedRate(DECAY)
    rate.observe(True)
    for _ in range(HALF_LIFE):
        rate.observe(False)
    assert rate.hits == pytest.approx(0.5)


def test_a_calibration_begins_at_the_prior_and_keeps_kinds_apart() -> None:
    calibration = NgramCalibration()
    assert calibration.rate(kind(2)) == kind(2).prior
    calibration.observe(kind(2), True)
    expected = (1 + PRIOR_WEIGHT * kind(2).prior) / (1 + PRIOR_WEIGHT)
    assert calibration.rate(kind(2)) == pytest.approx(expected)
    assert calibration.rate(kind(3)) == kind(3).prior


def test_a_drafter_knows_the_lengths_and_rates_of_a_chain() -> None:
    drafter = drafter_of([7, 1, 2, 3, 4, 5, 1, 2])
    rates = [kind(length).prior for length in (2, 3, 4)]
    assert nodes(grown(drafter, 2, most=3, least=0.01)) == pytest.approx(
        {(3,): rates[0], (3, 4): rates[0] * rates[1], (3, 4, 5): rates[0] * rates[1] * rates[2]}
    )


def test_a_later_followers_rate_is_conditional_on_the_earlier_ones_being_wrong() -> None:
    """[0, 1] was followed by 6 and 5, the latest first, and [1] twice by 7 as well."""
    drafter = drafter_of([1, 7, 1, 7, 0, 1, 5, 0, 1, 6, 0, 1])
    first, other = kind(2, rival=True).prior, kind(2, 1, rival=True).prior
    last = kind(1, 2, repeated=True).prior
    told = list(drafter.predictions(drafter.match))
    assert [token for token, _ in told] == [6, 5, 7]
    assert [probability for _, probability in told] == pytest.approx(
        [first, (1 - first) * other, (1 - first) * (1 - other) * last]
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_probabilities_of_siblings_sum_to_at_most_one(seed: int) -> None:
    drafter, text = random_drafter(seed, letters=6, length=400)
    told = list(drafter.predictions(drafter.match))
    assert len(told) == MAX_FOLLOWERS
    assert 0 < sum(probability for _, probability in told) <= 1


# --- trees ---------------------------------------------------------------------------------------


def everything(drafter: NgramDrafter, match: Matches, depth: int) -> dict[tuple[int, ...], float]:
    """All possible drafts up to `depth`, with their path probabilities."""
    found: dict[tuple[int, ...], float] = {}
    for token, probability in drafter.predictions(match) if depth else ():
        found[(token,)] = probability
        for text, further in everything(drafter, drafter.advance(match, token), depth - 1).items():
            path = (token, *text)
            found[path] = probability * further
    return found


@pytest.mark.parametrize("most", [0, 1, 5, 30])
@pytest.mark.parametrize("seed", range(5))
def test_a_tree_has_the_most_probable_nodes_of_all_possible_drafts(seed: int, most: int) -> None:
    drafter, text = random_drafter(seed)
    possible = everything(drafter, drafter.match, 4)
    tree = nodes(grown(drafter, text[-1], most))
    assert len(tree) == min(most, len(possible))
    assert list(tree.values()) == pytest.approx(sorted(possible.values(), reverse=True)[:most])
    assert tree == pytest.approx({text: possible[text] for text in tree})


@pytest.mark.parametrize("least", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_tree_has_every_node_within_its_bounds(depth: int, least: float) -> None:
    for seed in range(5):
        drafter, text = random_drafter(seed)
        possible = everything(drafter, drafter.match, depth)
        tree = nodes(grown(drafter, text[-1], 9999, depth, least))
        assert set(tree) == {text for text, probability in possible.items() if probability >= least}


@pytest.mark.parametrize("seed", range(5))
def test_without_branching_a_tree_is_the_most_probable_chain(seed: int) -> None:
    drafter, text = random_drafter(seed)
    tree = grown(drafter, text[-1], 10, 6, branching=False)
    assert tree.is_chain
    match, chain = drafter.match, list[int]()
    while len(chain) < 6 and (told := list(drafter.predictions(match))):
        chain.append(max(told, key=lambda each: each[1])[0])
        match = drafter.advance(match, chain[-1])
    assert tree.tokens[1:] == chain


def test_without_a_match_nothing_is_drafted() -> None:
    for prompt in ([], [1], [1, 2, 3]):
        assert len(grown(drafter_of(prompt), 3)) == 1


def test_the_best_candidate_stays_until_it_is_in_the_tree() -> None:
    drafter = drafter_of([7, 1, 2, 3, 4, 1, 2])
    tree = DraftTree(2)
    frontier = drafter.frontier(tree, max_depth=5, min_probability=0.1)
    best = frontier.best()
    assert best == frontier.best() == Candidate(0, 3, kind(2).prior)
    tree.add(*best[:3])
    assert frontier.best() == pytest.approx(Candidate(1, 4, kind(2).prior * kind(3).prior))


def test_nodes_of_another_drafter_get_candidates_and_are_none() -> None:
    drafter = drafter_of([7, 1, 2, 3, 4, 1, 5, 9, 1, 2])
    tree = DraftTree(2)
    frontier = drafter.frontier(tree, max_depth=5, min_probability=0.1)
    assert frontier.best() == Candidate(0, 3, kind(2).prior)
    tree.add(0, 3, 0.9)
    assert frontier.best() == pytest.approx(Candidate(1, 4, 0.9 * kind(3).prior))
    elsewhere = tree.add(0, 5, 1.0)
    assert frontier.best() == pytest.approx(Candidate(1, 4, 0.9 * kind(3).prior)), "[5] alone is matched: 1 token"
    tree.add(1, 4, 0.5)
    assert frontier.best() == pytest.approx(Candidate(3, 1, 0.5 * kind(4).prior))
    tree.add(3, 1, 0.1)
    assert frontier.best() == pytest.approx(Candidate(elsewhere, 9, kind(1).prior))


def test_a_chain_continues_the_nodes_of_another_drafter() -> None:
    drafter = drafter_of([7, 1, 2, 3, 4, 1, 5, 9, 1, 2])
    tree = DraftTree(2)
    frontier = drafter.frontier(tree, branching=False, max_depth=5, min_probability=0.1)
    tree.add(0, 5, 0.9)
    assert frontier.best() == pytest.approx(Candidate(1, 9, 0.9 * kind(1).prior))


def test_after_an_end_token_nothing_is_drafted() -> None:
    prompt = [7, 1, 2, 3, 4, 1, 2]
    assert nodes(grown(drafter_of(prompt, ends=[3]), 2)).keys() == {(3,)}
    assert (3, 4) in nodes(grown(drafter_of(prompt, ends=[4]), 2))


def test_drafting_does_not_change_the_sequence() -> None:
    drafter, text = random_drafter(3)
    before = everything(drafter, drafter.match, 4)
    grown(drafter, text[-1], 200, 20)
    assert len(drafter) == len(text)
    assert everything(drafter, drafter.match, 4) == before


# --- learning ------------------------------------------------------------------------------------


def test_only_replies_are_measured() -> None:
    calibration = NgramCalibration()
    drafter = drafter_of([1, 2, 3] * 20, calibration)
    once = kind(30)
    assert calibration.rate(once) == once.prior
    drafter.extend([1, 2])
    assert calibration.rate(once) == pytest.approx((DECAY + 1 + PRIOR_WEIGHT * once.prior) / (DECAY + 1 + PRIOR_WEIGHT))


def test_followers_before_the_right_one_are_misses_and_later_ones_do_not_count() -> None:
    """After 1 the drafter would draft 6, 5, 4; the model writes 5."""
    calibration = NgramCalibration()
    drafter_of([1, 4, 1, 5, 1, 6, 1], calibration).extend([5])
    weight = PRIOR_WEIGHT
    missed, hit, untold = kind(1, rival=True), kind(1, 1, rival=True), kind(1, 2, rival=True)
    assert calibration.rate(missed) == pytest.approx(weight * missed.prior / (1 + weight))
    assert calibration.rate(hit) == pytest.approx((1 + weight * hit.prior) / (1 + weight))
    assert calibration.rate(untold) == untold.prior


def test_followers_that_are_not_drafted_are_not_measured() -> None:
    assert MAX_FOLLOWERS == 3
    calibration = NgramCalibration()
    drafter = drafter_of([1, 3, 1, 4, 1, 5, 1, 6, 1], calibration)
    drafter.extend([3])
    third = kind(1, 2, rival=True)
    assert calibration.rate(third) == pytest.approx(PRIOR_WEIGHT * third.prior / (1 + PRIOR_WEIGHT))


def test_a_sequences_rate_blends_its_own_measurements_with_those_of_all() -> None:
    calibration = NgramCalibration()
    prompt = [7, 1, 2, 3, 4, 1, 2]
    learning, other = drafter_of(prompt, calibration), drafter_of(prompt, calibration)
    learning.extend([9])
    learning.read([1, 2])
    shared = PRIOR_WEIGHT * kind(2).prior / (1 + PRIOR_WEIGHT)
    assert dict(other.predictions(other.match)) == pytest.approx({3: shared})
    told = dict(islice(learning.predictions(learning.advance(NOWHERE, 7)), 1))
    assert told == pytest.approx({1: kind(1).prior}), "another kind"
    own = SHARED_WEIGHT * shared / (1 + SHARED_WEIGHT)
    at_two = other.advance(other.advance(NOWHERE, 3), 4)
    assert dict(other.predictions(at_two)) == pytest.approx({1: shared})
    at_two = learning.advance(learning.advance(NOWHERE, 3), 4)
    assert dict(learning.predictions(at_two)) == pytest.approx({1: own})


def test_a_model_that_copies_is_soon_expected_to_continue() -> None:
    draw = random.Random(2)
    prompt = [draw.randrange(500) for _ in range(300)]
    drafter = drafter_of(prompt)
    drafter.extend(prompt[:150])
    tree = grown(drafter, prompt[149], 20, 20, 0.5)
    assert tree.tokens[1:] == prompt[150:170]
    assert tree.probabilities[-1] > 0.8


def test_a_model_that_never_repeats_itself_is_soon_not_drafted_for() -> None:
    """A short match is always followed by another token than before."""
    draw = random.Random(2)
    text = [draw.randrange(30) for _ in range(1500)]
    drafter = drafter_of(text[:300])
    drafter.extend(text[300:])
    probabilities = [probability for _, probability in drafter.predictions(drafter.match)]
    assert probabilities
    assert max(probabilities) < 0.1
    assert len(grown(drafter, text[-1], 20, 20, 0.1)) == 1


def test_probabilities_are_calibrated() -> None:
    """Replies that copy, err and jump: at each level of probability the share of accepted drafts is that level."""
    draw, calibration = random.Random(4), NgramCalibration()
    levels: dict[int, list[tuple[float, bool]]] = {}
    for sequence in range(300):
        text, place = [draw.randrange(90) for _ in range(60)], 0
        drafter = drafter_of(text, calibration)
        for _ in range(40):
            place = (draw.randrange(60) if draw.random() < 0.1 else place + 1) % 60
            token = text[place] if draw.random() < 0.95 else draw.randrange(90)
            if sequence >= 50:
                for drafted, probability in drafter.predictions(drafter.match):
                    levels.setdefault(int(probability * 6), []).append((probability, drafted == token))
            drafter.extend([token])
    often = [level for level in levels.values() if len(level) > 300]
    assert len(often) >= 4
    for level in often:
        expected = sum(probability for probability, _ in level) / len(level)
        assert sum(hit for _, hit in level) / len(level) == pytest.approx(expected, abs=0.06)


# --- what others wrote -----------------------------------------------------------------------------


def test_an_unfinished_reply_of_another_sequence_is_drafted_from() -> None:
    calibration, memory = NgramCalibration(), ReplyMemory()
    one, other = (NgramDrafter(calibration, memory=memory) for _ in range(2))
    one.read([1, 2, 3])
    other.read([9, 2, 3])
    one.extend([4, 5, 6])
    other.extend([4])
    assert list(nodes(grown(other, 4))) == [(5,), (5, 6)]
    other.extend([5, 6])
    assert nodes(grown(other, 6)) == {}, "the other reply goes no further"
    one.extend([7])
    assert list(nodes(grown(other, 6))) == [(7,)]


def test_the_sequences_own_text_comes_before_other_replies_at_equal_length() -> None:
    memory = ReplyMemory()
    for prompt in ([1, 2, 3], [1, 2, 3]):
        other = NgramDrafter(NgramCalibration(), memory=memory)
        other.read(prompt)
    own = NgramDrafter(NgramCalibration(), memory=memory)
    own.read([8, 2, 4, 8])
    own.extend([2])
    kinds = [(token, kind.bucket, kind.from_replies) for token, kind in own._followers(own.match)]
    assert kinds == [(4, 1, False), (3, 0, True)]


def test_a_longer_match_in_other_replies_comes_before_a_shorter_one_of_its_own() -> None:
    memory = ReplyMemory()
    other = NgramDrafter(NgramCalibration(), memory=memory)
    other.read([5, 6, 7, 3])
    own = NgramDrafter(NgramCalibration(), memory=memory)
    own.read([7, 4, 5, 6])
    own.extend([7])
    assert [(token, kind.from_replies) for token, kind in own._followers(own.match)] == [(3, True), (4, False)]


def test_matches_in_other_replies_are_measured_separately() -> None:
    calibration, memory = NgramCalibration(), ReplyMemory()
    one = NgramDrafter(calibration, memory=memory)
    one.read([1, 2, 3])
    before = kind(2).prior
    other = NgramDrafter(calibration, memory=memory)
    other.read([1, 2])
    other.extend([3])
    assert calibration.rate(kind(2)) == before
    assert calibration.rate(kind(2, from_replies=True)) == pytest.approx(
        (1 + PRIOR_WEIGHT * before) / (1 + PRIOR_WEIGHT)
    )


def test_without_a_memory_a_sequence_drafts_from_itself_only() -> None:
    calibration = NgramCalibration()
    drafter_of([1, 2, 3], calibration).extend([4])
    assert nodes(grown(drafter_of([1, 2, 3], calibration), 3)) == {}


def test_tokens_of_one_step_are_not_measured_against_each_other() -> None:
    calibration, memory = NgramCalibration(), ReplyMemory()
    both = [NgramDrafter(calibration, memory=memory) for _ in range(2)]
    for each in both:
        each.read([1, 2, 3])
    for each in both:
        each.learn([4, 5])
    assert calibration.rate(kind(3, from_replies=True)) == kind(3, from_replies=True).prior
    for each in both:
        each.publish()
    third = drafter_of([1, 2, 3], calibration, memory=memory)
    assert list(nodes(grown(third, 3, depth=2))) == [(4,), (4, 5)]
