"""The pending mirror: what `pending.mirrored` is."""

from __future__ import annotations

from collections.abc import Callable

from ..metrics import MirrorMetrics
from ..threads.locks import Lock
from ..threads.outcome import Pending, run_guarded

COUNTS = ("size_bytes", "num_objects", "num_parts", "sent_bytes")
"""What an upload counts up in its `MirrorMetrics`; the times are noted by whoever waits for it."""


class PendingMirror(Pending):
    """A committed checkpoint on its way to its mirrors. See `Pending`.

    Resolves to the tag when every mirror has it, or to the first failure once all have ended; the checkpoint on disk
    is whole."""

    def __init__(
        self, tag: str, urls: tuple[str, ...], run_callback: Callable[[Callable[[], object]], object] = run_guarded
    ) -> None:
        super().__init__(tag, run_callback)
        self.committed_s = 0.0
        """When the commit ended, on ``time.perf_counter``."""
        self._lock = Lock()
        self._metrics = {url: MirrorMetrics(tag, url) for url in urls}
        self._left = list(urls)
        self._failure: BaseException | None = None

    @property
    def metrics(self) -> MirrorMetrics:
        """What has been sent up to now, summed over the mirrors; times are those of the slowest."""
        total, known = MirrorMetrics(self.tag), self._metrics.values()
        for name in COUNTS:
            setattr(total, name, sum(getattr(one, name) for one in known))
        for name in ("wait_s", "upload_s"):
            setattr(total, name, max((getattr(one, name) for one in known), default=0.0))
        return total

    def _still_waits(self, what: str) -> str:
        left = ", ".join(self._left)
        return f"the mirroring of {self.tag!r} {what}; missing: {left}. It is whole on disk"

    # The mirrors' side.

    def metrics_of(self, url: str) -> MirrorMetrics:
        """Where the upload to one mirror is measured."""
        return self._metrics[url]

    def mirror_ended(self, url: str, error: BaseException | None) -> None:
        """One mirror has ended; a second word about the same mirror does nothing."""
        with self._lock:
            if url not in self._left:
                return
            self._left.remove(url)
            self._failure = self._failure or error
            if self._left:
                return
        self.resolve(self.tag, self._failure)

    def fail(self, error: BaseException) -> None:
        """End it for all mirrors: there is nothing to be mirrored, or nobody who does it."""
        for url in tuple(self._left):
            self.mirror_ended(url, error)
