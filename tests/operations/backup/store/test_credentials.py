"""The credentials of remote stores: which variables are missing, and where none is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.operations.backup.store.credentials import are_given_by_machine, find_missing


@pytest.mark.parametrize(
    ("url", "environ", "missing"),
    [
        ("s3://b", {}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"),
        ("s3://b", {"AWS_ACCESS_KEY_ID": "k"}, "AWS_SECRET_ACCESS_KEY is not set"),
        ("s3://b", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "s"}, "AWS_ACCESS_KEY_ID is not set"),
        ("s3://b", {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}, None),
        ("s3://b", {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}, None),
        ("gs://b", {}, "GOOGLE_APPLICATION_CREDENTIALS is not set"),
        ("gs://b", {"GOOGLE_SERVICE_ACCOUNT": "/s"}, None),
        ("az://b", {"AZURE_STORAGE_ACCOUNT_NAME": "n"}, "AZURE_STORAGE_ACCOUNT_KEY is not set"),
        ("az://b", {"AZURE_STORAGE_ACCOUNT_NAME": "n", "AZURE_STORAGE_SAS_TOKEN": "t"}, None),
        ("file:///b", {}, None),
        ("https://b.s3.amazonaws.com", {}, None),
    ],
)
def test_names_the_variables_that_are_missing(
    tmp_path: Path, url: str, environ: dict[str, str], missing: str | None
) -> None:
    assert find_missing(url, environ=environ, home=tmp_path) == missing


def test_google_needs_no_variable_after_a_login(tmp_path: Path) -> None:
    path = tmp_path / ".config" / "gcloud" / "application_default_credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert find_missing("gs://b", environ={}, home=tmp_path) is None


def test_only_machines_of_the_vendor_give_credentials(tmp_path: Path) -> None:
    vendor = tmp_path / "sys_vendor"
    assert are_given_by_machine("s3://b", vendor_file=vendor) is None
    vendor.write_text("Amazon EC2\n")
    assert are_given_by_machine("s3://b", vendor_file=vendor) is True
    assert are_given_by_machine("gs://b", vendor_file=vendor) is False
    vendor.write_text("Xen\n")
    assert are_given_by_machine("s3://b", vendor_file=vendor) is None, "Amazon's older machines say so"
