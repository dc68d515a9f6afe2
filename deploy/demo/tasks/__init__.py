"""The demo's tasks: made-up data to train one adapter each, and a checker that says if an answer is right."""

from deploy.demo.tasks import json_extractor, pirate, sql_writer, ticket_classifier
from deploy.demo.tasks.example import Example, Split, Task, generate

TASKS: dict[str, Task] = {
    module.NAME: module.TASK for module in (json_extractor, sql_writer, ticket_classifier, pirate)
}


def is_correct(example: Example, text: str) -> bool:
    """Whether `text` is a right answer to the example, by its task's own checker."""
    return TASKS[example.task].is_correct(example, text)


__all__ = ["TASKS", "Example", "Split", "Task", "generate", "is_correct"]
