"""The front door: answers at once what needs no library, and hands experiments on.

Nothing heavy is imported here; ``anomaly_clip.experiment`` is, when a verb needs it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from anomaly_clip import __version__

__all__ = ["main"]

VERBS = {
    "fit": "fit a method",
    "validate": "compute figures on the validation split",
    "test": "compute figures on the test split",
    "predict": "score images and draw heat maps",
    "each": "fit and test one model a category, one table of all",
    "compare": "one detector with the weights of several backbones, side by side",
    "sweep": "fit with all options of a W&B sweep file, one table of all",
    "report": "figures of runs side by side, or beside published ones",
    "export": "write the weights of a checkpoint for others",
    "check": "say what is wrong with a data set",
    "prompts": "show what the sentences about a category do",
    "preview": "draw a contact sheet of a data set",
}

USAGE_ERROR = 2
INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        args: The words behind ``anomaly_clip``; default: those of this process.

    Returns:
        0: done. 1: a check found something wrong. 2: a mistake of the user's, said in one line.
        130: interrupted.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        return _answer(words)
    except KeyboardInterrupt:  # which may come while libraries are imported, too
        return _complain("interrupted", INTERRUPTED)


def _answer(words: list[str]) -> int:
    with_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        print(f"anomaly_clip {__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        return _complain(_unknown_verb(verb))
    if sys.stderr.isatty() or {"-h", "--help"} & set(words):
        print("loading ...", file=sys.stderr)  # the libraries take some seconds
    from anomaly_clip.errors import UserError

    try:
        return _run(words)
    except UserError as error:
        if with_traceback:
            raise
        return _complain(str(error))
    except SystemExit as error:  # argparse after a help text, Lightning after Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            return _complain("interrupted", INTERRUPTED)
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def _run(words: list[str]) -> int:
    if words[0] == "preview":
        from anomaly_clip.report.preview import run_preview

        return run_preview(words)
    if words[0] == "prompts":
        from anomaly_clip.report.words import run_prompts

        return run_prompts(words)
    if words[0] == "check":
        from anomaly_clip.report.checks import run_check

        return run_check(words)
    if words[0] == "each":
        from anomaly_clip.each import run_each

        return run_each(words)
    if words[0] == "compare":
        from anomaly_clip.compare import run_compare

        return run_compare(words)
    if words[0] == "sweep":
        from anomaly_clip.sweep import run_sweep

        return run_sweep(words)
    if words[0] == "report":
        from anomaly_clip.report.overview import run_report

        return run_report(words)
    if words[0] == "export":
        from anomaly_clip.export import run_export

        return run_export(words)
    from anomaly_clip.experiment import run_experiment

    return run_experiment(words)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return f"""usage: anomaly_clip VERB --config FILE [--config FILE2] [--KEY VALUE ...]

Visual anomaly detection with CLIP.

verbs:
{verbs}

  anomaly_clip VERB --help        all options of a verb
  anomaly_clip --version
  --traceback                     show where in the code an error was raised

examples:
  anomaly_clip test --config configs/sdp.yaml --data.root /data/mvtec_ad
  anomaly_clip predict --config configs/own_images.yaml --data.root photos --data.category plank
  anomaly_clip check --data VisA --data.root /data/visa
  anomaly_clip preview --data Demo"""


def _unknown_verb(verb: str) -> str:
    if verb.startswith("-"):
        return f"{verb}: expected a verb first ({', '.join(VERBS)}); see anomaly_clip --help"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
    return f"unknown verb {verb!r}: {hint}"


def _complain(sentence: str, code: int = USAGE_ERROR) -> int:
    print(f"anomaly_clip: {sentence}", file=sys.stderr)
    return code
