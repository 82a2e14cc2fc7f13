"""What every index of vectors owes, held by the inverted files with settings that are not the default."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cbir.index.dense import merge_partitions, write_index
from cbir.index.ivfaq import IvfAq
from cbir.index.ivfflat import IvfFlat
from cbir.index.ivfpq import IvfPq
from cbir.index.ivfrabitq import IvfRabitq
from cbir.types import Hits
from tests.index.test_conformance import (  # noqa: F401 - the tests and their fixtures run here again
    DEPTH,
    batch,
    index,
    queries,
    sample,
    saved,
    test_a_restored_index_is_the_index,
    test_a_saved_partition_is_the_partition,
    test_an_indexed_image_finds_itself,
    test_depth_beyond_the_partition_is_padded,
    test_entries_are_one_plain_row_per_vector,
    test_entries_do_not_depend_on_the_batch,
    test_entries_survive_parquet,
    test_hits_are_ranked_padded_and_of_the_declared_types,
    test_images_may_have_many_rows_or_none,
    test_no_vectors_no_queries_and_one_image,
    test_queries_do_not_depend_on_each_other,
    test_the_order_and_sharding_of_entries_never_show,
    test_the_order_of_the_rows_of_an_image_never_shows,
    test_the_same_sample_and_seed_give_the_same_bytes,
    test_the_size_of_an_entry_is_what_a_partition_grows_by,
    test_wrong_input_is_refused_with_its_place,
)
from tests.index.vectors import assert_same

VARIANTS: dict[str, Any] = {
    "half": IvfFlat(code="float16"),
    "eight bits": IvfFlat(code="sq8", metric="l2"),
    "graph": IvfPq(coarse="hnsw", lists=30),
    "multi-index": IvfPq(coarse="imi", lists=64, metric="l2"),
    "refined by floats": IvfPq(bits=4, bytes=8, refine="float32", refine_factor=4, opq=True),
    "refined by bytes": IvfPq(bits=4, bytes=8, refine="sq8", metric="l2"),
    "fast scan": IvfPq(bits=4, bytes=32, fast_scan=True),
    "fast scan refined": IvfPq(bits=4, bytes=8, fast_scan=True, refine="float16", metric="l2"),
    "local search": IvfAq(quantiser="local_search", bits=4, bytes=12, iterations=5),
    "product of residuals": IvfAq(quantiser="product_residual", bits=5, bytes=16, iterations=5),
    "signs": IvfRabitq(bits=1, refine="sq8"),
    "eight bits a dimension": IvfRabitq(bits=8, metric="l2"),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def spec(request):
    return VARIANTS[request.param]


def test_merged_partitions_answer_like_one_or_refine_more(spec, index, batch, queries, tmp_path):  # noqa: F811
    built = index.build(index.entries(batch))
    whole = built.search(queries, DEPTH)
    parts = [index.build(index.entries(batch.take(np.arange(start, 200, 3)))) for start in range(3)]
    merged = Hits.merge([part.search(queries, DEPTH) for part in parts], DEPTH)
    if getattr(spec, "refine", None):
        assert (merged.scores >= whole.scores).all()
    else:
        assert_same(merged, whole)
    write_index(merge_partitions(parts), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == saved(built, tmp_path / "whole")


def test_a_loaded_partition_gives_its_entries_back(spec, index, batch, tmp_path):  # noqa: F811
    entries = index.entries(batch)
    index.build(entries).save(tmp_path / "part")
    again = spec.load(tmp_path / "part").entries()
    order = [(name, "ascending") for name in ("image_id", "list")]
    assert again.sort_by(order).equals(entries.sort_by(order))
    assert again.schema.equals(entries.schema, check_metadata=True)
    assert isinstance(again, pa.Table)
