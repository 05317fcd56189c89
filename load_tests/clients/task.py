"""What every client is asked."""

import json
from pathlib import Path
from typing import Any

DRIVERS = Path(__file__).parent / "drivers"
TASK: dict[str, Any] = json.loads((DRIVERS / "task.json").read_text(encoding="utf-8"))
