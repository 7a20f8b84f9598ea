"""Which worker takes which file: one takes those that start whole services, for as long as there are any.

Two services at once would wait for each other's processes; and what the workers would otherwise take last, the files
with the fewest tests, are the ones that take longest.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ROOT = Path(__file__).parents[1]
STARTS = re.compile(
    r"from services import .*\b(Service|Guest)\b|\bworld_service\b|\bLaptop\b|\bray\.init\(|\brunning_service\("
)


class ServicesApart(LoadFileScheduling):
    def _assign_work_unit(self, node: WorkerController) -> None:
        is_for_services = node is self.nodes[0]
        found = (file for file in self.workqueue if starts_a_service(file) is is_for_services)
        self.workqueue.move_to_end(next(found, next(iter(self.workqueue))), last=False)
        super()._assign_work_unit(node)


@cache
def starts_a_service(file: str) -> bool:
    """Whether a file's tests start Ray."""
    return STARTS.search((ROOT / file).read_text(encoding="utf-8")) is not None
