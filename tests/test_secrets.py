"""Credentials in URIs are refused and never repeated, and nothing that could run code is loaded from a store."""

import ast
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from botocore.exceptions import EndpointConnectionError

import cbir
from cbir._yaml import _UniqueKeys
from cbir.artifacts import dump_json, sha256_of
from cbir.config import parse_config
from cbir.errors import ConfigError
from cbir.storage import open_store
from cbir.storage.credentials import redacted
from cbir.storage.s3_errors import explained
from cbir.versions import Manifest, Versions
from pipelines.indexing import index
from tests.conftest import PROJECT

SECRET = "pa55word-of-nobody"
MAY_RUN_CODE = re.compile("load|pickle|shelve|eval|exec")
RUNS_CODE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load",
    "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "eval", "exec", "pandas.read_pickle",
    "torch.jit.load", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
BETWEEN_OWN_PROCESSES = {"pipelines/query_actor.py", "pipelines/replicas.py"}
"""What they load, Ray brought from an actor of the same run."""


class TestUris:
    @pytest.mark.parametrize(
        "uri",
        [
            f"s3://user:{SECRET}@bucket/images",
            f"s3://{SECRET}@bucket/images",
            f"s3://us@er:{SECRET}@bucket",
            f"s3://bucket/a.tar?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
            f"https://bucket.s3.amazonaws.com/a.tar?AWSAccessKeyId=x&Signature={SECRET}",
            f"https://user:{SECRET}@bucket.s3.amazonaws.com/a.tar?x-amz-security-token={SECRET}",
        ],
    )
    def test_credentials_in_a_uri_are_refused_without_repeating_them(self, uri: str) -> None:
        with pytest.raises(
            ConfigError, match=r"holds credentials, .*: take them out, and set AWS_ACCESS_KEY_ID"
        ) as error:
            open_store(uri)
        assert SECRET not in str(error.value)

    @pytest.mark.parametrize("uri", ["s3://bucket/user@host/a.tar", "s3://bucket/a?b=c&signature", "file:///a@b:c/d"])
    def test_other_uris_may_hold_such_signs(self, uri: str) -> None:
        assert redacted(uri) == uri
        open_store(uri)

    def test_an_endpoint_with_a_password_is_not_repeated(self) -> None:
        endpoint = f"http://user:{SECRET}@127.0.0.1:1"
        error = explained(EndpointConnectionError(endpoint_url=f"{endpoint}/bucket"), "s3://bucket/a", endpoint)
        assert SECRET not in str(error)
        assert "no answer from http://***@127.0.0.1:1 (" in str(error)


def dangers(path: Path) -> Iterator[str]:
    """What a source file calls that could run code which it reads, with its place."""
    text, name = path.read_text(), path.relative_to(PROJECT).as_posix()
    if not MAY_RUN_CODE.search(text):
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
        if (
            (called in RUNS_CODE and name not in BETWEEN_OWN_PROCESSES)
            or (called == "torch.load" and options.get("weights_only") != "True")
            or (called == "yaml.load" and options.get("Loader") != "_UniqueKeys")
            or options.get("allow_pickle", "False") != "False"
        ):
            yield f"{name}:{node.lineno}: {called}"


def test_no_source_loads_what_could_run_code(tmp_path: Path) -> None:
    sources = [path for package in ("cbir", "pipelines") for path in (PROJECT / package).rglob("*.py")]
    assert len(sources) > 100
    assert [danger for path in sources for danger in dangers(path)] == []
    assert issubclass(_UniqueKeys, yaml.SafeLoader)


@pytest.mark.parametrize(
    "line",
    ["pickle.loads(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "yaml.load(x, Loader=yaml.Loader)",
     "np.load(x, allow_pickle=True)", "eval(x)"],
)  # fmt: skip
def test_such_a_source_would_be_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PROJECT", tmp_path)
    (tmp_path / "bad.py").write_text(f"def read(x):\n    return {line}\n")
    assert len(list(dangers(tmp_path / "bad.py"))) == 1


class Trap:
    """When it is unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


class Unpickled:
    """What pickles of this process asked for, but numba's, which takes its own functions apart and together again.

    Python tells it of C code too.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and not any(name.startswith("numba.") for name in callers()):
            module, name = arguments[-2:]
            self.names.append(f"{module}.{name}")


def callers() -> Iterator[str]:
    """The modules whose functions are being called."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


@pytest.fixture(scope="module")
def unpickled() -> Unpickled:
    return Unpickled()


@pytest.fixture(scope="module")
def store(
    settings: Callable[..., dict[str, Any]], unpickled: Unpickled, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """An index with weights, which was made without a pickle."""
    folder = tmp_path_factory.mktemp("secrets")
    uri, weights = str(folder / "store"), folder / "weights.pth"
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    deep = {"name": "deep", "backbone": "test_resnet", "weights": str(weights), "size": 64}
    channels = {"local": settings()["channels"]["local"], "whole": {"extractor": deep, "index": {"name": "flat"}}}
    unpickled.names.clear()
    search = {"depth": 5, "fuse": {"name": "late"}}
    index(parse_config(settings(store=uri, channels=channels, search=search), "the test"))
    return uri


def test_indexing_and_searching_unpickle_nothing_but_tensors(
    store: str, unpickled: Unpickled, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    cbir.open(store).search(next(iter(pictures.values())))
    assert unpickled.names == []
    pickle.loads(pickle.dumps(Trap(tmp_path / "trapped")))
    assert (tmp_path / "trapped").exists()
    assert any("touch" in name or "getattr" in name for name in unpickled.names), "a pickle would have been seen"


def planted(manifest: Manifest, store: str, key: str, data: bytes) -> None:
    """Put bytes into a store as if it had always held them."""
    uri = open_store(store)
    (Path(store) / key).write_bytes(data)
    files = tuple(
        replace(file, num_bytes=len(data), sha256=sha256_of(data)) if file.key == key else file
        for file in manifest.files
    )
    changed = replace(manifest, files=files)
    versions, current = Versions(uri), Versions(uri).current()
    assert current is not None
    uri.write(versions.key(manifest.version), changed.to_json())
    uri.write("CURRENT", dump_json(asdict(replace(current, manifest_sha256=sha256_of(changed.to_json())))))


def test_a_pickle_in_the_place_of_a_file_is_never_run(store: str, pictures: dict[str, bytes], tmp_path: Path) -> None:
    manifest = Versions(open_store(store)).load()
    part, layout = manifest.layout["partitions"][0], manifest.layout["channels"]
    local = layout["local"]
    weights = next(iter(layout["whole"]["assets"].values()))
    (tmp_path / "trap.pth").parent.mkdir(exist_ok=True)
    torch.save({"state_dict": Trap(tmp_path / "trapped")}, tmp_path / "trap.pth")
    array = np.empty(1, object)
    array[0] = Trap(tmp_path / "trapped")
    np.save(tmp_path / "trap.npy", array, allow_pickle=True)
    traps = {
        "a pickle": pickle.dumps(Trap(tmp_path / "trapped"), protocol=2),
        "a pickle of torch": (tmp_path / "trap.pth").read_bytes(),
        "an array of objects": (tmp_path / "trap.npy").read_bytes(),
    }
    for key in (part["ids"], part["indexes"]["local"][0], part["features"]["local"], local["encoders"][1], weights):
        good = (Path(store) / key).read_bytes()
        for name, trap in traps.items():
            planted(manifest, store, key, trap)
            with pytest.raises(Exception, match=r"."):
                cbir.open(store).search(next(iter(pictures.values())))
            assert not (tmp_path / "trapped").exists(), f"{name} as {key} was run"
        (Path(store) / key).write_bytes(good)
