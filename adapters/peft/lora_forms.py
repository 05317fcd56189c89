"""PEFT types that a LORA without factors can say: saved modules, and rows of trained tokens. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.peft.config_keys import COMMON_HARMLESS_KEYS
from adapters.peft.config_reader import KeyTable

_LN_TUNING = KeyTable(
    frozenset({"peft_type", "target_modules", "exclude_modules"}), COMMON_HARMLESS_KEYS, {"modules_to_save": ()}
)
_TRAINABLE_TOKENS = KeyTable(
    frozenset({"peft_type", "target_modules", "token_indices"}), COMMON_HARMLESS_KEYS | {"init_weights"}, {}
)


@dataclass(frozen=True, slots=True)
class LoraForm:
    """A type by its keys, and by `own`, the part of its tensors' names that is `lora` in a LORA's file. If `is_all`,
    its files have no other tensors."""

    peft_type: str
    keys: KeyTable
    own: str
    lora: str
    is_all: bool

    def lora_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of a LORA that has the same effect, with the values of the keys unchecked."""
        targets = config.get("target_modules")
        same: dict[str, Any] = {"peft_type": "LORA", "target_modules": []}
        if self is LN_TUNING:
            return same | {"modules_to_save": targets if isinstance(targets, list) else []}
        tokens = config.get("token_indices") or []
        if not targets:
            return same | {"trainable_token_indices": tokens}
        names = targets if isinstance(targets, list) else [targets]
        return same | {"trainable_token_indices": {str(name): tokens for name in names}}

    def lora_name(self, name: str) -> str | None:
        """Return a LORA's name for the tensor `name`; None for a tensor that the type's files do not have."""
        if self.is_all and f".{self.own}" not in name:
            return None
        return name.replace(f".{self.own}", f".{self.lora}" if self.lora else "")


LN_TUNING = LoraForm("LN_TUNING", _LN_TUNING, "ln_tuning_layers", "", is_all=True)
TRAINABLE_TOKENS = LoraForm(
    "TRAINABLE_TOKENS",
    _TRAINABLE_TOKENS,
    "trainable_tokens_delta",
    "token_adapter.trainable_tokens_delta",
    is_all=False,
)
LORA_FORMS = {form.peft_type: form for form in (LN_TUNING, TRAINABLE_TOKENS)}


def form_of(config: Mapping[str, Any]) -> LoraForm | None:
    """Return the form of a config's type; None for a type that is none of `LORA_FORMS`."""
    peft_type = config.get("peft_type")
    return LORA_FORMS.get(peft_type) if isinstance(peft_type, str) else None
