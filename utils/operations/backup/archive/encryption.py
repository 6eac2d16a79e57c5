"""The age format (age-encryption.org/v1), in a subprocess: pyrage holds the GIL while it works.

`python -m utils.operations.backup.archive.encryption encrypt RECIPIENT` and `decrypt IDENTITY_FILE` filter standard
input to standard output in bounded memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What `can_decrypt` encrypts.
PROBE = b"Guildbook"


class KeyFileError(ValueError):
    """An identity file or a recipient cannot be used; says why, without secrets. Nothing of ours is imported here."""


def encrypt_command(recipient: str) -> list[str]:
    """Return the command that encrypts to a recipient; a recipient is not secret."""
    return [sys.executable, "-m", __name__, "encrypt", recipient]


def decrypt_command(identity_file: Path) -> list[str]:
    """Return the command that decrypts with the identities in a file."""
    return [sys.executable, "-m", __name__, "decrypt", str(identity_file.resolve())]


def main(arguments: list[str]) -> None:
    """Run one of the two commands; an error is one line on standard error and exit code 1."""
    import pyrage

    verb, key = arguments
    source, out = sys.stdin.buffer, sys.stdout.buffer
    try:
        if verb == "encrypt":
            pyrage.encrypt_io(source, out, [pyrage.x25519.Recipient.from_str(key)])
        else:
            pyrage.decrypt_io(source, out, read_identities(Path(key)))
        out.flush()
    except (KeyFileError, pyrage.DecryptError, pyrage.EncryptError, pyrage.RecipientError) as exc:
        raise SystemExit(str(exc)) from None
    except OSError as exc:  # the reader has exited, or the input is a truncated age file
        raise SystemExit(str(exc.strerror or exc)) from None


def read_identities(path: Path) -> list[Any]:
    """Return the age identities in a file, `pyrage.x25519.Identity`. Raises `KeyFileError`. Blocks."""
    from pyrage import x25519

    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise KeyFileError(f"the identity file {path} cannot be read: {reason}") from None
    identities: list[Any] = []
    for line in lines:
        if line and not line.startswith("#"):
            try:
                identities.append(x25519.Identity.from_str(line))
            except Exception:  # must not quote the line: it may be a secret
                raise KeyFileError(f"{path} has a line that is not an age identity (AGE-SECRET-KEY-1…)") from None
    if not identities:
        raise KeyFileError(f"{path} contains no age identity (AGE-SECRET-KEY-1…)")
    return identities


def can_decrypt(recipient: str, identities: Sequence[Any]) -> bool:
    """Encrypt a probe to a recipient, and return whether the identities decrypt it. Raises `KeyFileError`."""
    import pyrage

    try:
        probe = pyrage.encrypt(PROBE, [pyrage.x25519.Recipient.from_str(recipient)])
    except (pyrage.EncryptError, pyrage.RecipientError) as exc:
        raise KeyFileError(f"cannot encrypt to BACKUP_AGE_RECIPIENT: {exc}") from None
    try:
        return bool(pyrage.decrypt(probe, list(identities)) == PROBE)
    except pyrage.DecryptError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
