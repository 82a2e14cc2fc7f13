import numpy as np
import pytest

from cbir.encoding.assigners import CellAssigner, DirectionAssigner, ExactAssigner, HnswAssigner
from cbir.encoding.rootsift import RootSift
from cbir.errors import DataError

ASSIGNERS = [ExactAssigner, CellAssigner, HnswAssigner]


@pytest.fixture(scope="module")
def sift(test_data):
    """9,000 words and 1,000 rows: RootSIFT of real images."""
    stored = np.fromfile(test_data / "bigann10k" / "base.bvecs", np.uint8).reshape(-1, 132)[:, 4:]
    rows = RootSift().transform(stored).astype(np.float32)
    return rows[:9000], rows[9000:]


def random_words(num=400, dim=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, dim)).astype(np.float32), rng.normal(size=(300, dim)).astype(np.float32)


@pytest.mark.parametrize("build", [CellAssigner.of, DirectionAssigner, HnswAssigner.of])
def test_approximate_assigners_find_nearly_every_nearest_word_of_real_features(sift, build):
    words, rows = sift
    exact, approximate = ExactAssigner(words).nearest(rows, 1), build(words).nearest(rows, 1)
    assert np.mean(exact[0] == approximate[0]) >= 0.95
    same = exact[0] == approximate[0]
    np.testing.assert_array_equal(exact[1][same], approximate[1][same])


def test_with_all_cells_the_inverted_file_is_exact():
    words, rows = random_words()
    cells = CellAssigner.of(words, probes=len(words))
    for ours, expected in zip(cells.nearest(rows, 3), ExactAssigner(words).nearest(rows, 3), strict=True):
        assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize("build", [*(assigner.of for assigner in ASSIGNERS), DirectionAssigner])
def test_a_row_alone_and_in_any_batch_has_the_same_bytes(build):
    words, rows = random_words()
    built = build(words)
    whole = built.nearest(rows, 3)
    for parts in (1, 7, 300):
        found = [built.nearest(part, 3) for part in np.array_split(rows, parts)]
        assert np.concatenate([part[0] for part in found]).tobytes() == whole[0].tobytes()
        assert np.concatenate([part[1] for part in found]).tobytes() == whole[1].tobytes()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_a_restored_assigner_and_one_built_again_answer_with_the_same_bytes(assigner):
    words, rows = random_words()
    built = assigner.of(words)
    again, restored = assigner.of(words), assigner.restore(words, built.state())
    for other in (again, restored):
        assert [part.tobytes() for part in other.nearest(rows, 4)] == [
            part.tobytes() for part in built.nearest(rows, 4)
        ]
        assert {name: array.tobytes() for name, array in other.state().items()} == {
            name: array.tobytes() for name, array in built.state().items()
        }


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("num", [1, 2, 5])
def test_few_words_are_all_found(assigner, num):
    words, rows = random_words(num=5)
    expected = ExactAssigner(words).nearest(rows, num)
    np.testing.assert_array_equal(assigner.of(words).nearest(rows, num)[0], expected[0])


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_rows_off_the_scale_of_the_words_and_words_all_alike(assigner):
    words, rows = random_words()
    found = assigner.of(words).nearest(1e6 * rows, 1)[0]
    along = np.argmax(rows.astype(np.float64) @ words.T, axis=1)
    assert np.mean(found[:, 0] == along) >= (1 if assigner is ExactAssigner else 0.9)
    alike = assigner.of(np.ones((30, 4), np.float32))
    assert (alike.nearest(np.zeros((2, 4)), 1)[1] == 4).all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_no_rows_and_wrong_rows(assigner):
    built = assigner.of(random_words()[0])
    assert built.nearest(np.empty((0, 10), np.uint8), 2)[0].shape == (0, 2)
    with pytest.raises(DataError, match="D = 11"):
        built.nearest(np.empty((0, 11), np.float32), 1)
    with pytest.raises(DataError, match="NaN"):
        built.nearest(np.full((1, 10), np.nan), 1)


def test_cells_of_directions_find_words_that_lie_in_no_hierarchy_and_beside_hubs():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(3000, 64)).astype(np.float32)
    words[::50] *= 0.1  # near the mean, and so among the nearer words of all rows
    rows = words[1::2] + 0.4 * rng.normal(size=(1500, 64)).astype(np.float32)
    exact = ExactAssigner(words).nearest(rows, 1)[0]
    assert np.mean(DirectionAssigner(words).nearest(rows, 1)[0] == exact) >= 0.9


def test_cells_of_directions_find_a_word_where_all_are_alike():
    words, squared = DirectionAssigner(np.ones((1100, 4), np.float32)).nearest(np.ones((3, 4)), 1)
    assert words.tolist() == [[0]] * 3
    assert squared.tolist() == [[0.0]] * 3
