"""TensorRT-LLM 0.21's sampling: hand arithmetic, and frequencies against exact probabilities."""

import math
from typing import Any

import numpy as np
import pytest

from internvl_triton.cpu_llm.generation import GenerationRequest
from internvl_triton.cpu_llm.sampler import MASKED, Sampler, choose, log_prob, penalise
from internvl_triton.errors import EngineError


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(
        **{
            "request_id": "a",
            "input_ids": np.array([0], np.int32),
            "request_output_len": 100,
            **changes,
        }
    )


def frequencies(logits: np.ndarray, draws: int = 4000, **sampling: Any) -> np.ndarray:
    random = np.random.default_rng(1)
    counts = np.zeros(len(logits))
    for _ in range(draws):
        counts[choose(logits, uniform=1 - random.random(), **sampling)] += 1
    return counts


# --- penalties ----------------------------------------------------------------------------------


def test_temperature() -> None:
    # 2 / (0.5 + 1e-6) = 3.999992
    np.testing.assert_allclose(
        penalise(array(2, -1), None, temperature=0.5), [3.999992, -1.999996], rtol=1e-6
    )


def test_temperature_1_leaves_logits_untouched() -> None:
    """0.21 skips the multiplication by 1 / (1 + 1e-6) then."""
    logits = array(1 / 3, -7)
    np.testing.assert_array_equal(penalise(logits, None, temperature=1.0), logits)


def test_repetition_divides_positive_and_multiplies_negative_logits() -> None:
    penalised = penalise(array(3, -3, 3), np.array([1, 2, 0]), repetition_penalty=1.5)
    assert penalised.tolist() == [2.0, -4.5, 3.0]


def test_presence_once_frequency_per_occurrence() -> None:
    penalised = penalise(
        array(5, 5, 5), np.array([0, 1, 3]), presence_penalty=0.5, frequency_penalty=0.25
    )
    assert penalised.tolist() == [5.0, 4.25, 3.75]  # 5 - .5 - .25, 5 - .5 - 3 * .25


def test_order_is_temperature_repetition_presence_frequency() -> None:
    penalised = penalise(
        array(4),
        np.array([2]),
        temperature=2.0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.125,
    )
    # 4 / 2 = 2; / 2 = 1; - 0.25 = 0.75; - 2 * 0.125 = 0.5
    np.testing.assert_allclose(penalised, [0.5], atol=2e-6)


def test_prompt_and_answer_count_but_virtual_ids_do_not() -> None:
    sampler = Sampler(
        request(input_ids=np.array([1, 1, 4, 5, 9], np.int32), frequency_penalty=1.0), vocab_size=4
    )
    logits = array(0, 10, 9.5, 0)
    assert sampler(logits)[0] == 2  # 10 - 2 occurrences in the prompt = 8 < 9.5
    assert sampler(logits)[0] == 2  # 9.5 - 1 = 8.5
    assert sampler(logits)[0] == 1  # 9.5 - 2 = 7.5 < 8


def test_min_tokens_masks_only_end_id() -> None:
    sampler = Sampler(request(end_id=2, min_tokens=2), vocab_size=3)
    logits = array(1, 2, 3)
    assert [sampler(logits)[0] for _ in range(3)] == [1, 1, 2]
    assert penalise(logits, None, masked_id=2).tolist() == [1, 2, MASKED]


def test_min_tokens_without_end_id_masks_nothing() -> None:
    assert Sampler(request(end_id=-1, min_tokens=5), vocab_size=2)(array(1, 2))[0] == 1


# --- choosing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [-1.0, 0.0])
@pytest.mark.parametrize("top_k", [0, 1])
def test_greedy(top_k: int, top_p: float) -> None:
    for uniform in (1e-9, 0.5, 1.0):
        assert choose(array(1, 7, 7, 2), top_k=top_k, top_p=top_p, uniform=uniform) == 1


def test_top_k_1_is_greedy_whatever_top_p() -> None:
    assert choose(array(1, 2), top_k=1, top_p=0.9, uniform=1.0) == 1


@pytest.mark.parametrize(
    ("uniform", "token"),
    # probabilities by rank: 3 -> 0.4, 1 -> 0.3, 0 -> 0.2, 2 -> 0.1; cumulative .4 .7 .9 1
    [(0.01, 3), (0.39, 3), (0.41, 1), (0.69, 1), (0.71, 0), (0.89, 0), (0.91, 2), (1.0, 2)],
)
def test_draw_walks_from_the_most_likely_token(uniform: float, token: int) -> None:
    logits = np.log(array(0.2, 0.3, 0.1, 0.4))
    assert choose(logits, top_k=0, top_p=1.0, uniform=uniform) == token
    assert choose(logits, top_k=4, top_p=0.0, uniform=uniform) == token


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"top_k": 0, "top_p": 1.0}, [0.2, 0.3, 0.1, 0.4]),
        # the two best, normalised: 0.3 / 0.7, 0.4 / 0.7
        ({"top_k": 2, "top_p": 0.0}, [0, 3 / 7, 0, 4 / 7]),
        # u * 0.5 walks 0.4 of token 3, then 0.1 of token 1's 0.3
        ({"top_k": 0, "top_p": 0.5}, [0, 0.1 / 0.5, 0, 0.4 / 0.5]),
        # top-k first: of 0.9 mass, u * 0.5 * 0.9 = 0.45: 0.4 of token 3, 0.05 of token 1
        ({"top_k": 3, "top_p": 0.5}, [0, 0.05 / 0.45, 0, 0.4 / 0.45]),
        # the best token alone exceeds top_p
        ({"top_k": 0, "top_p": 0.35}, [0, 0, 0, 1]),
        ({"top_k": 2000, "top_p": 1.0}, [0.2, 0.3, 0.1, 0.4]),
    ],
    ids=str,
)
def test_frequencies(sampling: dict[str, Any], expected: list[float]) -> None:
    draws = 4000
    counts = frequencies(np.log(array(0.2, 0.3, 0.1, 0.4)), draws, **sampling)
    probabilities = np.array(expected)
    assert not counts[probabilities == 0].any()
    possible = probabilities > 0
    wanted = probabilities[possible] * draws
    chi_square = ((counts[possible] - wanted) ** 2 / wanted).sum()
    assert chi_square < 16.3  # 99.9 % quantile for 3 degrees of freedom


def test_temperature_sharpens_the_distribution() -> None:
    logits = np.log(array(0.25, 0.75))
    counts = frequencies(penalise(logits, None, temperature=0.5), 4000, top_k=0, top_p=1.0)
    # squares: 1/16 : 9/16 -> 0.1 : 0.9; standard deviation sqrt(.09 / 4000) = 0.0047
    assert counts[0] / 4000 == pytest.approx(0.1, abs=0.02)


def test_temperature_0_is_greedy() -> None:
    logits = penalise(array(1.0, 1.001), None, temperature=0.0)
    assert all(
        choose(logits, top_k=0, top_p=1.0, uniform=uniform) == 1 for uniform in (1e-6, 0.5, 1.0)
    )


@pytest.mark.parametrize("top_k", [5, 100, 1024])
def test_top_k_among_ties_keeps_the_lowest_ids(top_k: int) -> None:
    logits = np.zeros(3000, np.float32)
    chosen = {
        choose(logits, top_k=top_k, top_p=0.0, uniform=uniform)
        for uniform in np.linspace(1e-9, 1, 4000)
    }
    assert chosen == set(range(top_k))


def test_top_k_is_clipped_to_1024() -> None:
    assert choose(np.zeros(3000, np.float32), top_k=2999, top_p=0.0, uniform=1.0) == 1023


def test_most_likely_tokens_against_a_full_sort() -> None:
    random = np.random.default_rng(0)
    logits = random.integers(0, 50, 500).astype(np.float32) / 20  # many ties
    order = sorted(range(500), key=lambda token: (-logits[token], token))
    for k in (2, 10, 499, 500):
        last = choose(logits, top_k=k, top_p=0.0, uniform=1.0)
        assert last == order[k - 1]


def test_same_seed_same_answer_other_seed_another() -> None:
    logits = np.zeros(1000, np.float32)

    def answer(seed: int) -> list[int]:
        sampler = Sampler(request(seed=seed, top_p=1.0), vocab_size=1000)
        return [sampler(logits)[0] for _ in range(20)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert answer(2**64 - 1) == answer(2**64 - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers(bad: float) -> None:
    with pytest.raises(EngineError, match=f"the model produced the logit {bad}"):
        choose(array(1, bad, 2), top_k=0, top_p=1.0, uniform=0.5)


# --- log-probs ----------------------------------------------------------------------------------


def test_log_prob_by_hand() -> None:
    logits = np.log(array(0.2, 0.3, 0.5)) + 4
    assert log_prob(logits, 1) == pytest.approx(math.log(0.3), abs=1e-6)


def test_log_prob_is_that_of_the_penalised_logits() -> None:
    sampler = Sampler(request(temperature=0.5, return_log_probs=True), vocab_size=2)
    token, value = sampler(np.log(array(0.25, 0.75)))
    assert token == 1
    assert value == pytest.approx(math.log(0.9), abs=1e-5)  # 9/16 of 10/16


def test_log_prob_ignores_top_k_and_top_p() -> None:
    """Normalised among the top k, a greedy token's log-prob would always be 0."""
    sampler = Sampler(request(top_k=1, return_log_probs=True), vocab_size=2)
    assert sampler(np.log(array(0.25, 0.75)))[1] == pytest.approx(math.log(0.75), abs=1e-6)


def test_log_prob_survives_a_masked_token() -> None:
    logits = penalise(array(0, 0, 50), None, masked_id=2)
    assert log_prob(logits, 0) == pytest.approx(math.log(0.5))
