"""Decide on each image that appears in a folder, and append the decisions to a CSV file.

    python watch_folder.py FOLDER DETECTOR [--results decisions.csv] [--interval 1] [--move DIR]

DETECTOR is the folder of an exported detector. An image is complete once two looks see the same
size and time of it. Stop with Ctrl-C, and start again at any time: nothing is lost or repeated.
"""

import argparse
import csv
import importlib
import io
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = ("file", "decision", "p_value", "score", "error", "size", "modified_ns", "inode")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
SUFFIXES |= {".gif", ".avif", ".jp2", ".tga", ".dib", ".pcx"}


class Watcher:
    """The images of a folder, without those of its subfolders, and the decisions on them.

    An image is recognised by its size and time, and by its name or inode: a renamed image is not
    decided on again, but other content under an earlier name is.
    """

    def __init__(
        self, folder: Path, detector: Any, results: Path, move: Path | None = None
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder: correct the path")
        if move is not None:
            move.mkdir(parents=True, exist_ok=True)
            if move.samefile(folder) or move.stat().st_dev != folder.stat().st_dev:
                raise ValueError(f"{move}: name another folder on the disk of {folder}")
        self.folder, self.detector, self.results, self.move = folder, detector, results, move
        self.last_look: dict[str, list[str]] = {}  # name -> size, time and inode
        self.is_readable: dict[tuple[str, ...], bool] = {}  # images in the results
        self.noted = {results.suffix}
        self._resume()

    def look(self) -> None:
        """Decide on the images that have not changed since the last look."""
        before, self.last_look = self.last_look, {}
        for file in sorted(self.folder.iterdir()):
            if file.name.startswith(".") or not file.is_file():
                continue
            if file.suffix.lower() not in SUFFIXES:
                self._note(file.suffix, f"files with suffix '{file.suffix}' are ignored")
                continue
            try:
                file.open("rb").close()
                state = _state(file)
            except OSError as error:  # locked by its writer, or gone
                self._note(str(error), f"{error}; the next looks try again")
                continue
            self.last_look[file.name] = state
            keys = _keys(file.name, state)
            if before.get(file.name) == state and not any(key in self.is_readable for key in keys):
                self._decide(file, state)
            if self.move and any(self.is_readable.get(key) for key in keys):
                file.rename(_free(self.move / file.name))

    def _decide(self, file: Path, state: list[str]) -> None:
        [result] = self.detector.predict([file])
        try:
            if _state(file) != state:  # it changed while it was read
                return
        except FileNotFoundError:
            return
        score = "" if result.error else result.score
        values = (result.decision, result.p_value, score, result.error)
        row = _cleaned([file.name, *("" if value is None else value for value in values), *state])
        self._append(row)
        self._remember(row)
        print(result, flush=True)

    def _resume(self) -> None:
        """Read the results of earlier runs."""
        content, header = b"", _line(COLUMNS)
        if self.results.exists():
            content = self.results.read_bytes()
        if not content.startswith(header) and not header.startswith(content):
            raise ValueError(f"{self.results}: not a file of this program: name another file")
        end = content.rfind(b"\n") + 1
        if end < len(content):  # killed while it wrote the last row
            os.truncate(self.results, end)
        if not end:
            self._append(COLUMNS)
        for row in csv.reader(content[len(header) : end].decode().split("\n")[:-1]):
            if len(row) != len(COLUMNS):
                raise ValueError(f"{self.results}: damaged: name another file")
            self._remember(row)

    def _append(self, row: Any) -> None:
        with self.results.open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def _remember(self, row: list[str]) -> None:
        for key in _keys(row[0], row[-3:]):
            self.is_readable[key] = not row[4]

    def _note(self, subject: str, text: str) -> None:
        if subject not in self.noted:
            self.noted.add(subject)
            print(text, file=sys.stderr)


def _state(file: Path) -> list[str]:
    status = file.stat()
    return [str(status.st_size), str(status.st_mtime_ns), str(status.st_ino or file.name)]


def _keys(name: str, state: list[str]) -> list[tuple[str, ...]]:
    size, modified, inode = state
    return [(_cleaned([name])[0], size, modified), (size, modified, inode)]


def _cleaned(row: Any) -> list[str]:
    """Return texts without line ends and other characters that are not printable."""
    return ["".join(c if c.isprintable() else "?" for c in str(value)) for value in row]


def _line(row: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue().encode()


def _free(path: Path) -> Path:
    names = (path.with_stem(f"{path.stem}_{n}") for n in itertools.count(2))
    return next(each for each in itertools.chain([path], names) if not each.exists())


def main(arguments: list[str] | None = None) -> int:
    """Watch a folder until Ctrl-C; return 130 then, or 2 after a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("detector", type=Path)
    parser.add_argument("--results", type=Path, default=Path("decisions.csv"))
    parser.add_argument("--interval", type=float, default=1, help="seconds between two looks")
    parser.add_argument("--move", type=Path, metavar="DIR", help="move decided images to DIR")
    options = parser.parse_args(arguments)
    try:
        if not options.interval > 0:
            raise ValueError(f"--interval {options.interval:g}: give more than 0 seconds")
        if not (options.detector / "detector.py").is_file():
            raise FileNotFoundError(f"{options.detector}: not the folder of an exported detector")
        sys.path.insert(0, str(options.detector.resolve()))
        detector = importlib.import_module("detector").Detector(options.detector)
        watcher = Watcher(options.folder, detector, options.results, options.move)
        print(f"watching {options.folder}, writing {options.results}; Ctrl-C stops", flush=True)
        while True:
            watcher.look()
            time.sleep(options.interval)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
