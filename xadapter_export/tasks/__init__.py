"""Tasks: what a model is asked for, a module each.

To add one, write a ``TaskSpec`` and its ``model.tasks.TaskHead``, and list it here, or name it in a package
of your own as an entry point of the group ``xadapter_export.tasks``. Nothing else knows a task by its name.
"""

from typing import Final

from xadapter_export.registry import Registry
from xadapter_export.tasks.feature_extraction import FEATURE_EXTRACTION
from xadapter_export.tasks.fill_mask import FILL_MASK
from xadapter_export.tasks.spec import TaskSpec
from xadapter_export.tasks.text_classification import TEXT_CLASSIFICATION

TASKS: Final[Registry[TaskSpec]] = Registry(
    "xadapter_export.tasks", "task", FILL_MASK, TEXT_CLASSIFICATION, FEATURE_EXTRACTION
)

__all__ = ["FEATURE_EXTRACTION", "FILL_MASK", "TASKS", "TEXT_CLASSIFICATION", "TaskSpec"]
