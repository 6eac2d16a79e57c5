"""The age format (age-encryption.org/v1), in a subprocess: pyrage holds the GIL while it works.

`python -m utils.operations.backup.encryption encrypt RECIPIENT` and `decrypt IDENTITY_FILE` filter standard input to
standard output in bounded memory.
"""

from __future__ import annotations

import sys
from pathlib import Path


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
            pyrage.decrypt_io(source, out, _read_identities(key))
        out.flush()
    except (pyrage.DecryptError, pyrage.EncryptError, pyrage.RecipientError) as exc:
        raise SystemExit(str(exc)) from None
    except OSError as exc:  # the reader has exited, or the input is a truncated age file
        raise SystemExit(str(exc.strerror or exc)) from None


def _read_identities(path: str) -> list[object]:
    from pyrage import x25519

    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise SystemExit(f"the identity file {path} cannot be read: {reason}") from None
    identities: list[object] = []
    for line in lines:
        if line and not line.startswith("#"):
            try:
                identities.append(x25519.Identity.from_str(line))
            except Exception:  # must not quote the line: it may be a secret
                raise SystemExit(f"{path} has a line that is not an age identity (AGE-SECRET-KEY-1…)") from None
    if not identities:
        raise SystemExit(f"{path} contains no age identity (AGE-SECRET-KEY-1…)")
    return identities


if __name__ == "__main__":
    main(sys.argv[1:])
