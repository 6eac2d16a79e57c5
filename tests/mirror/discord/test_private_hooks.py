"""The private parts of discord.py that utils/mirror/discord uses exist and have not changed.

If an upgrade of discord.py fails a test here: read the changed code, adapt utils/mirror/discord, then update the
version and the digests below.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import discord
import pytest
import yarl
from discord import http
from discord import utils as discord_utils
from discord.gateway import DiscordWebSocket
from discord.http import Route
from discord.shard import AutoShardedClient, Shard, ShardInfo

from utils.mirror.discord import member_cache, tap

VERSION = "2.7.1"
#: SHA-256 of the source of the methods that are replaced, and of the one that the replacement of `reconnect` calls.
RECEIVED_MESSAGE = "62c9f5ec6596dfef517af14f3fd8c46fd5d68ccb8674893901dfd5944f463b94"
#: Of those that the member cache prepares payloads for.
MEMBER_PARSERS = "6c922b12635799bea71a26313d15a2df20fe928455c4f9c110192dcf590101f2"
RECONNECT = "b4540433e4f8468c95525e1357158d083dda0325a4a34230d29a993f497d1924"


@pytest.fixture
def endpoints() -> Iterator[None]:
    """Restore the addresses that a test sets."""
    api, gateway = Route.BASE, DiscordWebSocket.DEFAULT_GATEWAY
    yield
    Route.BASE, DiscordWebSocket.DEFAULT_GATEWAY = api, gateway


def digest_of(*functions: Callable[..., Any]) -> str:
    return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()


def test_discord_py_is_pinned_to_the_reviewed_version() -> None:
    assert discord.__version__ == VERSION
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    assert f'"discord.py[speed]=={VERSION}"' in pyproject.read_text()
    assert f"discord.py {VERSION}" in str(tap.__doc__)


def test_the_replaced_methods_are_unchanged() -> None:
    assert digest_of(tap._original_received_message) == RECEIVED_MESSAGE
    assert digest_of(Shard.reidentify, tap._original_reconnect) == RECONNECT
    assert tap._original_received_message.__module__ == "discord.gateway"
    assert list(inspect.signature(tap._original_received_message).parameters) == ["self", "msg"]
    assert inspect.iscoroutinefunction(tap._original_received_message)


def test_the_parsers_that_maintain_the_member_cache_are_unchanged() -> None:
    state = discord.state.ConnectionState
    parsers = (state.parse_guild_member_add, state.parse_guild_member_remove, state.parse_guild_member_update)
    assert digest_of(*parsers, discord.Member._update, discord.Member._update_inner_user) == MEMBER_PARSERS
    assert f"discord.py {VERSION}" in str(member_cache.__doc__)
    assert "await self._state.chunk_guild(self, cache=cache)" in inspect.getsource(discord.Guild.chunk)


def test_discord_py_calls_the_replaced_functions() -> None:
    assert len(inspect.signature(discord_utils._from_json).parameters) == 1
    assert "utils._from_json(" in inspect.getsource(http.json_or_text)
    assert "self.received_message(" in inspect.getsource(DiscordWebSocket.poll_event)
    assert ".reconnect()" in inspect.getsource(AutoShardedClient.connect)


def test_a_websocket_has_the_attributes_that_the_tap_uses() -> None:
    connecting = inspect.getsource(DiscordWebSocket.from_client)
    for name in ("session_id", "sequence", "shard_id", "_connection"):
        assert f"ws.{name} = " in connecting
    constructor = inspect.getsource(DiscordWebSocket.__init__)
    for name in ("_keep_alive", "_decompressor", "sequence", "session_id"):
        assert f"self.{name}" in constructor
    assert discord.Client(intents=discord.Intents.none())._connection is not None


async def test_a_shard_has_the_attributes_that_new_sessions_use() -> None:
    client = discord.AutoShardedClient(intents=discord.Intents.none())
    client._reconnect = True  # set by `connect`
    websocket: Any = SimpleNamespace(shard_id=0)
    shard = Shard(websocket, client, lambda *_: None)
    assert shard.ws is websocket
    assert ShardInfo(shard, 1)._parent is shard


async def test_member_requests_use_the_shards_websocket() -> None:
    client = discord.AutoShardedClient(intents=discord.Intents.none(), shard_count=1)
    client._reconnect = True  # set by `connect`
    websocket: Any = SimpleNamespace(shard_id=0)
    client._AutoShardedClient__shards[0] = Shard(websocket, client, lambda *_: None)  # type: ignore[attr-defined]
    assert client._get_websocket(guild_id=5) is websocket
    parameters = inspect.signature(DiscordWebSocket.request_chunks).parameters
    assert {"guild_id", "query", "limit", "nonce"} <= parameters.keys()


@pytest.mark.usefixtures("endpoints")
def test_requests_go_to_the_api_base() -> None:
    tap.set_api_base("http://proxy.example/api")
    assert Route("GET", "/users/@me").url == "http://proxy.example/api/users/@me"


@pytest.mark.usefixtures("endpoints")
def test_new_sessions_go_to_the_gateway() -> None:
    tap.set_gateway("ws://gateway.example")
    assert yarl.URL("ws://gateway.example") == DiscordWebSocket.DEFAULT_GATEWAY
    assert "DEFAULT_GATEWAY" in inspect.getsource(DiscordWebSocket.from_client)
