"""Parsers of the verbs that run no experiment: ``check``, ``preview`` and ``prompts``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import Namespace

import anomaly_clip.data as data_sets
from anomaly_clip.commands.configs import expand_configs
from anomaly_clip.commands.option_parser import OptionParser, import_classes
from anomaly_clip.commands.yaml_names import read_any_name
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.errors import user_errors

__all__ = ["data_parser", "parse_words", "verb_parser"]


def verb_parser(verb: str, description: str) -> OptionParser:
    """Return a parser that raises exceptions, which :func:`parse_words` explains."""
    read_any_name()
    return OptionParser(
        prog=f"anomaly_clip {verb}",
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
    )


def data_parser(verb: str, description: str) -> OptionParser:
    """Return a parser with ``--config`` and ``--data``, for a verb that reads a data set."""
    import_classes(data_sets)
    parser = verb_parser(verb, description)
    parser.add_argument("--config", action="config", help="configuration with a data section")
    parser.add_lightning_class_args(AnomalyData, "data", subclass_mode=True)
    return parser


@contextmanager
def parse_words(parser: OptionParser, words: Sequence[str]) -> Iterator[Namespace]:
    """Yield the parsed options; convert errors in parsing or the ``with`` block to ``UserError``.

    Args:
        parser: The verb's parser.
        words: The verb and its options.

    Raises:
        UserError: If the user made a mistake; see :func:`anomaly_clip.errors.user_errors`.
    """
    with user_errors(lambda: [f"--{action.dest}" for action in parser._actions]):
        yield parser.parse_args(expand_configs(words)[1:])
