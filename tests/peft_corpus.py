"""A corpus of adapters: the fields of PEFT's `LoraConfig` one by one and in pairs, and the other types of PEFT."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    EvaConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig

MAX_RANK = 64  # of an engine that is not told otherwise
INVOCATION = [85, 86]  # in the middle of every prompt, and nowhere else


@dataclass(frozen=True)
class Entry:
    """An adapter to be made: `config` is PEFT's, for LoRA as arguments beside `LORA`'s.

    If it is refused, a problem's place must contain `if_refused`; None where a refusal would be a bug. `base` is the
    model that it is served on, `made_on` the one that it was made on, where that is another. `dtype` is that of the
    file, `vocab_size` that of a resized model.
    """

    config: dict[str, Any] | PeftConfig
    if_refused: str | None = None
    base: str = "llama"
    made_on: str | None = None
    dtype: torch.dtype = torch.float32
    vocab_size: int | None = None
    save_embedding_layers: bool | str = False


LORA = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
Q = ["q_proj"]
ENDS = ["lm_head", "embed_tokens"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EVERY = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora(if_refused: str | None = None, **config: Any) -> Entry:
    return Entry(config, if_refused)


def on(base: str, if_refused: str | None = None, **config: Any) -> Entry:
    return Entry(config, if_refused, base=base)


def other(config: PeftConfig) -> Entry:
    return Entry(config, "peft_type")


NUMBERS = {
    "r 1": lora(r=1),
    "r 3": lora(r=3),
    "r 16": lora(r=16),
    "r 17": lora(r=17),
    "r max": lora(r=MAX_RANK),
    "r above max": lora("rank of model.layers.0", r=MAX_RANK + 1),
    "lora_alpha below r": lora(r=8, lora_alpha=1),
    "lora_alpha 0.5": lora(lora_alpha=0.5),
    "lora_alpha 32": lora(lora_alpha=32, init_lora_weights="gaussian"),
    "lora_alpha 0": lora("lora_alpha", lora_alpha=0),
    "lora_alpha negative": lora("lora_alpha", lora_alpha=-4),
    "lora_alpha enormous": lora("lora_alpha", lora_alpha=20_000),
    "lora_dropout": lora(lora_dropout=0.3),
    "rslora": lora(use_rslora=True),
    "rslora, r 17": lora(use_rslora=True, r=17, lora_alpha=3),
    "stored in fp16": Entry({"r": 5}, dtype=torch.float16),
    "stored in bf16": Entry({"r": 5, "use_dora": True}, dtype=torch.bfloat16),
}
TARGETS = {
    "targets by default": lora(target_modules=None),
    "one target": lora(target_modules=Q),
    "full names": lora(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    "endings of names": lora(target_modules=["layers.1.self_attn.k_proj", "mlp.up_proj"]),
    "a regular expression": lora(target_modules=r".*layers\.1\..*(q|up)_proj"),
    "a look-ahead": lora(target_modules=r".*layers\.(?!0).*\.(v|down)_proj"),
    "all-linear": lora(target_modules="all-linear"),
    "all-linear, excluded": lora(exclude_modules=["lm_head", "layers.0.self_attn.q_proj", "up_proj"]),
    "excluded by an expression": lora(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.0\..*q_proj"),
    "lm_head": lora(target_modules=["lm_head"]),
    "lm_head and everything": lora(target_modules=r".*_proj|lm_head"),
    "embed_tokens": lora(target_modules=["embed_tokens"]),
    "both ends": lora(target_modules=[*ENDS, "o_proj"]),
    "both ends, auto": Entry({"target_modules": [*ENDS, "o_proj"]}, save_embedding_layers="auto"),
    "both ends, rslora": lora(target_modules=[*ENDS, "o_proj"], use_rslora=True, r=17),
    "layers_to_transform": lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "layers_to_transform, a number": lora(target_modules=Q, layers_to_transform=0),
    "layers_pattern": lora(target_modules=["v_proj"], layers_to_transform=[0], layers_pattern="layers"),
    "layers_pattern, a list": lora(target_modules=["v_proj"], layers_to_transform=[1], layers_pattern=["layers", "h"]),
}
PATTERNS = {
    "rank_pattern": lora(rank_pattern={"v_proj": 3, "mlp.up_proj": 17}),
    "rank_pattern, full name": lora(rank_pattern={"model.layers.0.self_attn.q_proj": 7}),
    "rank_pattern, anchored": lora(rank_pattern={"^model.layers.0.self_attn.q_proj": 7, "^q_proj": 9}),
    "rank_pattern, expressions": lora(rank_pattern={r"(gate|up)_proj": 19, r".*layers\.1\..*": 2}),
    "rank_pattern, the first counts": lora(rank_pattern={"layers.1.self_attn.q_proj": 5, "q_proj": 2}),
    "rank_pattern, max": lora(rank_pattern={"o_proj": MAX_RANK}),
    "rank_pattern, above max": lora("rank of model.layers.0.self_attn.o_proj", rank_pattern={"o_proj": MAX_RANK + 1}),
    "rank_pattern, on the ends": lora(target_modules=ENDS, rank_pattern={"lm_head": 2, "embed_tokens": 9}),
    "rank_pattern, a look-ahead": lora("rank_pattern", rank_pattern={r"layers\.(?!0).*q_proj": 2}),
    "alpha_pattern": lora(alpha_pattern={"q_proj": 9, "layers.1.mlp.up_proj": 1}),
    "alpha_pattern, expressions": lora(alpha_pattern={r".*\.0\..*_proj": 11, r"[a-o]\w+_proj": 2}),
    "alpha_pattern, a look-ahead": lora("alpha_pattern", alpha_pattern={r"(?!q)\w_proj": 2}),
    "both patterns, rslora": lora(use_rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 9}),
    "both patterns, dora": lora(use_dora=True, rank_pattern={"k_proj": 17}, alpha_pattern={r"(k|v)_proj": 9}),
}
VECTORS = {
    "bias none": lora(bias="none"),
    "bias lora_only": lora(bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "bias all": lora(bias="all", target_modules=["v_proj"]),
    "bias all, rslora": lora(bias="all", target_modules=["k_proj"], use_rslora=True),
    "lora_bias": lora(lora_bias=True),
    "lora_bias, rslora": lora(lora_bias=True, use_rslora=True),
    "lora_bias, patterns": lora(lora_bias=True, rank_pattern={"q_proj": 18}, alpha_pattern={"v_proj": 1}),
    "lora_bias, bias all": lora(lora_bias=True, bias="all", target_modules=["gate_proj"]),
    "lora_bias on a head": lora(lora_bias=True, target_modules=["lm_head"]),
    "lora_bias without biases": on("tied", lora_bias=True),
    "bias all without biases": on("tied", bias="all"),
    "dora": lora(use_dora=True),
    "dora, r 17": lora(use_dora=True, r=17),
    "dora, bias lora_only": lora(use_dora=True, bias="lora_only"),
    "dora on the head": lora(use_dora=True, target_modules=["lm_head"]),
    "dora on the embedding": lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "dora, layers_to_transform": lora(use_dora=True, target_modules=["o_proj"], layers_to_transform=[1]),
    "dora, saved norms": lora(use_dora=True, modules_to_save=["norm"]),
    "dora, trained tokens": lora(use_dora=True, trainable_token_indices=[5, 6]),
    "fan_in_fan_out": on("gpt2", fan_in_fan_out=True),
    "fan_in_fan_out, dora": on("gpt2", fan_in_fan_out=True, use_dora=True, target_modules=["c_attn", "c_fc"]),
    "fan_in_fan_out, wrongly said": lora(fan_in_fan_out=True),
}
INITIALISED = {
    "init True": lora(init_lora_weights=True),
    "init False": lora(init_lora_weights=False),
    "init gaussian": lora(init_lora_weights="gaussian"),
    "init orthogonal": lora(init_lora_weights="orthogonal"),
    "init mica": lora(init_lora_weights="mica"),
    "init eva": lora(init_lora_weights="eva", eva_config=EvaConfig()),
    "init olora": lora("init_lora_weights", init_lora_weights="olora"),
    "init pissa": lora("init_lora_weights", init_lora_weights="pissa"),
    "init pissa_niter_4": lora("init_lora_weights", init_lora_weights="pissa_niter_4"),
    "init lora_ga": lora("init_lora_weights", init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
    "init pissa, rslora": lora("init_lora_weights", init_lora_weights="pissa", use_rslora=True),
}
SAVED = {
    "saved head": lora(target_modules=Q, modules_to_save=["lm_head"]),
    "saved embedding": lora(target_modules=Q, modules_to_save=["embed_tokens"]),
    "saved norm": lora(modules_to_save=["norm"]),
    "saved norm, full name": lora(modules_to_save=["model.layers.1.input_layernorm"]),
    "saved norms of layers": lora(modules_to_save=["input_layernorm", "post_attention_layernorm"]),
    "saved linear": lora(target_modules=Q, modules_to_save=["v_proj"]),
    "saved block": lora(target_modules=Q, modules_to_save=["mlp"]),
    "saved, also adapted": lora(target_modules=["q_proj", "v_proj"], modules_to_save=["q_proj"]),
    "saved, rslora and bias": lora(target_modules=Q, modules_to_save=["norm"], use_rslora=True, bias="lora_only"),
    "saved, bias all": lora("v_proj", target_modules=Q, modules_to_save=["v_proj"], bias="all"),
    "ends with their weights": Entry({"target_modules": ENDS}, save_embedding_layers=True),
    "weights of the ends alone": Entry({"target_modules": Q}, save_embedding_layers=True),
    "larger vocabulary": Entry({"target_modules": Q, "modules_to_save": ENDS}, vocab_size=103),
    "smaller vocabulary": Entry({"target_modules": Q, "modules_to_save": ENDS}, vocab_size=91),
    "larger vocabulary, its weights": Entry({"target_modules": Q}, vocab_size=101, save_embedding_layers=True),
    "larger vocabulary, adapted": Entry({"target_modules": ENDS}, vocab_size=101, save_embedding_layers=True),
    "larger vocabulary, rslora": Entry({"modules_to_save": ENDS, "use_rslora": True}, vocab_size=99),
    "larger vocabulary, half of it": Entry({"modules_to_save": ["lm_head"]}, "embed_tokens", vocab_size=101),
    "larger vocabulary, dora": Entry(
        {"target_modules": ENDS, "use_dora": True}, "magnitude", vocab_size=101, save_embedding_layers=True
    ),
}
TOKENS = {
    "tokens": lora(trainable_token_indices=[3, 40, 90]),
    "tokens, unordered": lora(trainable_token_indices=[40, 3, 90]),
    "tokens of the embedding": lora(trainable_token_indices={"embed_tokens": [3, 40]}),
    "tokens of the head": lora(trainable_token_indices={"lm_head": [3, 40]}),
    "tokens of both": lora(trainable_token_indices={"embed_tokens": [3, 40], "lm_head": [5]}),
    "tokens, rslora": lora(trainable_token_indices=[1, 2], use_rslora=True),
    "tokens, saved head": lora(trainable_token_indices=[8, 9], modules_to_save=["lm_head"]),
    "tied tokens": on("tied", trainable_token_indices=[3, 40, 90]),
    "tied tokens of both": on("tied", trainable_token_indices={"embed_tokens": [3, 40], "lm_head": [3, 40]}),
    "tied tokens, ensured": on("tied", trainable_token_indices=[3, 40], ensure_weight_tying=True),
}
TIED = {
    "tied": on("tied"),
    "tied, lm_head": on("tied", target_modules=["lm_head", "q_proj"]),
    "tied, embedding ensured": on("tied", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "tied, head ensured": on("tied", target_modules=["lm_head", "q_proj"], ensure_weight_tying=True),
    "tied, saved head": on("tied", modules_to_save=["lm_head"]),
    "tied, saved embedding ensured": on("tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tied, saved head ensured": on("tied", modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tied, dora on the embedding": on("tied", target_modules=["embed_tokens", "v_proj"], use_dora=True),
    "tied, larger vocabulary": Entry({}, base="tied", vocab_size=103, save_embedding_layers=True),
}
PARAMETERS = {
    "target_parameters": lora(target_modules=Q, target_parameters=["mlp.up_proj.weight"]),
    "target_parameters, rslora": lora(target_modules=[], target_parameters=["k_proj.weight"], use_rslora=True),
    "target_parameters, ranks": lora(
        target_modules=Q, target_parameters=["up_proj.weight"], rank_pattern={"up_proj.weight": 7}
    ),
    "experts": on("mixtral", target_modules=Q, target_parameters=EXPERTS),
    "experts, ranks": on(
        "mixtral", target_modules=Q, target_parameters=EXPERTS[:1], rank_pattern={"experts.gate_up_proj": 2}
    ),
    "experts, rslora": on("mixtral", target_modules=["o_proj"], target_parameters=EXPERTS[1:], use_rslora=True),
    "router": on("mixtral", target_modules=Q, target_parameters=["mlp.gate.weight"]),
    "all-linear beside experts": on("mixtral"),
}
VARIANTS = {
    "qalora": lora(use_qalora=True, qalora_group_size=8),
    "bdlora": lora(
        "use_bdlora",
        target_modules=["q_proj", "o_proj"],
        use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
    ),
    "kasa": lora("kasa_config", kasa_config=KasaConfig()),
    "velora": lora("velora_config", velora_config=VeloraConfig(num_groups=8)),
    "monteclora": lora("monteclora_config", monteclora_config=MontecloraConfig()),
    "layer_replication": lora("layer_replication", layer_replication=[(0, 2), (1, 2)]),
    "megatron_core": lora("megatron_core", megatron_core="megatron.other"),
    "alora": lora(alora_invocation_tokens=INVOCATION),
    "alora, rslora": lora(alora_invocation_tokens=INVOCATION, use_rslora=True, r=17),
    "alora, patterns": lora(alora_invocation_tokens=INVOCATION, rank_pattern={"q_proj": 3, "up_proj": 20}),
    "alora, bias": lora("alora_invocation_tokens", alora_invocation_tokens=INVOCATION, bias="lora_only"),
    "alora, saved norm": lora("alora_invocation_tokens", alora_invocation_tokens=INVOCATION, modules_to_save=["norm"]),
    "alora, tokens": lora(
        "alora_invocation_tokens", alora_invocation_tokens=INVOCATION, trainable_token_indices=[4, 5]
    ),
}
TASKS = {
    "no task": lora(task_type=None),
    "feature extraction": lora(task_type="FEATURE_EXTRACTION"),
    "classifier": Entry({"task_type": "SEQ_CLS"}, "score", made_on="classifier"),
    "token classifier": Entry({"task_type": "TOKEN_CLS", "target_modules": Q}, "score", made_on="token classifier"),
    "bare decoder": Entry({"task_type": "FEATURE_EXTRACTION"}, "adapter_model.safetensors", made_on="decoder"),
    "another base": Entry({}, "layers.0.self_attn.q_proj", made_on="wider llama"),
    "a deeper base": Entry({}, "layers.2.self_attn.q_proj", made_on="deeper llama"),
}
OTHER_TYPES = {
    "ia3, saved norm": Entry(
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["norm"]), "modules_to_save"
    ),
    "loha, saved norm": Entry(LoHaConfig(target_modules=["k_proj"], modules_to_save=["norm"]), "modules_to_save"),
    "vera, bias": Entry(VeraConfig(r=12, bias="all", **EVERY), "bias"),
    "adalora, rslora": Entry(AdaLoraConfig(init_r=6, total_step=10, use_rslora=True, **EVERY), "use_rslora"),
    "miss, bat": Entry(MissConfig(r=8, init_weights="bat", **EVERY), "init_weights"),
    "lokr, one layer": Entry(LoKrConfig(r=3, alpha=5, target_modules=["q_proj"], layers_to_transform=[1])),
    "adalora": Entry(AdaLoraConfig(init_r=6, lora_alpha=9, total_step=10, **EVERY)),
    "boft": other(BOFTConfig(boft_block_size=4, **EVERY)),
    "c3a": other(C3AConfig(block_size=16, **EVERY)),
    "delora": Entry(DeloraConfig(r=5, **EVERY)),
    "fourierft": other(FourierFTConfig(n_frequency=20, **EVERY)),
    "gralora": other(GraloraConfig(r=8, alpha=8, **EVERY)),
    "hira": other(HiraConfig(r=4, **EVERY)),
    "hra": other(HRAConfig(r=4, **EVERY)),
    "ia3": Entry(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3, outputs": Entry(IA3Config(feedforward_modules=[], **EVERY)),
    "ln_tuning": other(LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")),
    "loha": Entry(LoHaConfig(r=3, alpha=5, **EVERY)),
    "loha, ranks": Entry(LoHaConfig(r=3, alpha=5, rank_pattern={"v_proj": 5}, **EVERY)),
    "lokr": Entry(LoKrConfig(r=3, alpha=5, decompose_factor=4, **EVERY)),
    "lokr, both": Entry(LoKrConfig(r=3, alpha=5, decompose_both=True, **EVERY)),
    "miss": Entry(MissConfig(r=6, **EVERY)),
    "oft": other(OFTConfig(oft_block_size=8, **EVERY)),
    "p_tuning": other(PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM")),
    "prefix_tuning": other(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt_tuning": other(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "randlora": other(RandLoraConfig(r=8, **EVERY)),
    "road": other(RoadConfig(group_size=16, **EVERY)),
    "shira": other(ShiraConfig(r=2, **EVERY)),
    "trainable_tokens": other(TrainableTokensConfig(token_indices=[3, 4], task_type="CAUSAL_LM")),
    "vblora": Entry(VBLoRAConfig(r=4, num_vectors=20, vector_length=16, **EVERY)),
    "vera": Entry(VeraConfig(r=12, **EVERY)),
    "waveft": other(WaveFTConfig(n_frequency=32, **EVERY)),
}
CORPUS: dict[str, Entry] = {
    **NUMBERS,
    **TARGETS,
    **PATTERNS,
    **VECTORS,
    **INITIALISED,
    **SAVED,
    **TOKENS,
    **TIED,
    **PARAMETERS,
    **VARIANTS,
    **TASKS,
    **OTHER_TYPES,
}
