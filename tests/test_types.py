import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbir.errors import ArtifactError
from cbir.types import FEATURES_SCHEMA, FeatureBatch, Hits, ImageBatch, Regions, image_id

DTYPES = ["uint8", "float16", "float32", "float64"]


@st.composite
def batches(draw, min_images=0, dtypes=DTYPES):
    """Features of a few images, some without any; D, G and the dtype vary."""
    counts = draw(st.lists(st.integers(0, 4), min_size=min_images, max_size=6))
    dim, columns, dtype = draw(st.integers(1, 5)), draw(st.sampled_from([0, 4, 6])), draw(st.sampled_from(dtypes))
    return make_batch(counts, dim, columns, dtype)


def make_batch(counts, dim=3, columns=4, dtype="float32"):
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    num_rows = offsets[-1]
    descriptors = (np.arange(num_rows * dim).reshape(num_rows, dim) % 251).astype(dtype)
    geometry = np.arange(num_rows * columns, dtype=np.float32).reshape(num_rows, columns) + 0.5
    return FeatureBatch(np.arange(len(counts), dtype=np.int64) * 7 + 2**60, offsets, descriptors, geometry)


def assert_equal(left, right):
    for name in ("image_ids", "offsets", "descriptors", "geometry"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name, strict=True)


class TestImageId:
    def test_is_pinned(self):
        """These numbers are in stored indexes; they may never change."""
        assert image_id("a/b.jpg") == 3744377629895026263
        assert image_id("é") == 7317610273420446871

    @given(st.text())
    def test_fits_into_a_positive_int64(self, key):
        assert 0 <= image_id(key) < 2**63

    def test_tells_keys_apart(self):
        assert len({image_id(f"{i}.jpg") for i in range(10_000)}) == 10_000


class TestImageBatch:
    def test_counts_its_images(self):
        images = [np.zeros((2, 3, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
        assert len(ImageBatch(np.arange(2), images, np.array([[2, 3], [40, 50]], np.int32))) == 2

    @pytest.mark.parametrize(("num_images", "num_sizes"), [(1, 2), (2, 1)])
    def test_refuses_parts_that_do_not_agree(self, num_images, num_sizes):
        images = [np.zeros((2, 3, 3), np.uint8)] * num_images
        with pytest.raises(ValueError, match="do not agree"):
            ImageBatch(np.arange(2), images, np.zeros((num_sizes, 2), np.int32))


class TestFeatureBatch:
    def test_a_global_descriptor_is_one_row_per_image(self):
        batch = FeatureBatch.of_global(np.array([5, 9]), np.eye(2, dtype=np.float32))
        assert batch.counts.tolist() == [1, 1]
        assert batch.geometry.shape == (2, 0)
        assert batch.geometry.dtype == np.float32

    @given(batches(min_images=1))
    def test_of_images_puts_rows_together_as_they_were(self, batch):
        slices = [batch.rows(i) for i in range(len(batch))]
        descriptors, geometry = [batch.descriptors[s] for s in slices], [batch.geometry[s] for s in slices]
        assert_equal(FeatureBatch.of_images(batch.image_ids, descriptors, geometry), batch)
        assert FeatureBatch.of_images(batch.image_ids, descriptors).geometry.shape == (len(batch.descriptors), 0)

    @given(batches(min_images=1), st.data())
    def test_take_is_the_images_one_by_one(self, batch, data):
        indices = np.array(data.draw(st.lists(st.integers(0, len(batch) - 1), max_size=9)), np.int64)
        taken = batch.take(indices)
        assert taken.image_ids.tolist() == batch.image_ids[indices].tolist()
        assert taken.descriptors.shape[1] == batch.descriptors.shape[1]
        assert taken.descriptors.flags.c_contiguous
        for i, index in enumerate(indices):
            np.testing.assert_array_equal(taken.descriptors[taken.rows(i)], batch.descriptors[batch.rows(index)])
            np.testing.assert_array_equal(taken.geometry[taken.rows(i)], batch.geometry[batch.rows(index)])

    @given(batches(), st.lists(st.integers(0, 6), max_size=3))
    def test_concatenate_undoes_a_cut(self, batch, cuts):
        edges = sorted({0, len(batch), *(min(cut, len(batch)) for cut in cuts)})
        parts = [batch.take(np.arange(a, b)) for a, b in zip([0, *edges], edges, strict=False)]
        assert_equal(FeatureBatch.concatenate(parts), batch)
        assert_equal(FeatureBatch.concatenate(iter(parts)), batch)

    def test_with_descriptors_keeps_images_and_geometry(self):
        batch = make_batch([2, 0, 1])
        other = batch.with_descriptors(np.ones((3, 9), np.float32))
        assert other.descriptors.shape == (3, 9)
        assert other.geometry is batch.geometry
        with pytest.raises(ValueError, match="do not divide"):
            batch.with_descriptors(np.ones((4, 9), np.float32))

    @pytest.mark.parametrize(
        ("offsets", "descriptors", "geometry", "message"),
        [
            ([0, 1, 2], np.ones(2), np.ones((2, 4)), r"\(K, D\)"),
            ([0, 1, 3], np.ones((2, 3)), np.ones((2, 4)), "do not divide"),
            ([1, 1, 2], np.ones((2, 3)), np.ones((2, 4)), "do not divide"),
            ([0, 2], np.ones((2, 3)), np.ones((2, 4)), "do not divide"),
            ([0, 3, 2], np.ones((2, 3)), np.ones((2, 4)), "do not divide"),
            ([0, 1, 2], np.ones((2, 3)), np.ones((3, 4)), "geometry has 3 rows"),
        ],
    )
    def test_refuses_parts_that_do_not_agree(self, offsets, descriptors, geometry, message):
        with pytest.raises(ValueError, match=message):
            FeatureBatch(np.arange(2), np.array(offsets), descriptors, geometry)


class TestArrow:
    @given(batches())
    def test_round_trip(self, batch):
        table = batch.to_arrow()
        table.validate(full=True)
        assert table.schema.equals(FEATURES_SCHEMA)
        assert_equal(FeatureBatch.from_arrow(table), batch)
        assert_equal(FeatureBatch.from_arrow(pa.Table.from_batches([table])), batch)

    @given(batches(), st.integers(0, 7), st.integers(0, 7))
    def test_a_slice_is_the_images_of_the_slice(self, batch, start, length):
        expected = batch.take(np.arange(len(batch))[start : start + length])
        start = min(start, len(batch))
        assert_equal(FeatureBatch.from_arrow(batch.to_arrow().slice(start, length)), expected)
        table = pa.Table.from_batches([batch.to_arrow()])
        assert_equal(FeatureBatch.from_arrow(table.slice(start, length)), expected)

    @given(batches(min_images=2), st.data())
    def test_a_table_of_several_chunks(self, batch, data):
        cut = data.draw(st.integers(0, len(batch)))
        arrow = batch.to_arrow()
        table = pa.concat_tables([pa.Table.from_batches([part]) for part in (arrow.slice(0, cut), arrow.slice(cut))])
        assert_equal(FeatureBatch.from_arrow(table), batch)
        assert_equal(FeatureBatch.from_arrow(table.slice(1)), batch.take(np.arange(1, len(batch))))

    def test_a_table_without_chunks(self):
        batch = make_batch([], 3, 4)
        assert_equal(FeatureBatch.from_arrow(batch.to_arrow().schema.empty_table()), batch)
        assert_equal(FeatureBatch.from_arrow(pa.Table.from_batches([], batch.to_arrow().schema)), batch)

    @given(batches())
    def test_parquet_and_ipc_keep_everything(self, batch):
        table = pa.Table.from_batches([batch.to_arrow()])
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=2)
        assert_equal(FeatureBatch.from_arrow(pq.read_table(io.BytesIO(buffer.getvalue()))), batch)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert_equal(FeatureBatch.from_arrow(pa.ipc.open_file(sink.getvalue()).read_all()), batch)

    def test_other_columns_are_ignored_and_rows_are_plain_bytes(self):
        batch = make_batch([2, 0, 1], dim=3, dtype="uint8")
        table = pa.Table.from_batches([batch.to_arrow()]).append_column("key", pa.array(["a", "b", "c"]))
        assert_equal(FeatureBatch.from_arrow(table), batch)
        first = table.to_pylist()[0]
        dtype = table.schema.metadata[b"dtype"].decode()
        np.testing.assert_array_equal(
            np.frombuffer(first["descriptors"], dtype).reshape(-1, int(table.schema.metadata[b"dim"])),
            batch.descriptors[:2],
        )

    def test_nothing_is_copied(self):
        batch = make_batch([2, 1])
        back = FeatureBatch.from_arrow(batch.to_arrow())
        assert np.shares_memory(back.descriptors, batch.descriptors)
        assert np.shares_memory(back.geometry, batch.geometry)

    def test_rows_that_are_not_contiguous_are_stored_by_value(self):
        batch = make_batch([2, 1])
        strided = batch.with_descriptors(np.asfortranarray(batch.descriptors))
        assert_equal(FeatureBatch.from_arrow(strided.to_arrow()), batch)

    def test_a_table_that_is_not_of_features_is_refused(self):
        with pytest.raises(ArtifactError, match="metadata"):
            FeatureBatch.from_arrow(make_batch([1]).to_arrow().replace_schema_metadata({}))


def candidates(draw, num_queries, width):
    ids = st.lists(st.integers(-1, 30), min_size=width, max_size=width)
    scores = st.lists(st.sampled_from([-np.inf, -1.5, 0.0, -0.0, 0.25, 3.0]), min_size=width, max_size=width)
    rows = [(draw(ids), draw(scores)) for _ in range(num_queries)]
    shape = (num_queries, width)
    return (
        np.array([row[0] for row in rows], np.int64).reshape(shape),
        np.array([row[1] for row in rows], np.float32).reshape(shape),
    )


def brute_force(ids, scores, depth):
    found = sorted((-score, image) for image, score in zip(ids.tolist(), scores.tolist(), strict=True) if image >= 0)
    found = (found + [(np.inf, -1)] * depth)[:depth]
    return [image for _, image in found], [-score for score, _ in found]


class TestHits:
    @given(st.data(), st.integers(0, 3), st.integers(0, 8), st.integers(1, 10))
    def test_ranked_is_the_sorted_list(self, data, num_queries, width, depth):
        ids, scores = candidates(data.draw, num_queries, width)
        hits = Hits.ranked(ids, scores, depth)
        assert len(hits) == num_queries
        assert hits.image_ids.shape == hits.scores.shape == (num_queries, depth)
        assert hits.image_ids.dtype == np.int64
        assert hits.scores.dtype == np.float32
        for q in range(num_queries):
            expected_ids, expected_scores = brute_force(ids[q], scores[q], depth)
            assert hits.image_ids[q].tolist() == expected_ids
            assert hits.scores[q].tolist() == expected_scores

    def test_ties_are_broken_by_id_whatever_the_order(self):
        ids = np.array([[9, 3, 5, 1]])
        scores = np.array([[1, 2, 1, 1]], np.float32)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
            assert Hits.ranked(ids[:, order], scores[:, order], 4).image_ids.tolist() == [[3, 1, 5, 9]]

    def test_padding_comes_last_even_after_a_score_of_minus_infinity(self):
        hits = Hits.ranked(np.array([[-1, 4, -1]]), np.array([[7, -np.inf, 7]], np.float32), 3)
        assert hits.image_ids.tolist() == [[4, -1, -1]]

    @given(st.data(), st.integers(1, 3), st.integers(1, 6))
    def test_the_number_of_partitions_does_not_show(self, data, num_queries, depth):
        ids = np.arange(12).reshape(1, -1).repeat(num_queries, 0)
        scores = data.draw(
            st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=ids.size, max_size=ids.size).map(
                lambda values: np.array(values, np.float32).reshape(ids.shape)
            )
        )
        partition = np.array(data.draw(st.lists(st.integers(0, 2), min_size=12, max_size=12)))
        parts = [Hits.ranked(ids[:, partition == p], scores[:, partition == p], depth) for p in range(3)]
        merged, whole = Hits.merge(parts, depth), Hits.ranked(ids, scores, depth)
        np.testing.assert_array_equal(merged.image_ids, whole.image_ids)
        np.testing.assert_array_equal(merged.scores, whole.scores)

    @pytest.mark.parametrize(("ids", "scores"), [((2, 3), (2, 4)), ((3,), (3,))])
    def test_refuses_shapes_that_do_not_agree(self, ids, scores):
        with pytest.raises(ValueError, match=r"\(Q, R\)"):
            Hits(np.zeros(ids, np.int64), np.zeros(scores, np.float32))


class TestMembers:
    """Which features lie in which regions of a picture of 100 x 80 pixels."""

    @staticmethod
    def batch(places, boxes, size=(80, 100)):
        geometry = np.array([(x, y, 1, 0) for x, y in places], np.float32).reshape(-1, 4)
        regions = Regions(np.array([0, len(boxes)]), np.array(boxes, np.float32).reshape(-1, 4))
        offsets, rows = np.array([0, len(geometry)]), np.zeros((len(geometry), 1), np.uint8)
        return FeatureBatch(np.zeros(1, np.int64), offsets, rows, geometry, np.array([size], np.int32), regions)

    def test_a_box_holds_the_pixels_between_its_edges(self):
        """The pixels 10 to 19 lie between the edges 10 and 20; a coordinate is that of a pixel's centre."""
        batch = self.batch([(9, 15), (10, 15), (19, 15), (20, 15), (15, 9), (15, 20)], [(10, 10, 20, 20)])
        assert batch.members(0).tolist() == [[False, True, True, False, False, False]]

    def test_the_whole_image_holds_also_what_was_found_a_little_outside(self):
        batch = self.batch([(-0.7, 3), (3, -2), (99.9, 3), (101, 90)], [(0, 0, 100, 80), (50, 40, 100, 80)])
        assert batch.members(0).tolist() == [[True] * 4, [False, False, False, True]]

    def test_without_a_known_size_places_are_taken_as_they_are(self):
        batch = self.batch([(-0.7, 3), (99, 3)], [(0, 0, 100, 80)], size=(0, 0))
        assert batch.members(0).tolist() == [[False, True]]

    def test_an_image_without_regions_is_one_region(self):
        assert self.batch([(1, 1), (2, 2)], []).members(0).tolist() == [[True, True]]
        assert make_batch([3]).members(0).tolist() == [[True, True, True]]

    def test_no_features(self):
        assert self.batch([], [(0, 0, 10, 10)]).members(0).shape == (1, 0)
