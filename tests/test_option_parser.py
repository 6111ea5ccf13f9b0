"""Values of options: as typed on the command line, and as read back from a saved configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jsonargparse
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from layouts import btad

import anomaly_clip.data
import anomaly_clip.methods
from anomaly_clip.cli import main
from anomaly_clip.commands.experiment import ExperimentCLI
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.commands.option_parser import OptionParser, dump_yaml
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.errors import UserError, user_errors

METHODS = [name for name in anomaly_clip.methods.__all__ if name != "AnomalyMethod"]
DATA = [
    name
    for name in anomaly_clip.data.__all__
    if isinstance(kind := getattr(anomaly_clip.data, name), type)
    and issubclass(kind, AnomalyData)
    and kind is not AnomalyData
]


class ParsingCLI(ExperimentCLI):
    """Command line that parses and builds nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*words: str, data: str = "ImageFolder", model: str = "PaDiM") -> Any:
    """Return the options of a fit as a namespace."""
    quieten()
    more = [] if data == "Demo" else ["--data.root", "x"]
    with user_errors():
        cli = ParsingCLI(["fit", "--model", model, "--data", data, *more, *words])
    return cli.config.fit


def nullable(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the options of a class, and of the settings in it, that may be null."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
    else:
        parser = OptionParser()
        names = parser.add_class_arguments(kind, fail_untyped=False)
        hints = {a.dest: getattr(a, "_typehint", None) for a in parser._actions}
        groups = {name.partition(".")[0]: None for name in hints}
        names = [name for name in hints if "." not in name and name in {*names, *groups}]
        for name, hint in hints.items():  # such as evaluator.pro_steps
            if "." in name and not name.endswith(".help") and type(None) in get_args(hint):
                yield f"{prefix}{name}"
    for name in names:
        parts = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else ()
        settings = [part for part in parts if is_dataclass(part)]
        if type(None) in parts and not settings:
            yield f"{prefix}{name}"
        for part in settings[:1]:  # options of two kinds do not go together
            yield from nullable(part, f"{prefix}{name}.")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS + DATA)
def test_every_option_that_may_be_null_accepts_null(name: str) -> None:
    is_method = name in METHODS
    key = "model" if is_method else "data"
    options = list(nullable(getattr(getattr(anomaly_clip, "methods" if is_method else key), name)))
    assert options
    words = [word for option in options for word in (f"--{key}.{option}", "null")]
    config = parse(*words, **{key: name})[key].init_args
    for option in options:
        assert config[option] is None, option


def test_null_of_the_trainer_and_of_the_output() -> None:
    config = parse("--trainer.max_time", "null", "--output.name=null", "--data.resize.size=null")
    assert (config.trainer.max_time, config.output.name) == (None, None)
    assert config.data.init_args.resize.size is None


@pytest.mark.parametrize(
    "text",
    [
        *("6E2", "1e5", "0x1F", "012", "01", "1_000", "yes", "off", "1:30", "2024-01-01", ".5"),
        *("+1", "NaN", "inf", ".inf", "part: left", "[a]", "{a: b}", "a: [", "- a", "'a"),
    ],
)
def test_a_text_is_what_was_typed(text: str) -> None:
    words = [f"--data.category={text}", "--data.group", text, f"--output.name={text}"]
    config = parse(*words, "--data.categories", f'["{text}"]')
    options = config.data.init_args
    assert (options.category, options.group, config.output.name) == (text, text, text)
    assert options.categories == [text]


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("[01, 02]", ["01", "02"]),
        ("[1e3]", ["1e3"]),
        ("[yes, no]", ["yes", "no"]),
        ("[null, ~]", ["null", "~"]),
        ("[]", []),
        ("[\"01\", 'b c', d e]", ["01", "b c", "d e"]),
        ("null", None),
    ],
)
def test_a_list_of_names_is_what_was_typed(typed: str, names: list[str] | None) -> None:
    options = parse("--data.categories", typed).data.init_args
    assert options.categories == names
    if names is not None:
        options = parse(f"--data.train_categories={typed}").data.init_args
        assert options.train_categories == names


@pytest.mark.parametrize("model", ["SDP", "WinCLIP"])
@pytest.mark.parametrize(
    ("typed", "templates"), [("reimpl", "reimpl"), ("full", "full"), ("['a {}.']", ["a {}."])]
)
def test_a_list_may_be_one_of_several_words(model: str, typed: str, templates: Any) -> None:
    for words in ([f"--model.prompts.templates={typed}"], ["--model.prompts.templates", typed]):
        assert parse(*words, model=model).model.init_args.prompts.templates == templates
    options = parse("--data.train_categories", "others").data.init_args
    assert options.train_categories == "others"
    with pytest.raises(UserError, match=r"prompts\.templates: expected list or one of 'full', "):
        parse("--model.prompts.templates", "other", model=model)


def test_names_in_prompts_are_what_was_typed() -> None:
    options = parse("--data.words", "{01: 1e3, b: no}").data.init_args
    assert options.words == {"01": "1e3", "b": "no"}
    assert parse("--data.words.01", "6E2").data.init_args.words == {"01": "6E2"}


def test_other_lists_are_read_as_yaml() -> None:
    config = parse("--model.stages=[1, 2]", "--trainer.devices", "[0, 1]", model="SDP")
    assert (config.model.init_args.stages, config.trainer.devices) == ([1, 2], [0, 1])
    options = parse("--data.synthesis.recipe=nsa", "--data.synthesis.options", "{a: [1]}")
    assert options.data.init_args.synthesis.options == {"a": [1]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.categories", "01"], "data.categories: expected list, got 1: write it as a list"),
        (["--data.categories=bottle"], r"write it as a list, such as '\[bottle\]'$"),
        (["--data.categories=[[a]]"], r"data.categories: expected str, got \['a'\]: put text in"),
        (["--data.words.a", "null"], "data.words: expected str, got null: put text in quotes"),
        (["--data.resize", "null"], "resize is null, but has settings: leave it out"),
        (["--model.evaluator=null"], "evaluator is null, but has settings: leave it out"),
        (["--model.sigma", "null"], "model.sigma: expected float, got null$"),
        (["--data.shots", "[1]"], r"data.shots: expected int, got \[1\]$"),
    ],
)
def test_mistakes_in_values(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "categories: [01, 02]",
            'data.categories: expected str, got 1: put text in quotes, .*"01"',
        ),
        ("category: 6E2", "data.category: expected str, got 600.0: put text in quotes"),
        ("category: 2024", "data.category: expected str, got 2024: put text in quotes"),
        ("categories: bottle", "data.categories: expected list, got bottle: write it as a list"),
        ("words: {01: plate}", 'data.words: 1 is no text: put it in quotes, such as "01"'),
        ("resize: null", "resize is null, but has settings: leave it out for its defaults"),
    ],
)
def test_a_file_needs_quotes(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"data:\n  class_path: ImageFolder\n  init_args:\n    root: .\n    {line}\n")
    assert main(["check", "--config", str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)


TEXTS = st.text(max_size=8) | st.text("0123456789.eE+-_:xXbofnyNaANiI~ ", max_size=6)


@given(TEXTS, TEXTS)
@example("6E2", "1e5")
@example("0x1F", "1_000")
@example("\x85", "+1")
@example("null", "0b_")
def test_what_is_saved_is_read_back(key: str, text: str) -> None:
    content = {"words": {key: text}, "list": [text], "number": 600.0, "none": None}
    saved = dump_yaml(content)
    assert yaml.safe_load(saved) == content
    assert jsonargparse.get_loader("yaml")(saved) == content


def test_ordinary_texts_are_saved_without_quotes() -> None:
    assert dump_yaml({"b": "a photo", "a": "true"}) == "b: a photo\na: 'true'\n"


@pytest.mark.slow
@pytest.mark.parametrize("category", ["6E2", "1e5", "yes", "part: left"])
def test_a_category_that_looks_like_a_number_is_tested_by_its_checkpoint(
    category: str, tmp_path: Path, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "PaDiM", "--model.backbone.name", "squeezenet1_1"]
    words += ["--model.backbone.weights", "random", "--model.layers", "[features.4.cat]"]
    words += ["--model.num_channels", "4", "--model.image_size", "64", "--data", "ImageFolder"]
    words += ["--data.root", str(mvtec_root / "bottle"), "--data.category", category]
    words += ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--output.page=false"]
    assert main(["fit", *words]) == 0
    checkpoint = "runs/PaDiM/1-fit/checkpoints/last.ckpt"
    assert main(["test", "--ckpt_path", checkpoint, "--output.page=false"]) == 0
    metrics = json.loads(next(Path("runs").glob("*/*/metrics.json")).read_text())
    assert list(metrics["categories"]) == [category]


def test_numbers_as_categories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = btad(tmp_path / "btad")
    words = ["--data", "BTAD", "--data.root", str(root), "--data.categories", "[01, 03]"]
    assert main(["preview", *words, "--file", "sheet.png"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("weights random pretrained demo", "weights does not go with pretrained"),
        ("weights random positions bicubic", "weights does not go with positions"),
        ("pretrained demo weights random", "pretrained does not go with weights"),
    ],
)
def test_options_of_two_kinds_of_settings(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the first kind would be discarded in silence."""
    pairs = iter(options.split())
    line = [word for name in pairs for word in (f"--model.backbone.{name}", next(pairs))]
    assert main(["test", "--model", "MuSc", *line, "--data", "Demo"]) == 2
    assert f"model.backbone.{message}: these options are of" in capsys.readouterr().err


def test_the_name_of_a_backbone_may_follow_options_of_its_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Otherwise the weights would be lost in silence, as every kind of backbone has a name."""
    options = ["--model.backbone.pretrained", "demo", "--model.backbone.name", "demo"]
    options += ["--model.backbone.image_size=160", "--data", "Demo", "--print_config"]
    assert main(["fit", "--model", "PaDiM", *options]) == 0
    backbone = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert [backbone[key] for key in ("name", "pretrained", "image_size")] == ["demo", "demo", 160]
