"""The doctor tries the store of backups, reads the newest backup, and tries the keys."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest

from tests.operations.backup.fake_s3 import SECRET_KEY, FakeS3
from tests.operations.backup.helpers import fill, make_backup, make_service
from tests.operations.doctor.test_doctor import worst_findings
from utils.database import Pool
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import BackupRequest
from utils.operations.backup.store import Remote
from utils.operations.doctor import CHECKS, DoctorContext, Finding, run_checks
from utils.operations.doctor.backups import PROBE, STORES
from utils.settings import variables

URL = "s3://login:hush-5up3r@bucket/of/mine"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the environment of the test run."""
    for name in (*variables(), *(name for name in os.environ if name.startswith(STORES))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def s3(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeS3]:
    """A fake S3 server that the environment points to."""
    async with FakeS3() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


class Hasty(DoctorContext):
    """Gives a store half a second for each answer."""

    def catalog(self) -> BackupCatalog:
        """Return the catalog."""
        url = self.settings.backup_url
        if self._catalog is None and url is not None:
            self._catalog = BackupCatalog(self.settings, remote=Remote(url, answer_seconds=0.5))
        return super().catalog()


async def check_bucket() -> Finding:
    (finding,) = await run_checks(Hasty(env_file=None), [check for check in CHECKS if check.name == "bucket"])
    return finding


async def test_writes_reads_and_deletes_an_object(monkeypatch: pytest.MonkeyPatch, s3: FakeS3) -> None:
    assert (await check_bucket()).seen.startswith("BACKUP_URL is not set")
    monkeypatch.setenv("BACKUP_URL", URL)
    s3.objects["of/mine/20260101T000000Z-abcdef.json"] = b"a backup"
    finding = await check_bucket()
    assert (finding.state, finding.seen) == ("ok", "s3://bucket/of/mine: an object was written, read and deleted")
    assert (s3.requests["PUT"], s3.requests["GET"], s3.requests["DELETE"]) == (1, 1, 1)
    assert list(s3.objects) == ["of/mine/20260101T000000Z-abcdef.json"]


async def test_reports_backups_that_a_deployment_deletes(monkeypatch: pytest.MonkeyPatch) -> None:
    railway = {"RAILWAY_SERVICE_ID": "x", "DATABASE_URL": "postgresql://u@127.0.0.1:9/d"}
    found = (await worst_findings(monkeypatch, "bucket", **railway))["bucket"]
    assert (found.state, "has no volume" in found.seen) == ("warn", True)
    volume = {"RAILWAY_VOLUME_MOUNT_PATH": "/data"}
    assert (await worst_findings(monkeypatch, "bucket", **railway, **volume))["bucket"].state == "ok"


@pytest.mark.parametrize(
    ("break_it", "seen"),
    [
        (lambda s3: s3.failing.add("PUT"), "could not write"),
        (lambda s3: s3.failing.add("GET"), "could not read"),
        (lambda s3: s3.failing.add("DELETE"), "could not delete"),
        (lambda s3: s3.refusing.add("PUT"), "could not write"),
        (lambda s3: s3.refusing.add("GET"), "could not read"),
        (lambda s3: s3.refusing.add("DELETE"), "could not delete"),
        (lambda s3: s3.silent.add("PUT"), "no answer within"),
        (lambda s3: setattr(s3, "damage", lambda content: content[:-1]), "could not be read back"),
        (lambda s3: setattr(s3, "bucket", "another"), "could not write"),
    ],
    ids=[
        "write",
        "read",
        "delete",
        "may not write",
        "may not read",
        "may not delete",
        "silent",
        "damaged",
        "no bucket",
    ],
)
async def test_reports_what_a_store_does_not_do(
    monkeypatch: pytest.MonkeyPatch, s3: FakeS3, break_it: Callable[[FakeS3], Any], seen: str
) -> None:
    monkeypatch.setenv("BACKUP_URL", URL)
    break_it(s3)
    finding = await check_bucket()
    assert finding.state == "fail", finding
    assert seen in finding.seen
    assert finding.todo
    assert not any(secret in finding.line for secret in ("hush", "login", SECRET_KEY))
    left = [key for key in s3.objects if PROBE in key]
    assert len(left) <= 1
    assert left or "DELETE" not in s3.failing | s3.refusing, "it could not be deleted"
    for kind in (s3.failing, s3.refusing, s3.silent):
        kind.clear()
    s3.bucket, s3.damage = "bucket", None
    finding = await check_bucket()
    assert finding.state == "ok", finding
    assert not [key for key in s3.objects if PROBE in key], "the next one deletes what was left"


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("s3://bucket/x", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"),
        ("gs://bucket/x", "GOOGLE_APPLICATION_CREDENTIALS is not set"),
        ("az://box/x", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY are not set"),
    ],
)
async def test_names_the_keys_that_are_not_set(monkeypatch: pytest.MonkeyPatch, url: str, names: str) -> None:
    monkeypatch.setenv("BACKUP_URL", url)
    finding = await check_bucket()
    assert finding.state == "fail"
    assert names in finding.seen
    assert "169.254" not in finding.line
    assert "metadata" not in finding.line


async def test_tells_that_stores_do_not_read_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("AWS_ACCESS_KEY_ID=hush\nBACKUP_URL=s3://bucket/x\n")
    found = (await worst_findings(monkeypatch, "bucket"))["bucket"]
    assert (found.state, "AWS_ACCESS_KEY_ID" in found.seen) == ("fail", True)
    assert found.todo == "set AWS_ACCESS_KEY_ID in the environment of the process: stores do not read .env"


async def test_reports_a_damaged_newest_backup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: Pool) -> None:
    await fill(database)
    service = make_service(tmp_path / "data")
    newest = await make_backup(service, database)
    await make_backup(service, database, BackupRequest(schema_only=True))
    settings = {"DATA_DIR": str(tmp_path / "data"), "DATABASE_URL": database.target.libpq_url()}
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert (found.state, "its checksum is right" in found.seen) == ("ok", True), found
    archive = tmp_path / "data" / "backups" / newest.file
    content = archive.read_bytes()
    archive.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert found.state == "fail"
    assert f"the newest, {newest.id}, is damaged" in found.seen
    assert "checksum" in found.seen
    assert "backup create" in found.todo
    archive.write_bytes(content[:-1])
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert (found.state, "is damaged" in found.seen) == ("fail", True)
    (tmp_path / "data" / "backups" / f"{newest.id}.json").write_text("{}")
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert (found.state, "is damaged" in found.seen) == ("fail", True)


async def test_a_store_that_does_not_answer_hides_no_local_backup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: Pool, s3: FakeS3
) -> None:
    await fill(database)
    await make_backup(make_service(tmp_path / "data"), database)
    await s3.stop()
    monkeypatch.setenv("BACKUP_URL", URL)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DATABASE_URL", database.target.libpq_url())
    findings = await run_checks(Hasty(env_file=None), [check for check in CHECKS if check.name == "backups"])
    assert [finding.state for finding in findings] == ["warn", "ok"], findings
    assert "could not list backups" in findings[0].seen
    assert " s old" in findings[1].seen


async def test_reports_a_newest_backup_that_has_much_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: Pool
) -> None:
    await fill(database)
    service = make_service(tmp_path / "data", database_url=database.target.libpq_url())
    before = await make_backup(service, database)
    await database.execute("DELETE FROM members")
    await database.execute("DELETE FROM guilds WHERE id > 1")
    after = await make_backup(service, database)
    settings = {"DATA_DIR": str(tmp_path / "data"), "DATABASE_URL": database.target.libpq_url()}
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert found.state == "fail", found
    assert before.id in found.seen
    assert after.id in found.seen


async def test_reports_backups_that_are_not_uploaded_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: Pool, s3: FakeS3
) -> None:
    await fill(database)
    backup = await make_backup(make_service(tmp_path / "data"), database)
    settings = {"DATA_DIR": str(tmp_path / "data"), "DATABASE_URL": database.target.libpq_url(), "BACKUP_URL": URL}
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert (found.state, backup.id in found.seen, "backup push" in found.seen) == ("warn", True, True), found


async def test_a_backup_of_another_database_is_none_of_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: Pool
) -> None:
    await fill(database)
    await database.execute("INSERT INTO ops.application (id) VALUES (7)")
    await make_backup(make_service(tmp_path / "data"), database)
    await database.execute("UPDATE ops.application SET id = 8")
    settings = {"DATA_DIR": str(tmp_path / "data"), "DATABASE_URL": database.target.libpq_url()}
    found = (await worst_findings(monkeypatch, "backups", **settings))["backups"]
    assert (found.state, found.seen) == ("warn", "there is no good full backup of this database")


# --- keys


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file as age-keygen writes it, and settings that name it and its recipient."""
    path, key = tmp_path / "identity", pyrage.x25519.Identity.generate()
    path.write_text(f"# created: 2026-01-01\n# public key: {key.to_public()}\n{key}\n")
    path.chmod(0o600)
    monkeypatch.setenv("BACKUP_AGE_RECIPIENT", str(key.to_public()))
    monkeypatch.setenv("BACKUP_AGE_IDENTITY_FILE", str(path))
    return path


async def check_identity(monkeypatch: pytest.MonkeyPatch) -> Finding:
    return (await worst_findings(monkeypatch, "identity"))["identity"]


async def test_a_matching_identity_is_fine(monkeypatch: pytest.MonkeyPatch, identity: Path) -> None:
    assert (await check_identity(monkeypatch)).state == "ok"
    monkeypatch.delenv("BACKUP_AGE_IDENTITY_FILE")
    found = await check_identity(monkeypatch)
    assert (found.state, "not set here" in found.seen) == ("ok", True)
    monkeypatch.delenv("BACKUP_AGE_RECIPIENT")
    found = await check_identity(monkeypatch)
    assert (found.state, "not encrypted" in found.seen) == ("ok", True)


def rewrite(path: Path, content: str | None) -> None:
    """Replace a file's content; None: delete it."""
    path.unlink() if content is None else path.write_text(content)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (None, "No such file"),
        ("", "contains no age identity"),
        ("hush-not-a-key\n", "a line that is not an age identity"),
        ("\N{SNOWMAN}", "cannot be read"),
        (str(pyrage.x25519.Identity.generate()), "does not decrypt what is encrypted to BACKUP_AGE_RECIPIENT"),
    ],
    ids=["missing", "empty", "not a key", "not ASCII", "another key"],
)
async def test_reports_an_identity_that_does_not_help(
    monkeypatch: pytest.MonkeyPatch, identity: Path, content: str | None, seen: str
) -> None:
    rewrite(identity, content)
    found = await check_identity(monkeypatch)
    assert (found.state, seen in found.seen) == ("fail", True), found
    assert not any(secret in found.line for secret in ("hush", "AGE-SECRET-KEY-1Q"))


async def test_reports_an_unreadable_identity_and_one_that_others_can_read(
    monkeypatch: pytest.MonkeyPatch, identity: Path, tmp_path: Path
) -> None:
    os.chmod(identity, 0o644)
    found = await check_identity(monkeypatch)
    assert (found.state, found.todo) == ("warn", f"run chmod 600 {identity}")
    monkeypatch.setenv("BACKUP_AGE_IDENTITY_FILE", str(tmp_path))  # a directory: root may read any file
    found = await check_identity(monkeypatch)
    assert (found.state, "Is a directory" in found.seen) == ("fail", True)


async def test_reports_a_newest_backup_for_another_identity(
    monkeypatch: pytest.MonkeyPatch, identity: Path, tmp_path: Path, database: Pool
) -> None:
    other = str(pyrage.x25519.Identity.generate().to_public())
    await fill(database)
    await make_backup(make_service(tmp_path / "data", backup_age_recipient=other), database)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DATABASE_URL", database.target.libpq_url())
    found = await check_identity(monkeypatch)
    assert (found.state, other in found.seen) == ("fail", True), found
