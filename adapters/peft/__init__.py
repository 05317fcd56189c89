"""What PEFT writes, read: config, tensors and tokenizer files of an adapter, before any judgement."""
