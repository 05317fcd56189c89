"""Adapters of PEFT types other than LORA, converted at load to a LoRA or to scales of channels.

`base` is the contract, `convert` validates and converts; every other module is one type or a few related ones.
"""
