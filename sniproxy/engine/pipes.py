"""Pipes for splice: large, few, and given back.

Measured: splice saves CPU only with a 1 MiB pipe. A plain user gets 64 of those (fs.pipe-user-pages-soft), then EPERM: whoever
gets none goes on copying.
"""

import fcntl
import os

PIPE_BYTES = 1024 * 1024
"""The size from which splice halves the CPU time per byte (64 KiB pipes do not); fs.pipe-max-size is 1 MiB by default."""

DEFAULT_MAX_PIPES = 256
"""Pipes open at once, a quarter of a gigabyte of pages if all were full. A plain user's own limit (64) comes before."""


class Pipe:
    """An empty 1 MiB pipe, non-blocking at both ends. `held` counts the bytes in it."""

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
    """At most `limit` pipes; those given back empty are used again."""

    def __init__(self, limit: int = DEFAULT_MAX_PIPES) -> None:
        self._limit = limit
        self._idle: list[Pipe] = []
        self.taken = 0
        self.denied = 0
        """How often nothing was to be had: the number behind "why is this stream copied?"."""

    def take(self) -> Pipe | None:
        """Give a pipe, or None where the pool's or the system's limit is reached."""
        if self._idle:
            pipe = self._idle.pop()
        elif self.taken >= self._limit:
            self.denied += 1
            return None
        else:
            try:
                pipe = Pipe()
            except OSError:  # EPERM past the user's pages, EMFILE past its descriptors
                self.denied += 1
                return None
        self.taken += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take a pipe back; one that still holds bytes is closed, for they belong to a stream that ended."""
        self.taken -= 1
        if pipe.held:
            pipe.close()
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close the idle pipes."""
        while self._idle:
            self._idle.pop().close()
