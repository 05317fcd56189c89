"""transformers and PEFT: no servers, so their `generate` in a process of its own gets all streams as one batch."""

import sys
from importlib.metadata import version
from typing import ClassVar

import msgspec

from load_tests.peers.generate import Request
from load_tests.peers.ground import Ground
from load_tests.peers.process import Group, PeerFailed
from load_tests.peers.setting import NEW_TOKENS, Case, Measured


class _Generate:
    name: ClassVar[str]
    way: ClassVar[str]  # of `generate.WAYS`
    package: ClassVar[str]

    def __init__(self, ground: Ground):
        self.version = version(self.package)
        command = [sys.executable, "-m", "load_tests.peers.generate", self.way, str(ground.base)]
        command += map(str, ground.adapters)
        self._group = Group(command, ground.log(self.name), {"HF_HUB_OFFLINE": "1"}, talks=True)
        self.pause, self.resume, self.stop = self._group.pause, self._group.resume, self._group.stop

    def run(self, case: Case, round_: int, new_tokens: int = NEW_TOKENS) -> Measured:
        talk = self._group.process
        assert talk.stdin is not None
        assert talk.stdout is not None
        request = Request(case.models(), case.prompts(round_), new_tokens)
        talk.stdin.write(msgspec.json.encode(request).decode() + "\n")
        talk.stdin.flush()
        answer = talk.stdout.readline()
        if not answer:
            raise PeerFailed(f"it ended: {self._group.said()}")
        return msgspec.json.decode(answer, type=Measured)


class TransformersBase(_Generate):
    name: ClassVar[str] = "transformers"
    way: ClassVar[str] = "base"
    package: ClassVar[str] = "transformers"

    @staticmethod
    def takes(case: Case) -> bool:
        return not case.adapters


class PEFTMixed(_Generate):
    """`generate(adapter_names=...)`."""

    name: ClassVar[str] = "PEFT mixed"
    way: ClassVar[str] = "mixed"
    package: ClassVar[str] = "peft"

    @staticmethod
    def takes(case: Case) -> bool:
        return case.adapters > 0


class PEFTSwitching(PEFTMixed):
    """`set_adapter`, then a batch of that adapter's streams; one adapter after the other."""

    name: ClassVar[str] = "PEFT switching"
    way: ClassVar[str] = "switching"
