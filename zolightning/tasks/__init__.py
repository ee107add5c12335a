"""Language tasks as in MeZO's paper, over any rows: words, multiple choice, masks, text; one module for all of them."""

from .item import Item, TextTask, few_shot, in_context
from .module import TaskData, TaskModule
from .own import own_task
from .presets import TASKS
from .reader import ChoiceReader, MaskReader, OptionReader, Reader, TextReader, WordReader, reader_for
from .rows import TaskSplits, load_task

__all__ = [
    "TASKS",
    "ChoiceReader",
    "Item",
    "MaskReader",
    "OptionReader",
    "Reader",
    "TaskData",
    "TaskModule",
    "TaskSplits",
    "TextReader",
    "TextTask",
    "WordReader",
    "few_shot",
    "in_context",
    "load_task",
    "own_task",
    "reader_for",
]
