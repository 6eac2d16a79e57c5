"""The age format (age-encryption.org/v1), in a process of its own: pyrage holds the interpreter while it works.

`python -m utils.operations.backup.encryption encrypt RECIPIENT` and `decrypt IDENTITY_FILE` go from standard
input to standard output, in bounded memory.
"""

from __future__ import annotations

import sys
from pathlib import Path


def encryption(recipient: str) -> list[str]:
    """Return the command that encrypts to a recipient, which is no secret."""
    return [sys.executable, "-m", __name__, "encrypt", recipient]


def decryption(identity: Path) -> list[str]:
    """Return the command that decrypts with the identities in a file."""
    return [sys.executable, "-m", __name__, "decrypt", str(identity.resolve())]


def _identities(path: str) -> list[object]:
    from pyrage import x25519

    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeError) as exc:
        raise SystemExit(f"the identity file {path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from None
    found: list[object] = []
    for line in lines:
        if line and not line.startswith("#"):
            try:
                found.append(x25519.Identity.from_str(line))
            except Exception:  # never the line itself: it is a secret
                raise SystemExit(f"{path} holds a line that is no age identity (AGE-SECRET-KEY-1…)") from None
    if not found:
        raise SystemExit(f"{path} holds no age identity (AGE-SECRET-KEY-1…)")
    return found


def main(arguments: list[str]) -> None:
    """Run one of the two; what goes wrong is one line on standard error and exit code 1."""
    import pyrage

    what, key = arguments
    source, out = sys.stdin.buffer, sys.stdout.buffer
    try:
        if what == "encrypt":
            pyrage.encrypt_io(source, out, [pyrage.x25519.Recipient.from_str(key)])
        else:
            pyrage.decrypt_io(source, out, _identities(key))
        out.flush()
    except (pyrage.DecryptError, pyrage.EncryptError, pyrage.RecipientError) as exc:
        raise SystemExit(str(exc)) from None
    except OSError as exc:  # whoever read it is gone, or the stream is no age file to its end
        raise SystemExit(str(exc.strerror or exc)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
