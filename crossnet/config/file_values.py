"""Values of a configuration file that are files: paths, certificates, secrets and keys.

The functions are parsers for `schema.Leaf`: they take a value and the folder of the configuration file, and raise Mismatch.
"""

import dataclasses
import re
import stat
from pathlib import Path

from crossnet.config.schema import HIDDEN, Mismatch
from discovery.files.yaml_file import Plain
from discovery.model.validation import shown

MAX_SECRET_BYTES = 64 * 1024
"""Of a secret's file: keys and passwords have a hundred bytes, certificates a few thousand."""

MAX_CERTIFICATES_BYTES = 4 * 1024 * 1024
"""Of a file of certificates: all CAs of a Debian system take a quarter of a MiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Secret:
    """The content of a `{file: PATH}`. It is never printed."""

    path: Path
    value: bytes = dataclasses.field(repr=False)
    readable_by_all: bool = False

    def __str__(self) -> str:
        return HIDDEN

    @property
    def text(self) -> str:
        """The secret as text; it was checked to be ASCII when it was read."""
        return self.value.decode()


@dataclasses.dataclass(frozen=True, slots=True)
class Certificates:
    """A file of certificates with its content when it was read; after a renewal under the same path it compares unequal."""

    path: Path
    pem: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return str(self.path)


def relative_path(value: Plain, folder: Path) -> Path:
    """Return a path, relative to the folder. The file need not exist."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise Mismatch("a path")
    return folder / value


def existing_file(value: Plain, folder: Path) -> Path:
    """Return the path of a file that can be read."""
    path = relative_path(value, folder)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise Mismatch("a readable file", f"{shown(value)} ({error.strerror or error})") from error


def certificates_file(value: Plain, folder: Path) -> Certificates:
    """Read a file of certificates, of at most `MAX_CERTIFICATES_BYTES`."""
    path = relative_path(value, folder)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CERTIFICATES_BYTES + 1)
    except OSError as error:
        raise Mismatch("a readable file", f"{shown(value)} ({error.strerror or error})") from error
    if len(data) > MAX_CERTIFICATES_BYTES:
        raise Mismatch(f"a file of at most {MAX_CERTIFICATES_BYTES} bytes", shown(value))
    return Certificates(path, data.decode("ascii", "ignore"))  # comments may be in any encoding


def secret_file(value: Plain, folder: Path) -> Secret:
    """Read the file of a `{file: PATH}`: one line of ASCII text."""
    # Anything other than {file: PATH} is often the secret itself, so errors never repeat it.
    if not isinstance(value, dict) or value.keys() != {"file"}:
        raise Mismatch("{file: PATH}, secrets stand in files of their own", "something else (not shown)")
    return _line_of_file(value["file"], folder)


def _line_of_file(value: Plain, folder: Path) -> Secret:
    path = relative_path(value, folder)
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise Mismatch("a readable file", f"{shown(value)} ({error.strerror or error})", ".file") from error
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    if not data:
        raise Mismatch("a file with a secret in it", f"{shown(value)}, which is empty", ".file")
    if len(data) > MAX_SECRET_BYTES or not data.isascii() or re.search(rb"[\x00-\x1f\x7f]", data):
        raise Mismatch("a file with one line of ASCII text", f"{shown(value)}, which has something else", ".file")
    return Secret(path, data, bool(mode & stat.S_IROTH))


def key_file(value: Plain, folder: Path) -> Secret:
    """Read a file with a key: 64 hexadecimal digits."""
    try:
        secret = _line_of_file(value, folder)
    except Mismatch as error:
        raise Mismatch(error.expected, error.got) from error
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", secret.value):
        raise Mismatch("a file with 64 hexadecimal digits", f"{shown(value)}, which has something else")
    return secret
