"""Entry point of the command line: dispatches to the module of a verb.

Heavy libraries are imported only with the module of the requested verb.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from anomaly_clip import __version__
from anomaly_clip.cache_files import forget_warnings
from anomaly_clip.errors import shortened
from anomaly_clip.files import ESCAPING, printable

__all__ = ["main"]

VERBS = {
    "fit": ("fit a method", "commands.experiment:run_experiment"),
    "validate": ("compute metrics on the validation split", "commands.experiment:run_experiment"),
    "test": ("compute metrics on the test split", "commands.experiment:run_experiment"),
    "predict": ("score images and draw heat maps", "commands.experiment:run_experiment"),
    "calibrate": (
        "derive thresholds with a bounded rate of false alarms from normal images",
        "commands.calibrate:run_calibrate",
    ),
    "each": ("fit and test one model per category", "commands.each:run_each"),
    "compare": (
        "test one detector with several backbone weights and compare the results",
        "commands.compare:run_compare",
    ),
    "sweep": ("run the fits of a W&B sweep file on this machine", "commands.sweep:run_sweep"),
    "report": (
        "compare runs with each other and with published results, or repeat them",
        "commands.report:run_report",
    ),
    "export": (
        "write a detector for machines without PyTorch, or trained weights",
        "commands.export:run_export",
    ),
    "benchmark": (
        "measure time, memory and differences of the runtimes of a detector",
        "commands.benchmark:run_benchmark",
    ),
    "check": ("check a data set for problems", "commands.check:run_check"),
    "prompts": ("show the effect of each prompt of a category", "commands.prompts:run_prompts"),
    "preview": ("draw a contact sheet of a data set", "commands.preview:run_preview"),
    "configs": ("list the configurations of the package", "commands.configs:run_configs"),
}
"""Help line and entry point (``module:function`` of this package) of each verb."""

WITHOUT_CLASSES = ("configs", "sweep", "prompts")
"""Verbs whose command line names no classes. That of each run of a sweep does."""
USAGE_ERROR = 2
STDERR = 2
"""File descriptor of standard error."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Variable with which torch asks Linux for large pages, which spares a CPU most page faults."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        args: Arguments after ``anomaly_clip``; default: ``sys.argv``.

    Returns:
        0: success. 1: some images could not be read, a check found a problem, some runs failed, or
        a repeated run has other metrics.
        2: a user error, printed on one line. 3: predict found an anomalous image, and
        ``output.fail_on`` asks for this code. 128 + signal: interrupted by a signal (Ctrl-C: 130,
        SIGTERM: 143, SIGHUP: 129).
    """
    from anomaly_clip.commands.interruption import (
        Interrupted,
        advise,
        end_with_parent,
        handle_signals,
    )

    forget_warnings()
    os.environ.setdefault(HUGE_PAGES, "1")  # read by torch with its first tensor
    words = list(sys.argv[1:] if args is None else args)
    with _own_stderr(), _any_text_printed(), _quiet_pipes(), _short_warnings():
        try:
            with handle_signals(), advise():  # also during the import of libraries
                end_with_parent()
                return _answer(words)
        except Interrupted as interruption:
            return _complain(str(interruption), 128 + interruption.number)
        except SystemExit as error:  # argparse after a help text
            return error.code if isinstance(error.code, int) else int(error.code is not None)


@contextmanager
def _own_stderr() -> Iterator[None]:
    """Print Python's messages to a copy of standard error.

    Lines of C libraries go to standard error itself, which is redirected while images are decoded.
    """
    before = sys.stderr
    try:
        is_standard = isinstance(before, io.TextIOWrapper) and before.fileno() == STDERR
        copy = os.dup(STDERR) if is_standard else None
    except (OSError, ValueError):  # closed
        copy = None
    if copy is None:
        yield
        return
    before.flush()
    stream = os.fdopen(
        copy, "w", encoding=before.encoding, errors=before.errors, buffering=1, newline=None
    )
    sys.stderr = stream
    try:
        yield
    finally:
        if sys.stderr is stream:
            sys.stderr = before
        with suppress(OSError, ValueError):
            stream.flush()


@contextmanager
def _any_text_printed() -> Iterator[None]:
    """Print what a terminal's encoding lacks as escapes: names of files need not be UTF-8."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [(stream, stream.errors or "strict") for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=ESCAPING)
    try:
        yield
    finally:
        for stream, errors in before:
            if not stream.closed:
                stream.reconfigure(errors=errors)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings of this package as one line, without the place in its code."""
    long = warnings.formatwarning
    package = Path(__file__).parent

    def short(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if Path(filename).is_relative_to(package):
            return f"anomaly_clip: warning: {message}\n"
        return long(message, category, filename, lineno, line)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = long


class _QuietPipe(io.TextIOWrapper):
    """Output into a pipe that its reader may close, as ``head`` does; the rest is then dropped."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # also for what is still in a buffer
        os.close(nowhere)


@contextmanager
def _quiet_pipes() -> Iterator[None]:
    """Run to the end even if nobody reads the output any more."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    pipes: list[_QuietPipe] = []
    for name, stream in before.items():
        if isinstance(stream, io.TextIOWrapper) and _is_pipe(stream):
            by_lines = stream.line_buffering or name == "stderr"
            pipe = _QuietPipe(
                stream.buffer, stream.encoding, stream.errors, line_buffering=by_lines
            )
            pipes.append(pipe)
            setattr(sys, name, pipe)
    try:
        yield
    finally:
        for pipe in pipes:
            pipe.flush()
            pipe.detach()  # or the stream below would be closed with it
        for name, stream in before.items():
            setattr(sys, name, stream)


def _is_pipe(stream: io.TextIOWrapper) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # no file below, or a closed one
        return False


def _answer(words: list[str]) -> int:
    with_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        print(f"anomaly_clip {__version__}")
        return 0
    if words[0] in ("--complete", "--print_completion"):
        return _completion(words)
    verb = words[0]
    if verb not in VERBS:
        return _complain(_unknown_verb(verb))
    from anomaly_clip.commands.verb_help import asks_for_help

    if asks_for_help(words):
        return _help_of_verb(words)
    if verb != "configs" and (sys.stderr.isatty() or {"-h", "--help"} & set(words)):
        print("loading ...", file=sys.stderr)  # the libraries take some seconds
    from anomaly_clip.commands.process_cause import ProcessFailure
    from anomaly_clip.commands.process_failure import let_first_process_report
    from anomaly_clip.errors import UserError, explain, is_of_users_code

    try:
        if verb not in WITHOUT_CLASSES:
            from anomaly_clip.commands.working_folder import import_named_classes

            with _no_collection():
                import_named_classes(words)
        return _run(words)
    except ProcessFailure as failure:
        return failure.report(with_traceback)
    except (UserError, OSError) as error:  # such as a full disk
        if let_first_process_report():
            return USAGE_ERROR
        trace = error.__traceback__
        for _ in range(3):  # this function, _run, and the function of the verb
            trace = trace and trace.tb_next
        if with_traceback or (isinstance(error, OSError) and is_of_users_code(error, trace)):
            raise
        return _complain(str(error) if isinstance(error, UserError) else explain(error))


def _completion(words: list[str]) -> int:
    """Print the script of a shell, or the words that the script asks for."""
    from anomaly_clip.commands.completion import complete, completion_script
    from anomaly_clip.errors import UserError

    if words[0] == "--complete":
        place, *line = words[1:] or ["0"]
        answers = complete(int(place), line, list(VERBS)) if place.isdecimal() else []
        print("\n".join(answers), end="\n" if answers else "")
        return 0
    try:
        print(completion_script("".join(words[1:2])))
    except UserError as error:
        return _complain(str(error))
    return 0


def _help_of_verb(words: list[str]) -> int:
    from anomaly_clip.commands.verb_help import show_help
    from anomaly_clip.errors import UserError

    try:
        return show_help(words)
    except UserError as error:
        return _complain(str(error))


def _run(words: list[str]) -> int:
    module, _, name = VERBS[words[0]][1].partition(":")
    with _no_collection():
        run: Callable[[Sequence[str]], int] = getattr(
            importlib.import_module(f"anomaly_clip.{module}"), name
        )
    return run(words)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage during an import: all is kept, and looking for it takes a tenth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (line, _) in VERBS.items())
    return f"""usage: anomaly_clip VERB --config NAME-or-FILE [--config ANOTHER] [--KEY VALUE ...]

Visual anomaly detection with CLIP.

verbs:
{verbs}

  anomaly_clip VERB --help        show all options of a verb
  anomaly_clip --version          show the version
  --traceback                     show the traceback of an error
  --print_completion SHELL        print the completion script of bash, zsh or fish

examples:
  anomaly_clip test --config sdp --data.root /data/mvtec_ad
  anomaly_clip predict --config own_images --data.root photos --data.category plank
  anomaly_clip check --data VisA --data.root /data/visa
  anomaly_clip preview --data Demo"""


def _unknown_verb(verb: str) -> str:
    if verb.startswith("-"):
        return f"{verb}: expected a verb first ({', '.join(VERBS)}); see anomaly_clip --help"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
    return f"unknown verb {verb!r}: {hint}"


def _complain(message: str, code: int = USAGE_ERROR) -> int:
    print(f"anomaly_clip: {shortened(printable(message))}", file=sys.stderr)
    return code
