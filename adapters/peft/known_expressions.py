"""Regular expressions and replacements of published tokenizers, which take time linear in the text.

The library's engine backtracks, so an expression of a stranger can take exponential time. To add one, show in
tests/test_tokenizer_parts.py that its cost is linear.
"""

# Kind of pattern, pattern, content. Invariant: none has more characters than what it replaces, so that no number of
# them makes a text grow.
REPLACEMENTS = frozenset(
    {
        ("String", " ", "▁"),  # Llama, Gemma, Mistral
        ("String", "▁", " "),
        ("String", "``", '"'),  # ALBERT, XLNet, T5's kind
        ("String", "''", '"'),
        ("String", "\n", " "),
        ("String", "\n", "▁"),
        ("String", "\t", " "),
        ("String", "\r", " "),
        ("String", "</w>", " "),  # CLIP
        ("String", "</w>", ""),
        ("Regex", " {2,}", " "),  # SentencePiece's remove_extra_whitespaces
        ("Regex", " {2,}", "▁"),
        ("Regex", "^▁+$", ""),
        ("Regex", r"\s+", " "),
        ("Regex", r"\n", " "),
        ("Regex", r"[\n\r\t]", " "),
        ("Regex", r"\s{2,}|[\n\r\t]", " "),
    }
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_O200K_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

SPLITS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        r"(?:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_OTHERS}{_SPACES}",  # Llama 3, cl100k
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
        r"|\s+(?!\S)|\s+",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_OTHERS}{_SPACES}",  # Qwen2, Qwen3
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"  # Qwen3.5
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,2}}{_OTHERS}{_SPACES}",
        # GPT-4o, gpt-oss, Llama 4, Phi-4-mini
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_O200K_ENDS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_O200K_ENDS}"
        rf"|\p{{N}}{{1,3}}|{_O200K_OTHERS}",
        # Mistral's Tekken
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_O200K_OTHERS}",
        r" ?[^(\s|.,!?…。，、।۔،)]+",  # BLOOM
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"[\(\)\[\]\{\}]|([!\"#\$%\&'\*\+,\-\./:;<=>\?\\\^_`\|\~])\1*",  # Galactica, Nougat
        # DeepSeek
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[一-龥ࠀ-一가-퟿]+",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        + _SPACES,
        r"\p{N}{1,3}",
        r"\p{N}",
        r"\p{N}+",
        r"\d",
        r"\d+",
        r"\d{1,3}",
        r"[0-9]",
        r"[0-9][0-9][0-9]",  # Falcon
        r"\s+",
        r" ",
        r"\n",
    }
)
