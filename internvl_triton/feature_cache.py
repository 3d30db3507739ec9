"""Visual features of images seen before, so that a second question about one runs no ViT."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import InvalidRequest
from internvl_triton.vision_engine import F, VisionEngine

__all__ = ["EncodedImages", "FeatureCache", "ImageKey", "VisionEncoder"]

ImageKey = tuple[int, int, int]  # the two halves of the image digest, number of tiles


class FeatureCache(Generic[F]):
    """Least recently used features, together never more than `max_bytes`; 0 stores nothing.

    Not thread-safe: one per model instance.
    """

    def __init__(self, max_bytes: int) -> None:
        assert max_bytes >= 0, max_bytes
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._features: OrderedDict[ImageKey, F] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: ImageKey) -> F | None:
        """The features stored under `key`, now the most recently used; None if there are none."""
        features = self._features.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(key)
        return features

    def put(self, key: ImageKey, features: F) -> bool:
        """Store features that own their memory, evicting what was not used for longest.

        False, and nothing changes, if they alone are larger than `max_bytes`.
        """
        if features.nbytes > self.max_bytes:
            return False
        replaced = self._features.pop(key, None)
        if replaced is not None:
            self.num_bytes -= replaced.nbytes
        while self.num_bytes + features.nbytes > self.max_bytes:
            _, evicted = self._features.popitem(last=False)
            self.num_bytes -= evicted.nbytes
            self.evictions += 1
        self._features[key] = features
        self.num_bytes += features.nbytes
        return True


@dataclass(frozen=True)
class EncodedImages(Generic[F]):
    """features: (total tiles * tokens_per_tile, hidden_size), images in the order of the request;
    (1, hidden_size) of zeros for a request without images.

    hits + misses = images of the request; an image that comes twice in it is a hit the second time.
    """

    features: F
    hits: int
    misses: int
    tiles_run: int


class VisionEncoder(Generic[F]):
    """`engine`, run only for the tiles of images that `cache` does not hold."""

    def __init__(self, engine: VisionEngine[F], cache: FeatureCache[F]) -> None:
        self.engine = engine
        self.cache = cache
        self.totals = {"hits": 0, "misses": 0, "tiles_run": 0}  # of all requests so far

    def encode(
        self,
        tiles: NDArray[np.uint8],
        tiles_per_image: NDArray[np.int32],
        image_digests: NDArray[np.uint64],
    ) -> EncodedImages[F]:
        """Visual features of a request.

        tiles: uint8 (num_tiles, tile_size, tile_size, 3), image after image.
        tiles_per_image: int32 (num_images,), each at least 1, in sum num_tiles.
        image_digests: uint64 (num_images, 2), a hash of an image's bytes and its tiling.

        Raises InvalidRequest when the three do not fit each other or the engine.
        """
        self._check(tiles, tiles_per_image, image_digests)
        if not len(tiles):
            return EncodedImages(self.engine.zeros(1), hits=0, misses=0, tiles_run=0)
        encoded = self._encode(tiles, tiles_per_image, image_digests)
        for name in self.totals:
            self.totals[name] += getattr(encoded, name)
        return encoded

    def _encode(
        self,
        tiles: NDArray[np.uint8],
        tiles_per_image: NDArray[np.int32],
        image_digests: NDArray[np.uint64],
    ) -> EncodedImages[F]:
        keys: list[ImageKey] = [
            (int(high), int(low), int(count))
            for (high, low), count in zip(image_digests, tiles_per_image, strict=True)
        ]
        known: dict[ImageKey, F] = {}
        missing: dict[ImageKey, NDArray[np.uint8]] = {}
        first = 0
        for key in keys:
            if key not in known and key not in missing:
                cached = self.cache.get(key)
                if cached is not None:
                    known[key] = cached
                else:
                    missing[key] = tiles[first : first + key[2]]
            first += key[2]
        tiles_run = sum(map(len, missing.values()))
        if missing:
            known.update(self._run(missing))
        return EncodedImages(
            features=self.engine.concatenate([known[key] for key in keys]),
            hits=len(keys) - len(missing),
            misses=len(missing),
            tiles_run=tiles_run,
        )

    def _run(self, images: dict[ImageKey, NDArray[np.uint8]]) -> dict[ImageKey, F]:
        """Features of each image, all in one call of the engine, stored in the cache."""
        features = self.engine.encode(np.concatenate(list(images.values())))
        parts: dict[ImageKey, F] = {}
        first = 0
        for key in images:
            num_rows = key[2] * self.engine.tokens_per_tile
            rows = features[first : first + num_rows]
            # A copy: a slice would keep the features of the whole request alive in the cache.
            parts[key] = self.engine.concatenate([rows])
            self.cache.put(key, parts[key])
            first += num_rows
        return parts

    def _check(
        self,
        tiles: NDArray[np.uint8],
        tiles_per_image: NDArray[np.int32],
        image_digests: NDArray[np.uint64],
    ) -> None:
        size = self.engine.tile_size
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1:] != (size, size, 3):
            raise InvalidRequest(
                f"tiles are {tiles.dtype} {list(tiles.shape)}; "
                f"allowed: uint8 [num_tiles, {size}, {size}, 3]"
            )
        if tiles_per_image.dtype != np.int32 or tiles_per_image.ndim != 1:
            raise InvalidRequest(
                f"tiles_per_image is {tiles_per_image.dtype} {list(tiles_per_image.shape)}; "
                "allowed: int32 [num_images]"
            )
        num_images = len(tiles_per_image)
        if image_digests.dtype != np.uint64 or image_digests.shape != (num_images, 2):
            raise InvalidRequest(
                f"image_digests is {image_digests.dtype} {list(image_digests.shape)}; "
                f"allowed for {num_images} images: uint64 [{num_images}, 2]"
            )
        counts = tiles_per_image.astype(np.int64)  # a sum of int32 could wrap
        if (counts < 1).any() or counts.sum() != len(tiles):
            raise InvalidRequest(
                f"tiles_per_image is {tiles_per_image.tolist()}; "
                f"its entries must be at least 1 and sum to the {len(tiles)} tiles given"
            )
