"""The cache against a plain model of it, and the encoder with an engine that notes its runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_triton.errors import InvalidRequest
from internvl_triton.feature_cache import FeatureCache, VisionEncoder

TILE, TOKENS, HIDDEN = 2, 4, 3
IMAGE_BYTES = TOKENS * HIDDEN * 4  # features of one tile, float32


class FakeEngine:
    """Features of a tile are its first pixel's red value; `runs` holds the tiles of each call."""

    hidden_size, tokens_per_tile, tile_size = HIDDEN, TOKENS, TILE

    def __init__(self) -> None:
        self.runs: list[list[int]] = []

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        values = tiles[:, 0, 0, 0]
        self.runs.append(values.tolist())
        return np.repeat(values, TOKENS).astype(np.float32)[:, None] * np.ones((1, HIDDEN), "f4")

    def concatenate(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)

    def zeros(self, num_rows: int) -> np.ndarray:
        return np.zeros((num_rows, HIDDEN), np.float32)


def request(*images: Sequence[int]):
    """tiles, tiles_per_image and image_digests of images given as the values of their tiles."""
    values = [value for image in images for value in image]
    tiles = np.zeros((len(values), TILE, TILE, 3), np.uint8)
    tiles[:, 0, 0, 0] = values
    counts = np.array([len(image) for image in images], np.int32)
    digests = [(hash(tuple(image)) % 2**64, len(image)) for image in images]
    return tiles, counts, np.array(digests, np.uint64).reshape(-1, 2)


def expected_features(*images: Sequence[int]) -> np.ndarray:
    return FakeEngine().encode(request(*images)[0])


@pytest.fixture
def encoder():
    return VisionEncoder(FakeEngine(), FeatureCache(max_bytes=100 * IMAGE_BYTES))


def counts(result) -> tuple[int, int, int]:
    return result.hits, result.misses, result.tiles_run


def test_a_second_turn_about_the_same_image_runs_nothing(encoder):
    first = encoder.encode(*request([1, 2, 3]))
    second = encoder.encode(*request([1, 2, 3]))
    assert counts(first) == (0, 1, 3)
    assert counts(second) == (1, 0, 0)
    assert encoder.engine.runs == [[1, 2, 3]]
    np.testing.assert_array_equal(second.features, expected_features([1, 2, 3]))


def test_a_new_image_among_old_ones_runs_only_its_own_tiles(encoder):
    encoder.encode(*request([1, 2], [3]))
    images = [3], [7, 8, 9], [1, 2], [5]
    result = encoder.encode(*request(*images))
    assert counts(result) == (2, 2, 4)
    assert encoder.engine.runs == [[1, 2, 3], [7, 8, 9, 5]]
    np.testing.assert_array_equal(result.features, expected_features(*images))


def test_an_image_that_comes_twice_in_a_request_runs_once(encoder):
    images = [4, 5], [6], [4, 5]
    result = encoder.encode(*request(*images))
    assert counts(result) == (1, 2, 3)
    assert encoder.engine.runs == [[4, 5, 6]]
    np.testing.assert_array_equal(result.features, expected_features(*images))


def test_no_image_is_one_zero_row_and_leaves_the_engine_alone(encoder):
    result = encoder.encode(*request())
    assert counts(result) == (0, 0, 0)
    np.testing.assert_array_equal(result.features, np.zeros((1, HIDDEN), np.float32))
    assert encoder.engine.runs == []


def test_without_room_everything_is_run_each_time(encoder):
    encoder.cache = FeatureCache(max_bytes=0)
    for _ in range(2):
        result = encoder.encode(*request([1], [2, 3], [1]))
        assert counts(result) == (1, 2, 3)
        np.testing.assert_array_equal(result.features, expected_features([1], [2, 3], [1]))


def test_a_request_larger_than_the_cache_is_answered(encoder):
    encoder.cache = FeatureCache(max_bytes=2 * IMAGE_BYTES)
    images = [1, 1], [2, 2], [3, 3], [1, 1]
    for _ in range(2):
        result = encoder.encode(*request(*images))
        np.testing.assert_array_equal(result.features, expected_features(*images))
    assert encoder.cache.num_bytes <= 2 * IMAGE_BYTES


def test_the_same_digest_with_another_number_of_tiles_is_another_image(encoder):
    tiles, tiles_per_image, digests = request([1, 2], [3])
    digests[:] = 9
    encoder.encode(tiles, tiles_per_image, digests)
    result = encoder.encode(tiles, tiles_per_image, digests)
    assert counts(result) == (2, 0, 0)
    np.testing.assert_array_equal(result.features, expected_features([1, 2], [3]))


def test_both_halves_of_the_digest_count(encoder):
    tiles, tiles_per_image, _ = request([1], [2], [3])
    digests = np.array([[2**64 - 1, 0], [2**64 - 1, 1], [0, 2**64 - 1]], np.uint64)
    assert counts(encoder.encode(tiles, tiles_per_image, digests)) == (0, 3, 3)


def test_callers_cannot_change_what_is_cached(encoder):
    for _ in range(3):
        result = encoder.encode(*request([5]))
        np.testing.assert_array_equal(result.features, expected_features([5]))
        result.features[:] = -1


def test_cached_features_own_their_memory(encoder):
    encoder.encode(*request([1], [2, 3]))
    assert all(features.base is None for features in encoder.cache._features.values())
    assert encoder.cache.num_bytes == 3 * IMAGE_BYTES


def test_an_engine_that_fails_caches_nothing(encoder, monkeypatch):
    def fail(tiles):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(encoder.engine, "encode", fail)
        with pytest.raises(MemoryError):
            encoder.encode(*request([1]))
    assert len(encoder.cache) == 0
    assert counts(encoder.encode(*request([1]))) == (0, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": np.zeros((3, TILE, TILE, 3), np.float32)}, "tiles are float32"),
        ({"tiles": np.zeros((3, 3, TILE, TILE), np.uint8)}, r"tiles are uint8 \[3, 3, 2, 2\]"),
        ({"tiles_per_image": np.array([2], np.int32)}, r"image_digests .* for 1 images"),
        ({"tiles_per_image": np.array([2, 2], np.int32)}, r"\[2, 2\]; .* the 3 tiles"),
        ({"tiles_per_image": np.array([3, 0], np.int32)}, "at least 1"),
        ({"tiles_per_image": np.array([4, -1], np.int32)}, "at least 1"),
        ({"tiles_per_image": np.array([2, 1])}, "tiles_per_image is int64"),
        ({"tiles_per_image": np.array([[2], [1]], np.int32)}, r"int32 \[2, 1\]"),
        ({"image_digests": np.zeros((2,), np.uint64)}, r"uint64 \[2\]; .*\[2, 2\]"),
        ({"image_digests": np.zeros((2, 2), np.int64)}, "image_digests is int64"),
        ({"tiles": np.zeros((0, TILE, TILE, 3), np.uint8)}, "the 0 tiles"),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_refused(encoder, change, message):
    tiles, tiles_per_image, image_digests = request([1, 2], [3])
    given = {"tiles": tiles, "tiles_per_image": tiles_per_image, "image_digests": image_digests}
    with pytest.raises(InvalidRequest, match=message):
        encoder.encode(**{**given, **change})
    assert encoder.engine.runs == []


def test_tile_counts_do_not_wrap(encoder):
    tiles, _, _ = request([1, 2])
    counts = np.array([2**31 - 1, 2**31 - 1, 4], np.int32)  # sums to 2 modulo 2^32
    with pytest.raises(InvalidRequest, match="the 2 tiles"):
        encoder.encode(tiles, counts, np.zeros((3, 2), np.uint64))


def features_of(num_bytes: int) -> np.ndarray:
    return np.zeros(num_bytes, np.uint8)


def test_what_was_used_least_recently_goes_first():
    cache = FeatureCache(max_bytes=30)
    a, b, c = (1, 0, 1), (2, 0, 1), (3, 0, 1)
    assert cache.put(a, features_of(10))
    assert cache.put(b, features_of(10))
    assert cache.get(a) is not None
    assert cache.put(c, features_of(15))  # 35 bytes: b goes
    assert cache.get(b) is None
    assert cache.get(a) is not None
    assert cache.get(c) is not None
    assert (cache.hits, cache.misses, cache.evictions) == (3, 1, 1)
    assert (cache.num_bytes, len(cache)) == (25, 2)


def test_oversize_features_are_not_stored_and_evict_nothing():
    cache = FeatureCache(max_bytes=30)
    cache.put((1, 0, 1), features_of(30))
    assert not cache.put((2, 0, 1), features_of(31))
    assert (len(cache), cache.num_bytes, cache.evictions) == (1, 30, 0)


def test_replacing_an_entry_counts_its_bytes_once():
    cache = FeatureCache(max_bytes=30)
    cache.put((1, 0, 1), features_of(20))
    cache.put((1, 0, 1), features_of(25))
    assert (len(cache), cache.num_bytes, cache.evictions) == (1, 25, 0)


@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 20)), max_size=60),
)
def test_any_sequence_behaves_like_a_list_in_order_of_use(max_bytes, operations):
    cache: FeatureCache[np.ndarray] = FeatureCache(max_bytes)
    model: list[tuple[int, int]] = []  # (name, bytes), least recently used first
    for is_put, name, num_bytes in operations:
        known = dict(model)
        if is_put and num_bytes <= max_bytes:
            model = [entry for entry in model if entry[0] != name]
            while sum(size for _, size in model) + num_bytes > max_bytes:
                model.pop(0)
            model.append((name, num_bytes))
        elif not is_put and name in known:
            model = [entry for entry in model if entry[0] != name] + [(name, known[name])]
        if is_put:
            assert cache.put((name, 0, 1), features_of(num_bytes)) == (num_bytes <= max_bytes)
        else:
            found = cache.get((name, 0, 1))
            assert (found.nbytes if found is not None else None) == known.get(name)
        assert [(key[0], value.nbytes) for key, value in cache._features.items()] == model
        assert cache.num_bytes == sum(size for _, size in model) <= max_bytes
