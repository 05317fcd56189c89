"""What a Python client is asked, and how its responses are reported: one line of JSON for each feature.

A driver reports what its client returned; whether that is right is decided by `load_tests/clients/checks.py`.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

URL = os.environ["LORAPLEX_URL"]
MODEL = os.environ["LORAPLEX_MODEL"]
KEY = "none"

TASK = json.loads(Path(__file__).with_name("task.json").read_text())
MAX_TOKENS: int = TASK["max_tokens"]
TEXTS: list[str] = TASK["texts"]
WEATHER = TASK["weather"]
PERSON = TASK["person"]
JSON_TOKENS: int = PERSON["max_tokens"]

QUESTION = [{"role": "user", "content": TASK["question"]}]
WEATHER_QUESTION = [{"role": "user", "content": WEATHER["question"]}]
PERSON_QUESTION = [{"role": "user", "content": PERSON["question"]}]
FUNCTION = {name: WEATHER[name] for name in ("name", "description", "parameters")}
TOOL = {"type": "function", "function": FUNCTION}
NAMED = {"type": "function", "function": {"name": WEATHER["name"]}}
PERSON_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": PERSON["name"], "schema": PERSON["schema"], "strict": True},
}


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


class Weather(BaseModel, extra="forbid"):
    """The weather forecast of a city"""

    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=10)


def call(name: str, arguments: Any) -> dict[str, Any]:
    """Return a call as the checks read it. Arguments that are still text are parsed."""
    return {"name": name, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def report(absent: dict[str, str] | None = None, **features: Callable[[], Any]) -> None:
    """Run the features and write their values, errors, and the reasons of those that the client does not have."""
    with Path(sys.argv[1]).open("w") as lines:
        for name, reason in (absent or {}).items():
            print(json.dumps({"feature": name, "absent": reason}), file=lines, flush=True)
        for name, feature in features.items():
            print(json.dumps({"feature": name, **_outcome(feature)}), file=lines, flush=True)


def _outcome(feature: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": feature()}
    except Exception as error:  # of any library, which becomes a cell that failed
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
