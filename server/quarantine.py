"""Adapters that are put aside because their rows were not finite several times in a row."""

LIMIT = 3  # one or two may be the prompt's


class Quarantine:
    """Counts, by version, the sequences in a row that ended because their logits were not finite. `reasons` has the
    versions that are not served until they are loaded or published again."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self.reasons: dict[str, str] = {}

    def failed(self, digest: str) -> None:
        """Count a sequence of this version alone, unscaled."""
        self._failures[digest] = failures = self._failures.get(digest, 0) + 1
        if failures >= LIMIT:
            self.reasons[digest] = f"its numbers were not finite {LIMIT} times in a row; load it to try again"

    def succeeded(self, digest: str) -> None:
        """Note finite numbers, which end a row of failures. Versions that are put aside stay so."""
        self._failures.pop(digest, None)

    def forget(self, digest: str) -> None:
        """Try the version again."""
        self._failures.pop(digest, None)
        self.reasons.pop(digest, None)
