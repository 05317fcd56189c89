"""The measurement of a cartridge's first token asks the same question in every way."""

from pathlib import Path

from load_tests.cartridge import BLOCKS, DEVICE, DISK, PROMPT, measure


def test_every_way_gives_the_same_first_token(llama_folder: Path, tmp_path: Path) -> None:
    found = measure(llama_folder, tmp_path, tokens=40, question=5, rounds=2, dtype="float32")
    assert set(found.seconds) == {PROMPT, DISK, DEVICE, BLOCKS}
    assert all(len(own) == 2 and own == found.tokens[PROMPT] for own in found.tokens.values())
    assert all(f"| {way} |" in found.table() for way in found.seconds) and "| 2 of 2 |" in found.table()
