import csv
import json
from pathlib import Path

import pytest

from cbir.errors import DataError
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery, read_ground_truth

TABLE = """\
image,instance_id,role,note
images/a1.jpg,a,database,clean
images/a2.jpg,a,both,
images/b1.jpg,b,database,
images/qa.jpg,a,query,phone
images/qab.jpg,a;b,query,
images/qn.jpg,none,query,
images/x.jpg,,distractor,
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str, name: str = "truth.csv") -> Path:
        path = tmp_path / name
        path.write_text(content)
        return path

    return write_file


def by_image(truth: GroundTruth) -> dict[str, GroundTruthQuery]:
    return {query.image: query for query in truth.queries}


def test_relevance_follows_from_shared_instances(write):
    queries = by_image(read_ground_truth(write(TABLE)))
    assert list(queries) == ["images/a2.jpg", "images/qa.jpg", "images/qab.jpg", "images/qn.jpg"]
    assert queries["images/qa.jpg"].positives == {"images/a1.jpg", "images/a2.jpg"}
    assert queries["images/qab.jpg"].positives == {"images/a1.jpg", "images/a2.jpg", "images/b1.jpg"}
    assert queries["images/qn.jpg"].positives == frozenset()


def test_a_query_in_the_database_is_left_out_of_its_own_results(write):
    query = by_image(read_ground_truth(write(TABLE)))["images/a2.jpg"]
    assert query.positives == {"images/a1.jpg"}
    assert "images/a2.jpg" in query.junk


def test_pictures_outside_of_the_database_are_junk_for_every_query(write):
    for query in read_ground_truth(write(TABLE)).queries:
        assert query.junk >= {"images/qa.jpg", "images/qab.jpg", "images/qn.jpg"}
        assert not query.junk & query.positives


def test_images_without_a_shared_instance_are_not_alike(write):
    table = "image,instance_id,role\na.jpg,a,database\nn.jpg,none,database\nq.jpg,none,query\nr.jpg,a,query\n"
    assert by_image(read_ground_truth(write(table)))["q.jpg"].positives == frozenset()


def test_the_name_is_that_of_the_folder_for_files_of_the_usual_name(write, tmp_path: Path):
    assert read_ground_truth(write(TABLE)).name == "truth"
    truth = read_ground_truth(write(TABLE, "ground_truth.csv"))
    assert (truth.name, truth.folder) == (tmp_path.name, tmp_path)


@pytest.mark.parametrize(
    ("columns", "cells"),
    [("x,y,w,h", "10,20,30.5,40"), ("box", '"10,20,30.5,40"'), ("box", "10 20 30.5 40"), ("box", "10; 20; 30.5; 40")],
)
def test_boxes(write, columns: str, cells: str):
    empty = "," * columns.count(",")
    table = (
        f"image,instance_id,role,{columns}\na.jpg,a,database,{empty}\nq.jpg,a,query,{cells}\nr.jpg,a,query,{empty}\n"
    )
    queries = by_image(read_ground_truth(write(table)))
    assert queries["q.jpg"].box == (10.0, 20.0, 30.5, 40.0)
    assert queries["r.jpg"].box is None


def test_two_regions_of_one_picture_are_two_queries(write):
    table = "image,instance_id,role,box\na,a,database,\nb,b,database,\nq,a,query,0 0 5 5\nq,b,query,5 5 5 5\n"
    first, second = read_ground_truth(write(table)).queries
    assert (first.positives, second.positives) == ({"a"}, {"b"})


def test_a_byte_order_mark_and_commas_in_quotes_are_read(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + b'image,instance_id,role\r\n"a,1.jpg",a,database\r\nq.jpg,a,query\r\n')
    assert read_ground_truth(path).queries[0].positives == {"a,1.jpg"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "the file is empty"),
        ("image,instance,role\n", "no column 'instance_id'; did you mean 'instance'"),
        ("image,instance_id,role\na,a,database\nq,a,querry\n", "line 3: unknown role 'querry'; did you mean 'query'"),
        ("image,instance_id,role\n,a,database\n", "line 2: the image has no name"),
        ("image,instance_id,role\na,a,database\n", "none of the 0 queries has a positive"),
        ("image,instance_id,role\na,a,database\nq,b,query\n", "none of the 1 queries has a positive"),
        ("image,instance_id,role\na,a,database\nq,a,query\nq,b,query\n", "line 4: 'q' is already a query in line 3"),
        ("image,instance_id,role,x,y,w,h\nq,a,query,1,2,3,\n", "line 2: a box is four numbers"),
        ("image,instance_id,role,box\nq,a,query,1 2 3\n", "line 2: a box is four numbers"),
        ("image,instance_id,role,box\nq,a,query,1 2 0 4\n", "line 2: the box .* has no area"),
        ("image,instance_id,role,box\nq,a,query,1 2 nan 4\n", "line 2: the box .* has no area"),
        (f"image,instance_id,role\n{'a' * 200_000},a,both\n", r"after line 1: not CSV \(field larger"),
    ],
)
def test_mistakes_in_a_table_are_named(write, table: str, message: str):
    with pytest.raises(DataError, match=message):
        read_ground_truth(write(table))


def test_files_that_are_no_text_are_refused(tmp_path: Path, write):
    with pytest.raises(DataError, match=r"none\.csv cannot be read: No such file"):
        read_ground_truth(tmp_path / "none.csv")
    with pytest.raises(DataError, match="convert it to JSON"):
        read_ground_truth(write("x", "gnd.pkl"))
    (tmp_path / "latin.csv").write_bytes(b"image,instance_id,role\n\xe9.jpg,a,database\n")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_ground_truth(tmp_path / "latin.csv")


OXFORD = {
    "imlist": ["e0", "e1", "h0", "j0", "n0"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"bbx": [10, 20, 110, 70], "easy": [0, 1], "hard": [2], "junk": [3]},
        {"bbx": None, "easy": [], "hard": [4], "junk": []},
    ],
}


@pytest.mark.parametrize(
    ("protocol", "positives", "junk"),
    [
        ("easy", {"e0", "e1"}, {"h0", "j0"}),
        ("medium", {"e0", "e1", "h0"}, {"j0"}),
        ("hard", {"h0"}, {"e0", "e1", "j0"}),
    ],
)
def test_three_protocols_of_the_revisited_oxford(write, protocol, positives: set[str], junk: set[str]):
    first, second = read_ground_truth(write(json.dumps(OXFORD), "gnd.json"), protocol).queries
    assert first == GroundTruthQuery(
        "q0", (10.0, 20.0, 100.0, 50.0), frozenset(positives), frozenset(junk | {"q0", "q1"})
    )
    assert second.box is None
    assert bool(second.positives) == (protocol != "easy")


def test_the_classic_form_leaves_the_query_out(write):
    content = {
        "imlist": ["q0", "a", "b", "c"],
        "qimlist": ["q0"],
        "gnd": [{"bbx": [0, 0, 9, 9], "ok": [0, 1, 2], "junk": [3]}],
    }
    query = read_ground_truth(write(json.dumps(content), "gnd.json"), "hard").queries[0]
    assert (query.positives, query.junk) == ({"a", "b"}, {"q0", "c"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "expected an object with 'imlist'"),
        ('{"imlist": [], "qimlists": [], "gnd": []}', "no list 'qimlist'; did you mean 'qimlists'"),
        ("[" * 100_000, "not JSON that can be read"),
        ("1" * 5000, "not JSON that can be read"),
        ('{"imlist": 3, "qimlist": [], "gnd": []}', "'imlist' must be a list, found 3"),
        ('{"imlist": [[]], "qimlist": [], "gnd": []}', r"'imlist' must be a list of names, position 0 holds \[\]"),
        ('{"imlist": [], "qimlist": ["q"], "gnd": [3]}', "'gnd' must be a list of objects, position 0 holds 3"),
        (
            '{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": 0, "hard": [], "junk": []}]}',
            "'easy' must be a list of positions in imlist, found 0",
        ),
        ('{"imlist": [], "qimlist": ["q"], "gnd": []}', "'qimlist' has 1 queries, 'gnd' 0"),
        (
            '{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [1], "hard": [], "junk": []}]}',
            "'easy' has 1, no position",
        ),
        (
            '{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [0], "junk": []}]}',
            r"query 0 \('q'\): no label 'hard'",
        ),
        (
            '{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"bbx": [1, 2], "easy": [0], "hard": [], "junk": []}]}',
            "'bbx' is left, top, right, bottom",
        ),
    ],
)
def test_mistakes_in_an_oxford_file_are_named(write, content: str, message: str):
    with pytest.raises(DataError, match=message):
        read_ground_truth(write(content, "gnd.json"))


def test_resolved_renames_positives_and_junk_but_not_the_query_pictures(write):
    truth = read_ground_truth(write(TABLE)).resolved([f"set/images/{name}.jpg" for name in ("a1", "a2", "b1", "x")])
    query = by_image(truth)["images/a2.jpg"]
    assert query.positives == {"set/images/a1.jpg"}
    assert "set/images/a2.jpg" in query.junk
    assert truth.missing == frozenset()


def test_positives_outside_of_the_index_stay_and_are_named(write):
    truth = read_ground_truth(write(TABLE)).resolved({"a1.jpg", "b1.jpg"})
    assert truth.missing == {"a2.jpg"}
    assert by_image(truth)["images/qa.jpg"].positives == {"a1.jpg", "a2.jpg"}


def test_an_index_of_other_images_is_an_error_that_shows_the_nearest_key(write):
    truth = read_ground_truth(write(TABLE))
    message = (
        r"'truth': 3 of 3 positives .* 2 images .* example 'images/a1.jpg' \(nearest key: 'pictures/a1.jpeg.old'\)"
    )
    with pytest.raises(DataError, match=message):
        truth.resolved(["pictures/a1.jpeg.old", "zzz"])
    with pytest.raises(DataError, match=r"0 images .*nearest key: None"):
        truth.resolved([])


def test_query_pictures_are_found_with_and_without_extension(tmp_path: Path, write):
    truth = read_ground_truth(write(json.dumps(OXFORD), "gnd.json"))
    with pytest.raises(DataError, match="no picture of query 'q0'"):
        truth.picture(truth.queries[0])
    picture = tmp_path / "jpg" / "q0.jpg"
    picture.parent.mkdir()
    picture.touch()
    assert truth.picture(truth.queries[0]) == picture


# Queries without a positive, as each set's table has them.
SETS = {"smvs_dvd": 0, "paintings": 10, "grocery_packages": 0, "koe_places": 0, "sfm_scenes": 0}


@pytest.mark.parametrize("name", SETS)
def test_real_sets_resolve_in_a_collection_of_all_sets(test_data: Path, name: str):
    photos = test_data / "photos"
    keys = {path.relative_to(photos).as_posix() for path in photos.rglob("*.*g")}
    truth = read_ground_truth(photos / name / "ground_truth.csv").resolved(keys)
    with (photos / name / "ground_truth.csv").open() as file:
        roles = [row["role"] for row in csv.DictReader(file)]
    assert len(truth.queries) == roles.count("query") + roles.count("both")
    assert sum(not query.positives for query in truth.queries) == SETS[name]
    assert truth.missing == frozenset()
    assert all(truth.picture(query).is_file() for query in truth.queries)


@pytest.mark.parametrize("name", ["gnd_roxford5k", "gnd_rparis6k"])
def test_the_three_protocols_share_the_real_labels(test_data: Path, name: str):
    path = test_data / "groundtruth" / f"{name}.json"
    easy, medium, hard = (read_ground_truth(path, protocol).queries for protocol in ("easy", "medium", "hard"))
    assert len(easy) == 70
    for of_easy, of_medium, of_hard in zip(easy, medium, hard, strict=True):
        assert of_medium.positives == of_easy.positives | of_hard.positives
        assert of_easy.junk == of_medium.junk | of_hard.positives
        assert of_hard.junk == of_medium.junk | of_easy.positives
