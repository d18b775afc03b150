"""What a server keeps on disk: uploaded files and batches, in its set folder or in one that goes with the server."""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from modelwright.serve.batches_api import BatchRoutes, BatchRunner
from modelwright.serve.files_api import FileRoutes, FileStore
from modelwright.serve.keys import KeyRing
from modelwright.serve.served import ServeConfig
from modelwright.serve.web import FastAPI


class ServerState:
    """The state folder of one server, with the files and batches in it."""

    def __init__(self, config: ServeConfig, keys: KeyRing | None):
        self._config, self._keys = config, keys
        self._passing = tempfile.TemporaryDirectory(prefix="modelwright-") if config.state_dir is None else None
        self.folder = Path(self._passing.name if self._passing is not None else config.state_dir or "")
        self._runner: BatchRunner | None = None

    def install(self, app: FastAPI) -> None:
        """Add the routes of files and batches; the requests of a batch go to ``app`` itself."""
        config, files = self._config, FileStore(self.folder / "files")
        self._runner = BatchRunner(app, files, self.folder / "batches", self._keys)
        FileRoutes(files, config.max_file_bytes).install(app)
        BatchRoutes(self._runner, config.max_body_bytes, config.body_timeout_seconds).install(app)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Work on batches while the server runs; at the end a folder that was not asked for is removed."""
        if self._runner is not None:
            self._runner.start()
        try:
            yield
        finally:
            if self._runner is not None:
                await self._runner.stop()
            if self._passing is not None:
                self._passing.cleanup()
