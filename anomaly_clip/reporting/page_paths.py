"""Names in place of absolute paths, for a page that is given away.

A path tells the name of a user and the folders of a machine or a customer. ``report.html`` is made
to be shared, so it shows only the last part of an absolute path, or the path relative to the run's
folder. The other files of the run keep the whole paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from anomaly_clip.reporting.image_table import common_folder
from anomaly_clip.results.run_files import RunFiles

__all__ = ["PathNames", "without_folders"]

MAX_PARSED = 200_000
"""Number of characters above which a configuration is not parsed, but searched for paths."""
IN_TEXT = re.compile(
    r"(?<![\w.:/\\~<}*-])(?:file://)?"
    r"(?:~[\w.-]*|\.\.|[A-Za-z]:|(?:\\\\[\w.-]+))?(?:[\\/](?:\.\.|[\w.@+~-]+))+[\\/]?"
)
"""An absolute path in a text, or one that leaves the working folder, without blanks."""
SIMPLE = re.compile(r"[\w./@+-]+")
"""A value that needs no quotes in YAML."""


class PathNames:
    """Replaces the absolute paths of a run by names.

    Args:
        folder: The run's folder; paths in it are shown relative to it.
        paths: Further absolute paths that texts may mention, also with blanks.
    """

    def __init__(self, folder: Path, paths: Iterable[str] = ()) -> None:
        self.folder = PurePath(folder.resolve())
        self._paths: re.Pattern[str] | None = None  # until all are known
        names = {str(Path.home()): "~", str(Path.cwd()): "."}
        names |= {str(folder): folder.name, str(self.folder): self.folder.name}
        for path in paths:
            if _leaves(path) and path.rstrip("/\\"):
                names.setdefault(path.rstrip("/\\"), self.value(path))
        longest = sorted((path for path in names if _leaves(path)), key=len, reverse=True)
        parts = [re.escape(path) for path in longest if len(path) > 1]
        ends = r"(?![\w.-])"
        self._names = names
        self._paths = re.compile(rf"(?<![\w.~-])(?:{'|'.join(parts)}){ends}") if parts else None

    def value(self, text: str) -> str:
        """Return a value that is a path, or a text with paths in it, without folders.

        Example:
            >>> from pathlib import Path
            >>> from anomaly_clip.reporting.page_paths import PathNames
            >>> names = PathNames(Path("/runs/sdp/1-test"))
            >>> names.value("/data/jane doe/photos"), names.value("openai"), names.value("a/b.png")
            ('photos', 'openai', 'a/b.png')
            >>> names.value("/runs/sdp/1-test/maps"), names.value("lost: /data/x/a.png")
            ('maps', 'lost: a.png')
        """
        if not _leaves(text) or "\n" in text:
            return self.text(text)
        path = _pure(text.removeprefix("file://"))
        if path.is_relative_to(self.folder):
            return path.relative_to(self.folder).as_posix()
        if path == PurePath(Path.home()):
            return "~"
        return path.name or path.drive or text

    def text(self, text: str) -> str:
        """Return a text in which paths are replaced by their last part."""
        if self._paths is not None:
            text = self._paths.sub(lambda match: self._names[match[0]], text)
        return IN_TEXT.sub(_last_part, text)

    def record(self, value: Any) -> Any:
        """Return a record of a run, in which all texts are replaced, keys included."""
        if isinstance(value, str):
            return self.value(value)
        if isinstance(value, Mapping):
            return {
                self.value(k) if isinstance(k, str) else k: self.record(v) for k, v in value.items()
            }
        return [self.record(entry) for entry in value] if isinstance(value, list) else value

    def configuration(self, text: str) -> str:
        """Return a configuration, as YAML, in which paths are replaced."""
        parts, end = [], 0
        for start, stop, value in _scalars(text):
            shown = self.value(value)
            if shown != value:
                quoted = "'" + shown.replace("'", "''") + "'"
                parts += [text[end:start], shown if SIMPLE.fullmatch(shown) else quoted]
                end = stop
        return self.text("".join([*parts, text[end:]]))


def without_folders(files: RunFiles) -> RunFiles:
    """Return the files of a run without absolute paths, except for those of the images.

    The table of images and the gallery are linked by the images' paths, which
    :func:`~.image_table.build_image_table` shortens.
    """
    paths = [*_strings(dict(files.run))]
    for text in files.configs.values():
        paths += [value for _, _, value in _scalars(text)]
    paths.append(common_folder([row.path for row in files.rows]))
    names = PathNames(files.folder, dict.fromkeys(paths))
    decisions = files.decisions
    if decisions is not None:
        categories = {
            name: replace(entry, sentence=names.text(entry.sentence))
            for name, entry in decisions.categories.items()
        }
        decisions = replace(decisions, source=names.value(decisions.source), categories=categories)
    return replace(
        files,
        run=names.record(files.run),
        warnings=[names.text(warning) for warning in files.warnings],
        rows=[
            row._replace(error=names.text(row.error)) if row.error else row for row in files.rows
        ],
        configs={name: names.configuration(text) for name, text in files.configs.items()},
        decisions=decisions,
    )


def _leaves(text: str) -> bool:
    """Return whether a text is a path that names folders outside of the working folder."""
    starts = ("/", "~", "../", "..\\", "\\\\", "file://")
    return text.startswith(starts) or bool(re.match(r"[A-Za-z]:[\\/]", text))


def _pure(text: str) -> PurePath:
    """Return a path of this machine or of another, whose separators may differ."""
    is_windows = bool(re.match(r"[A-Za-z]:[\\/]|\\\\|\.\.\\", text))
    return PureWindowsPath(text) if is_windows else PurePosixPath(text)


def _last_part(match: re.Match[str]) -> str:
    text = match[0]
    parts = [part for part in re.split(r"[\\/]", text.removeprefix("file://")) if part]
    is_short = text.startswith(("/", "\\")) and len(parts) < 2  # "/m" is no path
    return text if is_short or not parts else parts[-1]


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(entry)


def _scalars(text: str) -> Sequence[tuple[int, int, str]]:
    """Return start, end and value of each scalar of a YAML text; none if it is not valid."""
    if len(text) > MAX_PARSED:
        return []
    try:
        return [
            (token.start_mark.index, token.end_mark.index, token.value)
            for token in yaml.scan(text, Loader=yaml.SafeLoader)
            if isinstance(token, yaml.ScalarToken)
            and token.style not in ("|", ">")
            and _leaves(token.value)
        ]
    except yaml.YAMLError:
        return []
