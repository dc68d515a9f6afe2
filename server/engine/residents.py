"""What is on the device and in host memory, as far as the engine has told: an image key and how it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from server.engine.messages import SlotChange

MAX_FAILURES = 4096  # remembered; the oldest go first


class Residents:
    """The image keys on the device, and why others could not be loaded; built from the changes, in order."""

    def __init__(self) -> None:
        self._ready: set[str] = set()
        self._hosted: set[str] = set()
        self._failures: OrderedDict[str, str] = OrderedDict()
        self.on_ready: Callable[[str], None] = lambda image_key: None
        """called with each image that came to the device"""

    def __contains__(self, image_key: str) -> bool:
        return image_key in self._ready

    def __len__(self) -> int:
        return len(self._ready)

    def is_hosted(self, image_key: str) -> bool:
        """Whether host memory has this image."""
        return image_key in self._hosted

    def failure(self, image_key: str) -> str | None:
        """Why the last load of this image failed; None when it did not, or has been loaded since."""
        return self._failures.get(image_key)

    def forget_failure(self, image_key: str) -> None:
        """It is being loaded anew."""
        self._failures.pop(image_key, None)

    def apply(self, changes: Iterable[SlotChange]) -> None:
        """Take in what a step told."""
        for change in changes:
            if change.state == "gone":
                self._ready.discard(change.image_key)
            elif change.state == "hosted":
                self._hosted.add(change.image_key)
            elif change.state == "unhosted":
                self._hosted.discard(change.image_key)
            elif change.state == "ready":
                self._ready.add(change.image_key)
                self._failures.pop(change.image_key, None)
                self.on_ready(change.image_key)
            else:
                self._failures[change.image_key] = change.message
                self._failures.move_to_end(change.image_key)
                if len(self._failures) > MAX_FAILURES:
                    self._failures.popitem(last=False)
