"""Request and response bodies of the adapter routes."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adapters.names import MAX_NAME
from adapters.tiers import Tier
from server.api.requests.defaults import Defaults
from server.api.schemas import Wire

InFlight = Literal["finish", "switch", "abort"]
InFlightField = Annotated[
    InFlight,
    Field(
        description="What becomes of running responses of the version that is replaced: they finish on it, switch to "
        "the new one, or end with finish_reason abort"
    ),
]
State = Literal["registered", "loading", "ready", "failed", "draining"]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
VersionText = Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-f]{12,64}$", max_length=71)]


MAX_LABELS = 64
LabelKey = Annotated[str, Field(min_length=1, max_length=63)]
LabelValue = Annotated[str, Field(max_length=256)]


class Settings(Wire):
    """Changes in what is stored for a name. A field that is left out stays as it is; null removes what it names, as
    does null for one label or one of the defaults."""

    model_config = ConfigDict(frozen=True)

    description: str | None = Field(default=None, max_length=4096)
    labels: dict[LabelKey, LabelValue | None] | None = Field(
        default=None, max_length=MAX_LABELS, examples=[{"team": "search"}]
    )
    defaults: Defaults | None = Field(default=None, description="Fields that apply where a request leaves them out")

    def changes(self) -> dict[str, Any]:
        """Return what the client wrote, null included."""
        return self.model_dump(include=set(Settings.model_fields), exclude_unset=True)


NO_CHANGES = Settings()


class SettingsRequest(Settings):
    model_config = ConfigDict(extra="forbid")


class Traffic(Wire):
    """Usage since the server started; tokens per second over about half a minute."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float


class AdapterBody(Wire):
    name: str
    kind: Literal["adapter"] = "adapter"
    version: str | None = Field(description="Null until a lazily registered adapter has been fetched")
    state: State
    tier: Tier
    pinned: bool
    base_model: str
    rank: int | None
    target_modules: list[str]
    bytes: int
    source: str
    created: int
    last_used: int | None
    in_flight: int
    traffic: Traffic | None = Field(description="Null until the first request")
    error: str | None
    description: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    defaults: dict[str, Any] = Field(default_factory=dict, description="Those that are set")
    report: dict[str, Any]


class AdapterList(Wire):
    object: Literal["list"] = "list"
    data: list[AdapterBody]
    has_more: bool


class DryRunBody(Wire):
    name: str
    dry_run: Literal[True] = True
    version: str
    rank: int
    report: dict[str, Any]


class RegisterRequest(Settings):
    name: Name
    source: str = Field(min_length=1, max_length=4096, examples=["file:///srv/adapters/acme"])
    replace: bool = False
    pinned: bool = False
    lazy: bool = Field(False, description="Return 202 at once and fetch the adapter in the background")
    in_flight: InFlightField = "finish"

    @model_validator(mode="after")
    def _waits_to_move(self) -> "RegisterRequest":
        if self.lazy and self.in_flight != "finish":
            raise PydanticCustomError("value_error", "in_flight needs lazy to be false")
        return self


class UploadForm(Settings):
    """The fields of an upload form, `labels` and `defaults` as JSON. The files are streamed to disk and are not part of
    this model."""

    name: Name
    replace: bool = False
    pinned: bool = False
    in_flight: InFlightField = "finish"

    @field_validator("labels", "defaults", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise PydanticCustomError("value_error", "must be the text of a JSON object") from None


class DeletedBody(Wire):
    name: str
    deleted: Literal[True] = True
    drained: int
    aborted: int


class LoadRequest(Wire):
    tier: Literal["device", "host"] = "device"


class VersionBody(Wire):
    version: str
    created: int
    current: bool
    rank: int | None = Field(description="Null, like what follows, for a version that is no longer stored")
    target_modules: list[str] | None
    bytes: int | None
    report: dict[str, Any] | None


class VersionList(Wire):
    object: Literal["list"] = "list"
    data: list[VersionBody]


class RollbackRequest(Wire):
    version: VersionText | None = None


class VllmLoadRequest(Wire):
    lora_name: Name
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    in_flight: InFlightField = "finish"


class VllmUnloadRequest(Wire):
    lora_name: Name
