"""Examples: the formats they come in and how they are loaded."""

from graftkit.data.records import Item
from graftkit.data.tasks import Generation, Task, load_task, load_tasks

__all__ = ["Generation", "Item", "Task", "load_task", "load_tasks"]
