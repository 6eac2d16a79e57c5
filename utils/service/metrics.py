"""The metrics of GET /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

registry = CollectorRegistry()
ProcessCollector(registry=registry)
PlatformCollector(registry=registry)
GCCollector(registry=registry)

dispatches_received = Counter(
    "guildbook_gateway_events", "Dispatches received from the gateway, by name.", ["type"], registry=registry
)  # fmt: skip
malformed_payloads = Counter(
    "guildbook_malformed_payloads",
    "Payloads that could not be parsed, by the name of the dispatch.",
    ["event"],
    registry=registry,
)
rows_written = Counter("guildbook_rows_written", "Rows changed, by table.", ["table"], registry=registry)
sync_runs = Counter(
    "guildbook_sync_runs", "Reconciles finished, by source and result.", ["source", "result"], registry=registry
)
sync_seconds = Histogram(
    "guildbook_sync_seconds", "How long a reconcile took.", ["source"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300), registry=registry,
)  # fmt: skip
flush_seconds = Histogram(
    "guildbook_flush_seconds", "How long a flush of the buffer took.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10), registry=registry,
)  # fmt: skip
flush_failures = Counter("guildbook_flush_failures", "Flushes that failed and are retried.", registry=registry)
events_written = Counter(
    "guildbook_events_written", "New joins, leaves, bans and messages that were committed.", registry=registry
)
dropped = Counter(
    "guildbook_dropped", "Rows dropped (a reconcile restores them) and events dropped (lost), by kind.",
    ["kind"], registry=registry,
)  # fmt: skip
dead_letters = Counter(
    "guildbook_dead_letters", "Rows and events that the database rejected.", ["table"], registry=registry
)
queue_events = Gauge("guildbook_queue_events", "Events waiting to be written.", registry=registry)
waiting_seconds = Gauge(
    "guildbook_waiting_seconds", "Age of the oldest row and the oldest event waiting to be written.", ["kind"],
    registry=registry,
)  # fmt: skip
spool_bytes = Gauge("guildbook_spool_bytes", "Size of the journal of this process on disk.", registry=registry)
lease_epoch = Gauge("guildbook_lease_epoch", "Epoch of the lease of this process; 0 in standby.", registry=registry)
buffer_rows = Gauge("guildbook_buffer_rows", "Rows waiting to be written.", registry=registry)
batch_rows = Gauge(
    "guildbook_batch_rows", "Rows that cogs added to batches and that are not written yet, by table.", ["table"],
    registry=registry,
)  # fmt: skip
guilds_waiting = Gauge("guildbook_guilds_waiting", "Guilds waiting for a reconcile.", registry=registry)
duty_failures = Counter(
    "guildbook_duty_failures", "Scheduled work that failed: backup, drill, sizes.", ["duty"],
    registry=registry,
)  # fmt: skip
backup_time = Gauge("guildbook_backup_timestamp_seconds", "When the last backup was finished.", registry=registry)
backups_paused = Gauge(
    "guildbook_backups_paused",
    "1 while backups are not pruned, because a newer one has much less in it than those before; 0 otherwise.",
    registry=registry,
)
backup_upload_pending = Gauge(
    "guildbook_backup_upload_pending", "Backups that are not in the remote store yet.", registry=registry
)
drill_time = Gauge("guildbook_drill_timestamp_seconds", "When the last drill finished.", registry=registry)
drill_ok = Gauge("guildbook_drill_ok", "Whether the last drill restored its backup completely.", registry=registry)
refused_commands = Counter(
    "guildbook_refused_commands", "Operators' commands of users who are not operators.", registry=registry
)
loop_stall_max = Gauge(
    "guildbook_loop_stall_max_seconds", "Longest stall of the event loop since the start.", registry=registry
)
loop_blocks = Counter(
    "guildbook_loop_blocks", "How often the event loop was blocked for more than 0.2 s, by the module that did it.",
    ["module"], registry=registry,
)  # fmt: skip
pool_connections = Gauge(
    "guildbook_pool_connections", "Connections of the pool, by state.", ["state"], registry=registry
)  # fmt: skip


def render() -> bytes:
    """Return all metrics in the text format of Prometheus."""
    return generate_latest(registry)
