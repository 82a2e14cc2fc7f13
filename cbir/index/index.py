"""The role of an index: encoded features in, a searchable structure out.

A trained, empty `Index` turns features into *entries*, an Arrow table with one row per stored vector (or posting) that
can be written as a plain Parquet file per shard. A partition is built from the entries of any number of shards, so
that merging is concatenation: `build(entries(a) ++ entries(b))` is the index of `a ++ b`.

What depends on the whole collection (idf, mean lengths) is computed once, at the merge, from additive *statistics* of
all shards: `build(entries, statistics(a) + statistics(b))`; so neither shards nor partitions show in a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa

from cbir.spec import Method
from cbir.types import FeatureBatch, Float64s, Hits, Int64s, State

__all__ = ["Assignment", "Index", "IndexSpec", "SearchIndex"]


@dataclass(frozen=True)
class Assignment:
    """Where K rows fall among `num_lists` lists or words: `lists` (K,), and their squared distances to these, `errors`
    (K,)."""

    lists: Int64s
    errors: Float64s
    num_lists: int


class SearchIndex(Protocol):
    """One partition, ready to answer."""

    def search(self, queries: FeatureBatch, depth: int) -> Hits:
        """The best `depth` images of this partition for each query image; scores higher is better."""
        ...

    def matches(self, queries: FeatureBatch) -> Int64s:
        """How much each row (K,) of the queries matches in this partition, as an integer that adds up over partitions.

        ValueError unless `IndexSpec.damps_matches`.
        """
        raise ValueError(f"{type(self).__name__} counts no matches of {len(queries)} queries")

    def joined(self, others: Sequence["SearchIndex"]) -> "SearchIndex | None":  # noqa: ARG002 - most cannot
        """One index that answers as this partition and others of its version do together, where there is one that is
        faster than asking one after the other. What it was made of must stay open."""
        return None

    def save(self, path: Path) -> None:
        """Write the partition as one file; equal entries give equal bytes."""
        ...


class Index(Protocol):
    """A trained index without content."""

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per stored vector, first column `image_id` (int64), the rest as the method documents."""
        ...

    def statistics(self, entries: pa.Table) -> State:  # noqa: ARG002 - most indexes need none
        """Counts of these entries by name; those of several shards are added up, and must be exact integers."""
        return {}

    def build(self, entries: pa.Table, totals: State | None = None) -> SearchIndex:
        """The searchable partition of these entries, whose order does not matter.

        `totals`: the statistics of all partitions; without them, these entries are the whole collection.
        """
        ...

    def piece(self, entries: pa.Table, number: int) -> pa.Table:  # noqa: ARG002 - most partitions are one file
        """Those of the entries that belong in file number `number` of the `IndexSpec.pieces` of a partition."""
        return entries

    def signatures(self, batch: FeatureBatch) -> FeatureBatch:
        """The nearest word of every stored feature with a short code, for geometric verification.

        ValueError unless it is an index of local features.
        """
        raise ValueError(f"{type(self).__name__} has no visual words for {len(batch)} images")

    def query_signatures(self, batch: FeatureBatch) -> FeatureBatch:
        """The same of queries, whose features have several words each."""
        return self.signatures(batch)

    def assignment(self, batch: FeatureBatch) -> Assignment | None:  # noqa: ARG002 - many have no lists
        """How encoded features fall among the trained lists or words; None for an index without."""
        return None

    def queries(self, batch: FeatureBatch) -> FeatureBatch:
        """The form in which partitions are asked: done once per query, however many partitions there are."""
        return batch

    def damped(self, queries: FeatureBatch, matches: Int64s) -> FeatureBatch:
        """Queries with a weight for each row, given how much it matches in all partitions together.

        ValueError unless `IndexSpec.damps_matches`.
        """
        raise ValueError(f"{type(self).__name__} does not damp the {len(matches)} rows of {len(queries)} queries")

    def state(self) -> State:
        """Everything that `IndexSpec.restore` needs."""
        ...


class IndexSpec(Method):
    """Configuration of an index."""

    role: ClassVar[str] = "index"

    suffix: ClassVar[str]
    """The file extension of a partition."""
    local: ClassVar[bool] = False
    """Whether it holds the local features of an image rather than descriptors of whole images or regions."""
    needs_regions: ClassVar[bool] = False
    """Whether it looks at the boxes that the channel's proposer finds."""
    has_statistics: ClassVar[bool] = False
    """Whether its partitions need totals over the whole collection."""
    has_codebook: ClassVar[bool] = False
    """Whether most of its training is a codebook, which is trained by itself so that other settings can share it."""
    fits_sample: ClassVar[bool] = False
    """Whether `finish` looks at the sample."""
    encodes_queries: ClassVar[bool] = False
    """Whether `Index.queries` does anything, for which a searcher must hold the trained state."""
    effort: ClassVar[str | None] = None
    """The field that says how much of a partition a search looks at, and changes nothing that is stored."""
    metric: Literal["ip", "l2"] = "ip"
    """How vectors are compared: by inner product, or by squared Euclidean distance."""

    @property
    def damps_matches(self) -> bool:
        """Whether a row of a query counts less the more it matches in the whole collection, so that all partitions
        have to be asked for `matches` first."""
        return False

    @property
    def trained(self) -> bool:
        """Whether `train` looks at more of the sample than its D."""
        return True

    def train(self, sample: FeatureBatch, seed: int) -> Index:
        """Train on encoded features; DataError if the sample is too small. Same sample and seed, same bytes."""
        raise NotImplementedError

    def codebook_identity(self) -> dict[str, Any]:
        """What identifies its codebook, for those that have one: the settings that change it."""
        raise NotImplementedError

    @property
    def codebook_rounds(self) -> int:
        """In how many rounds over the sample its codebook is trained after `train_codebook`."""
        return 0

    def train_codebook(self, sample: FeatureBatch, seed: int) -> State:
        """The codebook of encoded features, or where it begins; DataError if the sample is too small. Same sample and
        seed, same bytes."""
        raise NotImplementedError

    def codebook_sums(self, codebook: State, batch: FeatureBatch) -> State:
        """What encoded features add to the next round: arrays of integers, which are added up over the sample."""
        raise NotImplementedError

    def next_codebook(self, codebook: State, sums: State, *, last: bool) -> State:
        """The codebook after a round over the whole sample."""
        raise NotImplementedError

    def finish(self, codebook: State, sample: FeatureBatch, seed: int) -> Index:
        """What `train` does after the codebook is there."""
        raise NotImplementedError

    def restore(self, state: State) -> Index:
        """The trained index that had this state."""
        raise NotImplementedError

    @property
    def pieces(self) -> int:
        """How many files a partition has; they are built in parallel."""
        return 1

    def load(self, *paths: Path) -> SearchIndex:
        """Open a partition from its files, in their order, memory-mapped where the format allows it."""
        raise NotImplementedError

    def entry_bytes(self, dim: int) -> int:
        """Bytes of one stored vector of D = dim, for the planning of partitions."""
        raise NotImplementedError
