"""What uploads under way may take of the service: bytes on its disk and in its memory, of one tenant and of all.

An upload holds what it announced, or what has come of it, from its first byte until it was checked. Disks are for
results, too, and uploads come before any quota is asked.
"""

from __future__ import annotations

from collections import Counter

from polytrace.errors import CapacityError, QuotaError
from polytrace.price_tables import in_bytes

PART_BYTES = 1 << 20  # gathered before a write, which then leaves the event loop
RETRY_S = 2.0  # when one ends is not known
_MEMORY_BYTES = 64 << 20  # for the parts of all
_LEAST_PART_BYTES = 64 << 10


class UploadRoom:
    """All uploads of one gateway. Belongs to one event loop."""

    def __init__(self, *, most: int, most_of_tenant: int) -> None:
        self._most = most
        self._most_of_tenant = most_of_tenant
        self._held: Counter[str] = Counter()  # bytes by tenant
        self._rooms: dict[str, Room] = {}

    def of(self, tenant: str, upload: str) -> Room:
        """The room for a new upload, empty."""
        self._rooms[upload] = room = Room(self, tenant, upload)
        return room

    def release(self, upload: str) -> None:
        """An upload was accepted, or is gone."""
        room = self._rooms.pop(upload, None)
        if room is not None:
            self._held[room.tenant] -= room.num_bytes
            if not self._held[room.tenant]:
                del self._held[room.tenant]

    def grow(self, room: Room, num_bytes: int) -> None:
        """Raises QuotaError, or CapacityError. One upload alone may always grow: it has a limit of its own."""
        more = num_bytes - room.num_bytes
        if more <= 0 or room.upload not in self._rooms:
            return
        theirs = self._held[room.tenant] - room.num_bytes
        if theirs and theirs + num_bytes > self._most_of_tenant:
            told = f"uploads of tenant {room.tenant} that are under way hold {in_bytes(theirs)}"
            told += f", and may hold {in_bytes(self._most_of_tenant)}; try again when one has ended"
            raise QuotaError(told, retry_after_s=RETRY_S)
        others = self._held.total() - room.num_bytes
        if others and others + num_bytes > self._most:
            told = f"uploads that are under way hold {in_bytes(others)} of the service, the most is"
            raise CapacityError(f"{told} {in_bytes(self._most)}; try again later", retry_after_s=RETRY_S)
        self._held[room.tenant] += more
        room.num_bytes = num_bytes

    @property
    def part_bytes(self) -> int:
        """How much of each upload may be in memory."""
        return max(_LEAST_PART_BYTES, min(PART_BYTES, _MEMORY_BYTES // max(1, len(self._rooms))))


class Room:
    """Of one upload."""

    def __init__(self, among: UploadRoom, tenant: str, upload: str) -> None:
        self._among = among
        self.tenant = tenant
        self.upload = upload
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """So many bytes in all, or what it holds already. Raises as `UploadRoom.grow`."""
        self._among.grow(self, num_bytes)

    def release(self) -> None:
        self._among.release(self.upload)

    @property
    def part_bytes(self) -> int:
        return self._among.part_bytes
