"""YAML files as people save them: encoding and syntax, checked before anything is parsed."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path

from anomaly_clip.documents import DocumentError, check_yaml_limits
from anomaly_clip.errors import UserError

__all__ = ["check_config", "read_yaml_text"]

ENCODINGS = {  # the marks of UTF-32 first, as one of them begins with a mark of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_yaml_text(file: Path, name: str) -> str:
    """Return the text of a YAML file; a byte order mark of UTF-8 is left out.

    Args:
        file: The file.
        name: What messages call it, such as ``--config mine.yaml``.

    Raises:
        UserError: If it cannot be read or is not encoded in UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror}): correct the path or its permissions"
        ) from None
    encoding = next((e for mark, e in ENCODINGS.items() if content.startswith(mark)), None)
    nulls = content.count(0)
    if encoding is None and nulls and 0.2 < nulls / len(content) <= 0.5:  # of ASCII: half
        encoding = "UTF-16"
    if encoding is not None:
        raise UserError(f"{name} is encoded in {encoding}: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8: save the "
            f"file as text in UTF-8"
        ) from None
    if nulls:
        raise UserError(f"{name} is not a text file: give a YAML file")
    return text


def check_config(file: Path, name: str) -> None:
    """Check that a file is a configuration: sections with options.

    Raises:
        UserError: If it is not; the message names the file, and the line of a mistake.
    """
    import yaml

    from anomaly_clip.commands.yaml_names import with_stand_ins

    text = read_yaml_text(file, name)
    try:
        check_yaml_limits(with_stand_ins(text))
        # Only the structure counts here; libyaml also reads JSON that is indented by tabs.
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # knows no tags, only text
        content = yaml.load(with_stand_ins(text), loader)  # noqa: S506
    except DocumentError as error:
        raise UserError(f"{name}: {error}: correct it") from None
    except RecursionError:
        raise UserError(f"{name}: it is nested too deeply: correct it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # an error of the reader has none
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{name}{line}: not valid YAML ({problem}): correct it") from None
    if content is None:
        raise UserError(f"{name} is empty: write sections such as model: and data: into it")
    if not isinstance(content, Mapping):
        kind = "a list" if isinstance(content, list) else "a single value"
        raise UserError(f"{name} holds {kind}: expected sections such as model: and data:")
    for section in ("trainer", "output"):
        value = content.get(section, {})
        is_empty = value in ("", "null", "~")
        is_file = isinstance(value, str) and value.endswith((".yaml", ".yml", ".json"))
        if isinstance(value, Mapping) or is_file or (is_empty and section == "output"):
            continue
        kind = "is empty" if is_empty else f"holds {str(value)[:60]}"
        raise UserError(f"{name}: {section} {kind}: write options below it, or remove it")
