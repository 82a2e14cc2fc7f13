"""What a run needs from outside: files of methods, and trained state of another index. All of it is copied into the
store, so that a version needs nothing but its store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbir.artifacts import sha256_of
from cbir.config import Channel, Config, parse_config
from cbir.errors import CbirError, ConfigError
from cbir.layout import Layout
from cbir.spec import nearest
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions
from pipelines.work import Asset, ChannelWork

__all__ = ["channel_work", "check_codebooks", "differences", "published_channel", "read_assets", "store_asset"]


def channel_work(store: Store, config: Config, name: str) -> ChannelWork:
    """A channel with everything that its tasks need in the store; ConfigError for what cannot be had."""
    channel, path = config.channels[name], f"channels.{name}"
    assets = {field: store_asset(store, data, suffix) for field, suffix, data in read_assets(channel, path)}
    work = ChannelWork(name, channel, assets)
    states = tuple(store_asset(store, data, ".safetensors") for data in _read_codebooks(work))
    return ChannelWork(name, channel, assets, states)


def store_asset(store: Store, data: bytes, suffix: str) -> Asset:
    """Keep a file in the store under its content."""
    digest = sha256_of(data)
    key = f"assets/{digest}{suffix}"
    store.create(key, data)
    return Asset(key, digest)


def read_assets(channel: Channel, path: str) -> Iterator[tuple[str, str, bytes]]:
    """Name (as by `Channel.assets`), file extension and content of the files of the channel at this YAML path."""
    for name, uri in channel.assets.items():
        yield name, Path(uri).suffix, _read_asset(uri, f"{path}.{name if '.' in name else f'extractor.{name}'}")


def _read_asset(uri: str, path: str) -> bytes:
    """A file that the configuration names, from a local path or a store."""
    folder, _, name = uri.rpartition("/")
    try:
        return open_store(folder or ".").read(name)
    except (CbirError, OSError) as error:
        raise ConfigError(f"{path}: cannot read {uri}: {error}") from None


def check_codebooks(config: Config, name: str) -> None:
    """ConfigError if the channel takes codebooks from an index that has none for it."""
    channel = config.channels[name]
    if channel.codebooks is not None:
        read = read_assets(channel, f"channels.{name}")
        _read_codebooks(ChannelWork(name, channel, {field: Asset("", sha256_of(data)) for field, _, data in read}))


def _read_codebooks(work: ChannelWork) -> list[bytes]:
    """The trained states of the encoders and, last, of the index, if the channel takes them from another index.

    ConfigError unless that index has a channel with the same extractor, encoders and index.
    """
    wanted = work.channel.codebooks
    if wanted is None:
        return []
    path = f"channels.{work.name}.codebooks"
    try:
        store = open_store(wanted.store)
        manifest = Versions(store).load(wanted.version)
        config = parse_config(manifest.config, f"version {manifest.version} of {wanted.store}")
        name = wanted.channel or work.name
        if name not in config.channels:
            hint = nearest(name, config.channels)
            raise ConfigError(f"{path}.channel: {wanted.store} has no channel {name!r}{hint}")
        theirs = published_channel(manifest, config, name)
        difference = differences(work, theirs)
        if difference is not None:
            raise ConfigError(
                f"{path}: version {manifest.version} of {wanted.store} was trained for another channel: {difference}"
            )
        return [store.read(state.key, sha256=state.sha256) for state in theirs.states]
    except ConfigError:
        raise
    except (CbirError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None


def published_channel(manifest: Manifest, config: Config, name: str) -> ChannelWork:
    """A channel of a version with this configuration, with its trained states."""
    layout, digests = Layout.from_json(manifest.layout).channels[name], {f.key: f.sha256 for f in manifest.files}
    assets = {field: Asset(key, digests[key]) for field, key in layout.assets.items()}
    states = tuple(Asset(key, digests[key]) for key in (*layout.encoders, layout.index))
    return ChannelWork(name, config.channels[name], assets, states)


def differences(ours: ChannelWork, theirs: ChannelWork) -> str | None:
    """The first difference in how two channels are described and trained, in words; None if there is none."""
    return next(_differences("", _identity(ours), _identity(theirs)), None)


def _identity(work: ChannelWork) -> dict[str, Any]:
    return {"extractor": work.extractor_identity(), **work.training_identity()}


def _differences(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Where two identities differ, in words."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _differences(f"{path}.{key}" if path else key, ours.get(key), theirs.get(key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(f"{path}.{number}", *pair)
    elif ours != theirs:
        yield f"{path} is {ours!r} here, {theirs!r} there"
