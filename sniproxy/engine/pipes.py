"""A pool of large pipes for splice(2).

Measured: splice saves CPU only with a 1 MiB pipe. An unprivileged user gets 64 of those (fs.pipe-user-pages-soft), then EPERM. A
stream that gets none is copied.
"""

import fcntl
import os

PIPE_BYTES = 1024 * 1024
"""The size from which splice halves the CPU time per byte (64 KiB pipes do not); fs.pipe-max-size is 1 MiB by default."""

DEFAULT_MAX_PIPES = 256
"""Pipes open at once: a quarter of a gigabyte if all were full. An unprivileged user reaches the kernel's limit (64) first."""


class Pipe:
    """A 1 MiB pipe, non-blocking at both ends. `held` is the number of bytes in it."""

    __slots__ = ("held", "reader", "writer")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        try:
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close both ends; bytes in it are lost."""
        os.close(self.reader)
        os.close(self.writer)


class PipePool:
    """At most `limit` pipes. Those given back empty are reused."""

    def __init__(self, limit: int = DEFAULT_MAX_PIPES) -> None:
        self._limit = limit
        self._idle: list[Pipe] = []
        self.taken = 0
        self.denied = 0
        """How often no pipe was available, so that a stream was copied."""

    def take(self) -> Pipe | None:
        """Return a pipe, or None if the limit of the pool or of the system is reached."""
        if self._idle:
            pipe = self._idle.pop()
        elif self.taken >= self._limit:
            self.denied += 1
            return None
        else:
            try:
                pipe = Pipe()
            except OSError:  # EPERM: the user's limit of pipe pages; EMFILE: the limit of descriptors
                self.denied += 1
                return None
        self.taken += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Return a pipe to the pool. One that still holds bytes is closed: they belong to a stream that has ended."""
        self.taken -= 1
        if pipe.held:
            pipe.close()
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close the idle pipes."""
        while self._idle:
            self._idle.pop().close()
