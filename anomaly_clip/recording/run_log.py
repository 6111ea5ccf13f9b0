"""Log of a run: Lightning's CSV files, in the run's folder."""

from __future__ import annotations

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

from anomaly_clip.recording.writer import RunWriter

__all__ = ["RunLogger"]


class RunLogger(CSVLogger):
    """Lightning's CSV logger for the run folder; the folder is created on first use."""

    def __init__(self, writer: RunWriter, verb: str) -> None:
        super().__init__(save_dir=writer.root)
        self._writer = writer
        self._verb = verb

    @property
    def root_dir(self) -> str:
        """Run folder."""
        return str(self._writer.folder)

    @property
    def log_dir(self) -> str:
        """Folder of the log."""
        logs = self._writer.folder / "logs"
        # Several verbs may log into a folder that the user has chosen.
        return str(logs if self._writer.requested_folder is None else logs / self._verb)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged.

        Raises:
            OSError: If it cannot be written; the error names the folder.
        """
        try:
            super().save()
        except OSError as error:  # that of a full disk names no file
            if error.errno is not None and error.filename is None:
                error.filename = self.log_dir
            raise
