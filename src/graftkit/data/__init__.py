"""Examples: the formats they come in and how they are loaded."""

from graftkit.data.tasks import Item, Task, load_task

__all__ = ["Item", "Task", "load_task"]
