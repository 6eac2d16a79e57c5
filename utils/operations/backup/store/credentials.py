"""Which credentials of a remote store are missing: obstore's own errors name the address of a metadata service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

#: Names the machine's vendor: readable by everyone, missing in some sandboxes.
VENDOR_FILE = Path("/sys/class/dmi/id/sys_vendor")
#: What machines of several vendors call themselves, older ones of Amazon's too.
UNKNOWN_VENDOR = "Xen"
#: Written by `gcloud auth application-default login`, below the home directory.
_GOOGLE_DEFAULT = Path(".config/gcloud/application_default_credentials.json")


@dataclass(frozen=True, slots=True)
class _Scheme:
    """Where obstore gets the credentials of one kind of store from."""

    #: Each group is needed: one variable of it is enough. The first one is what most people set.
    needed: tuple[tuple[str, ...], ...]
    #: Variables that replace all of them.
    instead: tuple[str, ...]
    #: The vendor of the virtual machines that give credentials to what runs on them.
    vendor: str


_AWS = _Scheme(
    needed=(("AWS_ACCESS_KEY_ID",), ("AWS_SECRET_ACCESS_KEY",)),
    instead=(
        "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_METADATA_ENDPOINT", "AWS_SKIP_SIGNATURE",
    ),
    vendor="Amazon",
)  # fmt: skip
_GOOGLE = _Scheme(
    needed=(
        (
            "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH",
            "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN",
        ),
    ),
    instead=("GOOGLE_SKIP_SIGNATURE", "GCE_METADATA_HOST", "GCE_METADATA_ROOT"),
    vendor="Google",
)  # fmt: skip
_AZURE = _Scheme(
    needed=(
        ("AZURE_STORAGE_ACCOUNT_NAME",),
        (
            "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY",
            "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_TOKEN", "AZURE_STORAGE_CLIENT_SECRET",
            "AZURE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT",
            "IDENTITY_ENDPOINT",
            "AZURE_USE_AZURE_CLI", "AZURE_SKIP_SIGNATURE",
        ),
    ),
    instead=("AZURE_STORAGE_USE_EMULATOR",),
    vendor="Microsoft",
)  # fmt: skip
_SCHEMES: Mapping[str, _Scheme] = {"s3": _AWS, "s3a": _AWS, "gs": _GOOGLE, "az": _AZURE, "azure": _AZURE}


def find_missing(url: str, *, environ: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """Return what a store's URL needs and the environment lacks, such as `AWS_ACCESS_KEY_ID is not set`; None: nothing.

    `home` is the home directory.
    """
    scheme = _SCHEMES.get(urlsplit(url).scheme)
    if scheme is None or any(environ.get(name) for name in scheme.instead):
        return None
    if scheme is _GOOGLE and ((home or Path.home()) / _GOOGLE_DEFAULT).is_file():
        return None
    missing = [names[0] for names in scheme.needed if not any(environ.get(name) for name in names)]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set" if missing else None


def are_given_by_machine(url: str, *, vendor_file: Path = VENDOR_FILE) -> bool | None:
    """Return whether this is a virtual machine of the store's vendor, which may give credentials; None: unknown."""
    scheme = _SCHEMES.get(urlsplit(url).scheme)
    try:
        vendor = vendor_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if scheme is not None and scheme.vendor in vendor:
        return True
    return None if UNKNOWN_VENDOR in vendor else False
