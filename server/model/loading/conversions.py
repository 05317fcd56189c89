"""The conversion of adapters from earlier releases of transformers, as plain data for the process that has no torch.

Nothing is listed here: the rules are those that PEFT and transformers apply themselves when they load an adapter.
"""

import logging
import re
from typing import Any, Literal, cast

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from adapters.model_spec import ExpertFusion, NameConversion, Renaming

log = logging.getLogger(__name__)

_ADAPTER = "default"
_TARGET = re.compile(r"(?P<module>.+?)(?P<inner>\.base_layer)?\.lora_(?P<kind>[AB])\.default\.weight")
# What PEFT does to the factors of experts, by the depth of the parameter's wrapper and the kind of factor.
_OPERATIONS = {
    (True, "A"): ["MergeModulelist", "Concatenate", "FlattenDims"],
    (True, "B"): ["MergeModulelist", "PeftConcatenate"],
    (False, "A"): ["MergeModulelist", "FlattenDims"],
    (False, "B"): ["MergeModulelist", "PermuteDims", "FlattenDims", "Transpose"],
}


def conversion_of(model: Any) -> NameConversion | None:
    """Return the conversion of adapters of `model`, or None if none of its names has changed."""
    model_type: str = getattr(model.config, "model_type", "")
    if get_checkpoint_conversion_mapping(model_type) is None:
        return None
    rules = get_model_conversion_mapping(model)
    unknown = [rule for rule in rules if type(rule).rename_source_key is not WeightTransform.rename_source_key]
    if unknown:
        log.warning("adapters with names from before %s are refused: %s is not known", model_type, type(unknown[0]))
        return None
    targets, fused = _targets(model_type)
    renamings = tuple(_renaming(rule) for rule in rules if isinstance(rule, WeightRenaming))
    return NameConversion(renamings, _fusions(rules) if targets else (), targets, fused)


def _renaming(rule: Any, target: str | None = None) -> Renaming:
    """Return a rule as plain data; `scopes` are in the order in which transformers tries them."""
    scopes: tuple[str, ...] = ()
    if rule.scope_prefix is not None:
        scope, base = (f"{prefix}." if prefix else "" for prefix in (rule.scope_prefix, rule.base_model_prefix))
        scopes = (base + scope, scope)
    return Renaming(rule.compiled_sources.pattern, rule.target_patterns[0] if target is None else target, scopes)


def _targets(model_type: str) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Return what PEFT makes of the targets of a config, and which targets it requires together."""
    from peft.utils import transformers_weight_conversion as tables  # a slow import, for few models

    kind = tables._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    targets, fused = tables._MOE_TARGET_MODULE_MAPPING.get(kind, {}), tables._MOE_FUSED_TARGETS.get(kind, {})
    return tuple(targets.items()), tuple((name, tuple(together)) for name, together in fused.items())


def _fusions(rules: list[Any]) -> tuple[ExpertFusion, ...]:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

    mapping = build_peft_weight_mapping(rules, _ADAPTER, LoraConfig())
    found = (_fusion(rule) for rule in mapping if isinstance(rule, WeightConverter))
    return tuple(fusion for fusion in found if fusion is not None)


def _fusion(rule: Any) -> ExpertFusion | None:
    """Return one of PEFT's converters of experts as plain data; None for one of another kind."""
    match = _TARGET.fullmatch(rule.target_patterns[0])
    operations = [type(operation).__name__ for operation in rule.operations]
    if match is None or operations != _OPERATIONS[bool(match["inner"]), match["kind"]]:
        return None
    parameter = "gate_up_proj" if match["inner"] else "down_proj"  # the outer of PEFT's two wrappers has the latter
    kind = cast(Literal["A", "B"], match["kind"])
    return ExpertFusion(_renaming(rule, match["module"]), parameter, len(rule.source_patterns), kind)
