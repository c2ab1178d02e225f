"""Image-classification tasks as tensors with fixed splits."""

from weightnet.tasks.task import TASKS, Task, load_task

__all__ = ["TASKS", "Task", "load_task"]
