"""The clients that may ask, and their keys."""

import hashlib
import re
from pathlib import Path

from hstu.base.errors import DataError

from .watched import WatchedFile

_LINE = re.compile(r"([\w.-]{1,64}):([0-9a-f]{64})")


class KeyFile(WatchedFile[dict[bytes, str]]):
    """A file with a line NAME:SHA256 per key, in hexadecimal. It has no keys, so who reads it can ask nothing.

    A name may have several keys, so that a client can change from one to another. Raises DataError if it is wrong.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _names_of)

    def client_of(self, authorization: bytes) -> str | None:
        """The client with the key of a header "Bearer KEY". None: no client."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()  # how long the look-up takes says nothing of a key
        return self.content.get(digest) if scheme.lower() == b"bearer" else None


def _names_of(path: Path) -> dict[bytes, str]:
    """SHA-256 → name. Errors contain no line, which may be a key by mistake."""
    names: dict[bytes, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--api_keys {path} cannot be read: {error}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not (found := _LINE.fullmatch(line)):
            raise DataError(
                f"--api_keys {path}:{number} is not NAME:SHA256, with a name of letters, digits, '.', '_' and '-', and "
                "the 64 digits that printf %s KEY | sha256sum prints"
            )
        if names.setdefault(bytes.fromhex(found[2]), found[1]) != found[1]:
            raise DataError(f"--api_keys {path}:{number} has the key of another name; give each its own")
    if not names:
        raise DataError(f"--api_keys {path} has no key; write a line NAME:SHA256 for each client")
    return names
