"""The mirror's connection to discord.py, and the private parts of discord.py 2.7.1 that it uses.

discord.py is pinned; tests/mirror/discord/test_private_hooks.py fails if an upgrade changes any of these:

- `DiscordWebSocket.received_message`, replaced (`tap`): raw payloads, before discord.py's parsers see or choke on them.
  With it `_connection`, `_decompressor`, `_keep_alive`, `sequence` and `session_id` of the websocket.
- `discord.utils._from_json`, replaced (`tap`): text that PostgreSQL can store, in REST responses as well.
- `Shard.reconnect`, replaced, with `Shard.reidentify`, `Shard.ws` and `ShardInfo._parent` (`tap`): sessions are resumed
  after a failed first attempt, and ended on purpose after a restore.
- `Client._get_websocket` and `DiscordWebSocket.request_chunks` (`source`): member lists requested with our nonce.
- `Route.BASE` and `DiscordWebSocket.DEFAULT_GATEWAY`, set (`tap`): other addresses for proxies and tests.

docs/explanation/architecture.md lists the private parts of libraries that other packages use.
"""
