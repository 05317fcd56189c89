"""Names of the files that make up an adapter."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
# Files that transformers' save_pretrained may add, with the maximum size of each in bytes. None of them is code.
TOKENIZER_FILES = {
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 1 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
}
