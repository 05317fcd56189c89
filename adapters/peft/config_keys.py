"""Every key of PEFT's `LoraConfig`, in exactly one table; a test compares the tables with PEFT. No torch."""

from typing import Any

# Keys that all types have, and that change nothing.
COMMON_HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
SERVED_KEYS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "lora_bias",
        "use_dora",
        "use_qalora",
        "qalora_group_size",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "alora_invocation_tokens",
    }
)
# Keys that record how an adapter was trained or where it came from; no value changes the meaning of the tensors.
HARMLESS_KEYS = COMMON_HARMLESS_KEYS | {"eva_config", "fan_in_fan_out", "lora_dropout", "runtime_config"}
# Keys that change the base model or the arithmetic: only the listed values, or an empty one, leave plain LoRA.
REFUSED_KEYS: dict[str, tuple[Any, ...]] = {
    "arrow_config": (),
    "corda_config": (),
    # All other initialisations subtract the initial delta from the base weights (pissa, olora, corda, loftq, lora_ga).
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
    "kasa_config": (),
    "layer_replication": (),
    "loftq_config": (),
    "lora_ga_config": (),
    "megatron_config": (),
    "megatron_core": ("megatron.core",),
    "monteclora_config": (),
    "use_bdlora": (),
    "velora_config": (),
}
# Workarounds for refused keys, appended to the problem's `expected`.
WAYS_OUT = {
    "init_lora_weights": (
        ", or the adapter converted to the unmodified base: `loraplex convert ADAPTER OUT --base MODEL` for pissa and "
        "olora, `loraplex convert ADAPTER OUT --initial INITIAL` for others"
    ),
}
# Names in an adapter's report for the keys that it uses.
FEATURES = {
    "use_rslora": "rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform",
    "bias": "bias",
    "lora_bias": "lora_bias",
    "use_dora": "dora",
    "use_qalora": "qalora",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_tokens",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "alora",
}
