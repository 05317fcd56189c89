"""Adapters of other PEFT types than LORA, converted at load to what a step can apply: a LoRA, or scales of channels.

`family` is the contract, `converted` checks and converts; each type is a module.
"""
