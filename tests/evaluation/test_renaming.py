from pathlib import Path

import pytest

from cbir.errors import DataError
from cbir.evaluation.renaming import Renaming, find_renaming

NAMES = [f"images/{name}.jpg" for name in "abcdef"]
HERE = Path("/data/paintings")


def renamed(names: list[str], keys: list[str], folder: Path = HERE) -> list[str]:
    return list(map(find_renaming(names, frozenset(keys), folder), names))


@pytest.mark.parametrize(
    "form",
    ["images/{}.jpg", "{}.jpg", "set/images/{}.jpg", "a/b/images/{}.jpg", "other/{}.jpg", "images/{}", "x/{}.png"],
)
def test_a_collection_that_starts_elsewhere_is_recognised(form: str):
    keys = [form.format(name) for name in "abcdef"]
    assert renamed(NAMES, [*keys, "images/zzz.jpg", "zzz"]) == keys


def test_names_without_extension_get_the_one_of_the_keys():
    assert renamed(["ashmolean_000283", "oxford_002124"], ["jpg/ashmolean_000283.jpg", "jpg/oxford_002124.jpg"]) == [
        "jpg/ashmolean_000283.jpg",
        "jpg/oxford_002124.jpg",
    ]


def test_a_dot_in_a_name_is_no_extension():
    assert renamed(["v1.2", "v1.3"], ["v1.2.jpg", "v1.3.jpg"]) == ["v1.2.jpg", "v1.3.jpg"]


def test_names_of_different_depth_are_renamed_alike():
    names = ["images/a.jpg", "images/deep/b.jpg", "images/very/deep/c.jpg"]
    assert renamed(names, ["a.jpg", "deep/b.jpg", "very/deep/c.jpg"]) == ["a.jpg", "deep/b.jpg", "very/deep/c.jpg"]


def test_one_renaming_holds_for_all_names_even_if_single_ones_would_fit_otherwise():
    keys = [*(f"set/{name}" for name in NAMES[1:]), "a.jpg", "other/images/a.jpg"]
    assert renamed(NAMES, keys) == [f"set/{name}" for name in NAMES]


def test_most_names_decide():
    keys = [*(f"few/{name}" for name in NAMES[:2]), *(f"many/{name}" for name in NAMES)]
    assert renamed(NAMES, keys)[0] == "many/images/a.jpg"


def test_unchanged_names_win_among_equals():
    assert renamed(NAMES, [*NAMES, *(f"copy/{name}" for name in NAMES)]) == NAMES


def test_the_folder_of_the_file_decides_among_sets_of_equal_names():
    keys = [f"{folder}/{name}" for folder in ("drawings", "paintings", "photos") for name in NAMES]
    assert renamed(NAMES, keys) == [f"paintings/{name}" for name in NAMES]


def test_a_guess_between_sets_of_equal_names_is_refused():
    keys = [f"{folder}/{name}" for folder in ("drawings", "photos") for name in NAMES]
    with pytest.raises(DataError, match=r"6 names .* both under 'drawings/' and under 'photos/'"):
        renamed(NAMES, keys)


def test_a_renaming_that_makes_one_key_of_two_names_counts_it_once():
    names = ["day/1.jpg", "night/1.jpg"]
    assert renamed(names, ["1.jpg", "set/day/1.jpg", "set/night/1.jpg"]) == ["set/day/1.jpg", "set/night/1.jpg"]


def test_nothing_in_common_leaves_the_names_unchanged():
    assert find_renaming(NAMES, frozenset(["zzz"]), HERE) == Renaming()


def test_namesakes_in_very_many_folders_cost_nothing_extra():
    names = [f"images/{folder}/{number:04}.jpg" for folder in range(3) for number in range(60)]
    keys = frozenset(f"{folder}/{number:04}.jpg" for folder in range(300) for number in range(60))
    assert renamed(names, list(keys)) == [name.removeprefix("images/") for name in names]
