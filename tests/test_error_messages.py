"""Error messages name the value that they complain about."""

from __future__ import annotations

from pathlib import Path

from error_messages import messages

SHARE = 0.95


def test_literal_messages_are_distinguished_from_those_with_a_value(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        'def f(x):\n    raise ValueError("no value")\n'
        'def g(x):\n    raise ValueError(f"got {x}: " "lower it")\n'
        'def h(x):\n    raise TypeError("a" + f"{x}")\n'
        'def i(x):\n    raise TypeError(f"a" "b")\n'
        'def j(x):\n    check_at_least("model.x", x, 1)\n'
        "def k():\n    raise\n"
        'def l(x):\n    return ValueError(f"{x} is odd")\n'
        "def m(x):\n    check_pixels(x)\n"
    )
    assert [message.names_value for message in messages(tmp_path)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]


def test_nearly_all_messages_name_the_value() -> None:
    values = [message.names_value for message in messages()]
    assert sum(values) / len(values) >= SHARE
