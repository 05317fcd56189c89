"""`loraplex serve` with its defaults."""

import shutil
import sys
from importlib.metadata import version
from typing import ClassVar

from load_tests.peers.ground import Ground
from load_tests.peers.http_server import HTTPServer
from load_tests.peers.setting import BASE, Case, commit


class Loraplex(HTTPServer):
    name: ClassVar[str] = "Loraplex"

    def __init__(self, ground: Ground):
        self.version = f"{version('loraplex')} {commit()}".strip()
        data_dir = ground.work / "loraplex"
        shutil.rmtree(data_dir, ignore_errors=True)
        command = [sys.executable, "-m", "server", "serve", "--data-dir", str(data_dir)]
        command += ["--model", str(ground.base), "--served-model-name", BASE]
        for folder in ground.adapters:
            command += ["--adapter", f"{folder.name}={folder}"]
        super().__init__(command, "/readyz", ground.log(self.name))

    @staticmethod
    def takes(case: Case) -> bool:
        return True
