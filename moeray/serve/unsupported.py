"""Parameters of the OpenAI API that are not supported: refused by name, unless they ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeray.errors import RequestError

# Name -> the values, beside null, "" and empty containers, that ask for what would happen anyway.
_SHARED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "guided_json": (),
    "guided_regex": (),
    "logits_processors": (),
    "metadata": (),
    "service_tier": ("auto", "default"),
    "structured_outputs": (),
    "use_beam_search": (False,),
}
COMPLETION: dict[str, tuple[Any, ...]] = {**_SHARED, "suffix": ()}
CHAT: dict[str, tuple[Any, ...]] = {
    **_SHARED,
    "add_generation_prompt": (True,),
    "audio": (),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "verbosity": (),
    "web_search_options": (),
}
MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": (),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": (),
    "type": ("text", "message"),
}


def without_unsupported(
    body: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """`body` less its neutral unsupported parameters. Raises RequestError for one that asks for something."""
    kept = {}
    for name, value in body.items():
        if name not in table:
            kept[name] = value
        elif not _neutral(value, table[name]):
            raise RequestError(
                f"{where}{name} is not supported; leave it out", param=f"{where}{name}", code="unsupported_parameter"
            )
    return kept


def _neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or (isinstance(value, str | list | dict) and not value):
        return True
    return any(type(value) is type(other) and value == other for other in neutral)
