"""What a merge is, as data: its options, its tasks, what was done to it. A record checks itself when it is read.

Only what an adapter's config can hold enters: no tensors, no files and no models.
"""

from .expected_routing import GATES, ExpectedRouting, most_telling
from .options import ROUTERS, MergeOptions
from .record import (
    INSTRUCTION_ROUTER,
    ROUTED_PREFIX,
    TASKS_NAME,
    MergeRecord,
    Operation,
    Origin,
    PooledTask,
    PoolRecord,
    RoutedInstructions,
    RoutedProjector,
    RoutedTask,
    RouterRecord,
    TaskRecord,
    merge_of,
)

__all__ = [
    "GATES",
    "INSTRUCTION_ROUTER",
    "ROUTED_PREFIX",
    "ROUTERS",
    "TASKS_NAME",
    "ExpectedRouting",
    "MergeOptions",
    "MergeRecord",
    "Operation",
    "Origin",
    "PoolRecord",
    "PooledTask",
    "RoutedInstructions",
    "RoutedProjector",
    "RoutedTask",
    "RouterRecord",
    "TaskRecord",
    "merge_of",
    "most_telling",
]
