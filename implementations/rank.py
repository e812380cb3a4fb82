"""Which process of a run this is: a run on several devices may be several processes.

They learn of it from their environment, which suites/harness/ranks.py sets.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

INDEX, COUNT, COORDINATOR = "AERIE_RANK", "AERIE_NUM_RANKS", "AERIE_COORDINATOR"
LISTEN_FD = "AERIE_COORDINATOR_FD"


@dataclass(frozen=True, kw_only=True)
class Rank:
    index: int = 0
    count: int = 1
    host: str = "127.0.0.1"  # where rank 0 is found by all
    port: int = 0
    listen_fd: int | None = None  # of rank 0: a socket bound to that port, so that nobody takes it

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Rank":
        if COUNT not in environ:
            return cls()
        host, _, port = environ[COORDINATOR].rpartition(":")
        fd = environ.get(LISTEN_FD)
        return cls(
            index=int(environ[INDEX]),
            count=int(environ[COUNT]),
            host=host,
            port=int(port),
            listen_fd=None if fd is None else int(fd),
        )

    def to_environ(self) -> dict[str, str]:
        fd = {} if self.listen_fd is None else {LISTEN_FD: str(self.listen_fd)}
        place = f"{self.host}:{self.port}"
        return {INDEX: str(self.index), COUNT: str(self.count), COORDINATOR: place} | fd
