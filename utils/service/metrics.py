"""The counters and gauges that GET /metrics shows."""

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

events_received = Counter(
    "guildbook_gateway_events", "Gateway events received, by type.", ["type"], registry=registry
)  # fmt: skip
malformed_payloads = Counter(
    "guildbook_malformed_payloads", "Payloads that could not be understood, by event.", ["event"], registry=registry
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
flush_failures = Counter(
    "guildbook_flush_failures", "Flushes that failed and were kept for the next try.", registry=registry
)
events_written = Counter(
    "guildbook_events_written", "Joins, leaves, bans and messages that were new and are committed.", registry=registry
)
dropped = Counter(
    "guildbook_dropped", "What had to be given up: rows that a reconcile restores, events that nothing does.",
    ["kind"], registry=registry,
)  # fmt: skip
dead_letters = Counter(
    "guildbook_dead_letters", "Rows and events that the database refused.", ["table"], registry=registry
)
queue_events = Gauge("guildbook_queue_events", "Events that wait to be written.", registry=registry)
waiting_seconds = Gauge(
    "guildbook_waiting_seconds", "How long the oldest row and the oldest event have waited.", ["kind"],
    registry=registry,
)  # fmt: skip
spool_bytes = Gauge("guildbook_spool_bytes", "Bytes that this process's journal takes on disk.", registry=registry)
lease_epoch = Gauge("guildbook_lease_epoch", "The epoch of this process's lease; 0 in standby.", registry=registry)
buffer_rows = Gauge("guildbook_buffer_rows", "Rows that wait to be written.", registry=registry)
guilds_waiting = Gauge("guildbook_guilds_waiting", "Guilds that wait for their reconcile.", registry=registry)
duty_failures = Counter(
    "guildbook_duty_failures", "What the bot does by itself and could not: backup, drill, sizes.", ["duty"],
    registry=registry,
)  # fmt: skip
backup_time = Gauge("guildbook_backup_timestamp_seconds", "When the last backup was made.", registry=registry)
drill_time = Gauge("guildbook_drill_timestamp_seconds", "When a backup was last proved.", registry=registry)
drill_ok = Gauge("guildbook_drill_ok", "Whether that backup came back whole.", registry=registry)
loop_stall_max = Gauge(
    "guildbook_loop_stall_max_seconds", "Longest time that the event loop was held, since the start.", registry=registry
)
pool_connections = Gauge(
    "guildbook_pool_connections", "Pool connections, by state.", ["state"], registry=registry
)  # fmt: skip


def render() -> bytes:
    """Return all of it in Prometheus's text format."""
    return generate_latest(registry)
