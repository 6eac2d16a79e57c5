"""The event queue, and the journal on disk that carries it through database outages and crashes."""
