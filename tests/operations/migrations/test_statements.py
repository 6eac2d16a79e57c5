"""What each statement of a migration does to other users of the database."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.operations.migrations import statements

ON_OLD = "ALTER TABLE members "


@pytest.mark.parametrize(
    ("sql", "kinds"),
    [
        ("CREATE TABLE a (id bigint PRIMARY KEY)", ["safe"]),
        ("CREATE TABLE a (id bigint REFERENCES members)", ["locks"]),
        ("CREATE TABLE a PARTITION OF changes FOR VALUES FROM (1) TO (2)", ["locks"]),
        (ON_OLD + "ADD COLUMN x int", ["locks"]),
        (ON_OLD + "ADD COLUMN x int DEFAULT 5 NOT NULL", ["locks"]),
        (ON_OLD + "ADD x jsonb DEFAULT '{}'::jsonb NOT NULL", ["locks"]),
        (ON_OLD + "ADD x timestamptz DEFAULT now()", ["locks"]),
        (ON_OLD + "ADD x uuid DEFAULT gen_random_uuid()", ["rewrites"]),
        (ON_OLD + "ADD x timestamptz DEFAULT clock_timestamp()", ["rewrites"]),
        (ON_OLD + "ADD x bigserial", ["rewrites"]),
        (ON_OLD + "ADD COLUMN x text NOT NULL", ["fails"]),
        (ON_OLD + "ADD COLUMN IF NOT EXISTS x varchar(20) NOT NULL CHECK (x <> '')", ["fails"]),
        (ON_OLD + "ADD x int NOT NULL DEFAULT NULL", ["fails"]),
        (ON_OLD + "ADD x int PRIMARY KEY", ["fails"]),
        (ON_OLD + "ADD x int DEFAULT 0 NOT NULL UNIQUE", ["fails"]),
        (ON_OLD + "ADD x bigserial NOT NULL", ["rewrites"]),
        (ON_OLD + "ADD x uuid DEFAULT gen_random_uuid() NOT NULL", ["rewrites"]),
        (ON_OLD + "ADD x int GENERATED ALWAYS AS IDENTITY NOT NULL", ["rewrites"]),
        (ON_OLD + "ADD a int, ADD b int NOT NULL", ["locks", "fails"]),
        (ON_OLD + "ADD x int GENERATED ALWAYS AS (flags + 1) STORED", ["rewrites"]),
        (ON_OLD + "ADD x int CHECK (x > 0)", ["scans"]),
        (ON_OLD + "ALTER COLUMN flags TYPE bigint", ["rewrites"]),
        (ON_OLD + 'ALTER "my flags" SET DATA TYPE bigint', ["rewrites"]),
        (ON_OLD + "ALTER COLUMN flags SET NOT NULL", ["scans"]),
        (ON_OLD + "ALTER COLUMN type DROP NOT NULL", ["locks"]),
        (ON_OLD + "ADD CONSTRAINT c CHECK (flags > 0)", ["scans"]),
        (ON_OLD + "ADD CONSTRAINT c CHECK (flags > 0) NOT VALID", ["locks"]),
        (ON_OLD + "ADD CONSTRAINT c FOREIGN KEY (user_id) REFERENCES users", ["scans"]),
        (ON_OLD + "ADD CONSTRAINT c UNIQUE USING INDEX i", ["locks"]),
        (ON_OLD + "VALIDATE CONSTRAINT c", ["safe"]),
        (ON_OLD + "DROP COLUMN nick", ["drops"]),
        (ON_OLD + "DROP CONSTRAINT c", ["drops"]),
        (ON_OLD + "ADD x int, DROP COLUMN nick, ALTER flags TYPE bigint", ["locks", "drops", "rewrites"]),
        (ON_OLD + "RENAME COLUMN nick TO name", ["locks"]),
        (ON_OLD + "SET (fillfactor = 70)", ["safe"]),
        (ON_OLD + "FROBNICATE", ["unknown"]),
        ("ALTER TABLE IF EXISTS ONLY public.members DROP nick", ["drops"]),
        ("CREATE UNIQUE INDEX i ON members (nick)", ["blocks writes"]),
        ("CREATE INDEX CONCURRENTLY i ON members (nick)", ["safe"]),
        ("DROP INDEX i", ["drops"]),
        ("drop table members", ["drops"]),
        ("DROP TYPE mood", ["drops"]),
        ("TRUNCATE members", ["drops"]),
        ("DELETE FROM members WHERE flags = 1", ["drops"]),
        ("UPDATE members SET flags = 1", ["changes rows"]),
        ("UPDATE guildbook_version SET version_num='0004' WHERE true", ["safe"]),
        ("WITH gone AS (DELETE FROM members RETURNING 1) SELECT 1", ["unknown"]),
        ("VACUUM FULL members", ["rewrites"]),
        ("DO $$ BEGIN DROP TABLE members; END $$", ["unknown"]),
        ("SELECT drop_everything()", ["unknown"]),
        ("CALL f('a; b')", ["unknown"]),
    ],
)
def test_classifies_statements(sql: str, kinds: list[str]) -> None:
    found = [statement for statement in statements.parse(sql + ";\n") if statement.sql]
    assert [[effect.kind for effect in statement.effects] for statement in found] == [kinds]


def test_says_which_statements_fail_on_a_table_with_rows() -> None:
    (statement,) = statements.parse(ON_OLD + "ADD COLUMN x text NOT NULL")
    assert statement.is_failing
    assert statement.annotated().startswith("-- fails: if the table has rows, which would have no value")
    (on_new, *_) = statements.parse("CREATE TABLE a (id int); ALTER TABLE a ADD x int NOT NULL;")[1:]
    assert not on_new.is_failing


def test_statements_on_a_new_table_are_safe() -> None:
    sql = "CREATE TABLE ops.a (id int); CREATE INDEX i ON ops.a (id); ALTER TABLE ops.a ALTER id TYPE bigint;"
    assert [s.effects[0].kind for s in statements.parse(sql)] == ["safe"] * 3
    assert statements.parse("CREATE TABLE a (id int); CREATE INDEX i ON b (id)")[1].effects[0].kind == "blocks writes"


@given(st.text(alphabet="a';\"$- \n/*x1EeUu&\\()DROPTABLE,é", max_size=60))
def test_parsing_loses_no_sql(sql: str) -> None:
    found = statements.parse(sql)
    assert "".join(statement.before + statement.sql for statement in found) == sql
