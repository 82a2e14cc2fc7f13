"""Queries: pictures, or boxes in them, in the form in which the partitions of a version are asked."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cbir.config import Channel, Config
from cbir.encoding.encoder import AsymmetricEncoder, Encoder
from cbir.errors import DataError
from cbir.images import BadImage, Decoded, Limits, View, decode
from cbir.index.index import Index
from cbir.layout import ChannelLayout, Layout
from cbir.partition import LocalFiles
from cbir.types import FeatureBatch, ImageBatch, Int64s

__all__ = ["Box", "QueryEncoder", "encode_all", "encode_queries", "restore_encoders"]

Box = tuple[float, float, float, float]
"""x, y, width, height in pixels of the upright original."""


class QueryEncoder:
    """Extracts and encodes query pictures with exactly the trained state of a version."""

    def __init__(self, config: Config, layout: Layout, files: LocalFiles, device: str = "cpu") -> None:
        self._channels = config.channels
        self._limits = config.limits
        self._describers = {
            name: channel.describer(device, _query_assets(layout.channels[name], files), regions=False)
            for name, channel in config.channels.items()
        }
        self._encoders: dict[str, list[Encoder]] = {
            name: restore_encoders(channel, layout.channels[name].encoders, files)
            for name, channel in config.channels.items()
        }
        self._indexes: dict[str, Index] = {
            name: channel.index.restore(files.state(layout.channels[name].index))
            for name, channel in config.channels.items()
            if channel.index.encodes_queries
        }

    def extract(self, pictures: Sequence[bytes], boxes: Sequence[Box | None]) -> dict[str, FeatureBatch]:
        """Raw features of the pictures by channel; DataError for a picture that cannot be decoded."""
        return {
            name: self._describers[name].describe(self._decoded(pictures, boxes, channel.extractor.view))
            for name, channel in self._channels.items()
        }

    def encode(self, features: Mapping[str, FeatureBatch]) -> dict[str, FeatureBatch]:
        """The form in which partitions are asked, by channel."""
        return {name: self._query(name, batch) for name, batch in features.items()}

    def _query(self, channel: str, batch: FeatureBatch) -> FeatureBatch:
        return self.asked(channel, encode_queries(self._encoders[channel], batch))

    def asked(self, channel: str, encoded: FeatureBatch) -> FeatureBatch:
        """What the encoders of a channel made of queries, in the form in which its partitions are asked."""
        index = self._indexes.get(channel)
        return encoded if index is None else index.queries(encoded)

    def damped(self, queries: Mapping[str, FeatureBatch], matches: Mapping[str, Int64s]) -> Mapping[str, FeatureBatch]:
        """Encoded queries with a weight for each row, given how much it matches in all partitions, by channel."""
        return {name: self._indexes[name].damped(batch, matches[name]) for name, batch in queries.items()}

    def signatures(self, channel: str, features: FeatureBatch) -> FeatureBatch:
        """Words and codes of raw features, each with as many words as the index assigns to queries."""
        encoded = encode_all(self._encoders[channel], features)
        return self._indexes[channel].query_signatures(encoded)

    def _decoded(self, pictures: Sequence[bytes], boxes: Sequence[Box | None], view: View) -> ImageBatch:
        images = [
            _decode_query(picture, box, view, self._limits, number)
            for number, (picture, box) in enumerate(zip(pictures, boxes, strict=True))
        ]
        return ImageBatch(
            np.arange(len(images), dtype=np.int64),
            [image.pixels for image in images],
            np.array([image.size for image in images], np.int32).reshape(-1, 2),
        )


def _query_assets(channel: ChannelLayout, files: LocalFiles) -> dict[str, Path]:
    """Local files of what sees queries; boxes are proposed in indexed images only, and encoders are trained."""
    unseen = ("proposer.", "encoders.")
    return {name: files.path(key) for name, key in channel.assets.items() if not name.startswith(unseen)}


def restore_encoders(channel: Channel, keys: Sequence[str], files: LocalFiles) -> list[Encoder]:
    """The trained encoders of a channel."""
    return [spec.restore(files.state(key)) for spec, key in zip(channel.encoders, keys, strict=True)]


def encode_all(encoders: Sequence[Encoder], batch: FeatureBatch) -> FeatureBatch:
    """The batch after every encoder in turn."""
    for encoder in encoders:
        batch = encoder.encode(batch)
    return batch


def encode_queries(encoders: Sequence[Encoder], batch: FeatureBatch) -> FeatureBatch:
    """The same for queries, which some encoders give another form."""
    for encoder in encoders:
        encode = encoder.encode_queries if isinstance(encoder, AsymmetricEncoder) else encoder.encode
        batch = encode(batch)
    return batch


def _decode_query(picture: bytes, box: Box | None, view: View, limits: Limits, number: int) -> Decoded:
    if box is not None:
        picture = _crop(picture, box, limits, number)
    return _decoded_or_error(decode(picture, view, limits), number)


def _crop(picture: bytes, box: Box, limits: Limits, number: int) -> bytes:
    """The box of the upright picture as PNG: a query is cropped before anything is resized."""
    whole = _decoded_or_error(decode(picture, View(size=1 << 20), limits), number)
    height, width = whole.size
    x, y, w, h = box
    left, top, right, bottom = max(round(x), 0), max(round(y), 0), min(round(x + w), width), min(round(y + h), height)
    if right <= left or bottom <= top:
        raise DataError(f"box {x:g},{y:g},{w:g},{h:g} lies outside the query picture of {width} x {height} pixels")
    buffer = io.BytesIO()
    Image.fromarray(whole.pixels[top:bottom, left:right]).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _decoded_or_error(result: Decoded | BadImage, number: int) -> Decoded:
    if isinstance(result, BadImage):
        raise DataError(f"query picture {number} cannot be used: {result.reason} ({result.detail})")
    return result
