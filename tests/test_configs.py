"""Runs of every configuration on tiny data in the layout of its data set."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from layouts import brain_mri, btad, clinic_db, head_ct, isic, ksdd2, visa
from timm_clips import write_config, write_tokenizer

from anomaly_clip import methods
from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.cli import main
from anomaly_clip.data.info import DATASETS
from anomaly_clip.methods import SDP, AnomalyCLIP

CONFIGS = Path(__file__).parent.parent / "configs"
MAKERS: dict[str, Callable[[Path], Path]] = {
    "visa": visa,
    "btad": btad,
    "ksdd2": ksdd2,
    "isic": isic,
    "clinic_db": clinic_db,
    "head_ct": head_ct,
    "brain_mri": brain_mri,
}
SINGLE_PASS = ("PaDiM", "PatchCore", "SubspaceAD", "AnomalyDINO")
WHOLE_EPOCHS = ("Contrastive",)
ZERO_SHOT = ("SDP", "WinCLIP", "MuSc", "BatchedSubspaceAD", "BatchedAnomalyDINO")
PIXELS_ONLY, IMAGES_ONLY = ("isic", "clinic_db"), ("head_ct", "brain_mri")


@pytest.fixture
def tiny_model(tiny_clip_config: str) -> list[str]:
    name = ["--model.backbone.name", tiny_clip_config, "--model.backbone.pretrained", "random"]
    return [*name, "--model.stages", "null", "--trainer.accelerator", "cpu"]


def run(tmp_path: Path, words: list[str]) -> dict[str, dict[str, float | None]]:
    words += ["--data.num_workers", "0", "--output.root", str(tmp_path / "runs")]
    assert main(["test", *words]) == 0
    (file,) = (tmp_path / "runs").glob("*/1-*/metrics.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", MAKERS)
def test_sdp_runs_on_every_data_section(tmp_path: Path, name: str, tiny_model: list[str]) -> None:
    root = MAKERS[name](tmp_path / "data")
    files = ["--config", str(CONFIGS / "sdp.yaml")]
    files += ["--config", str(CONFIGS / "data" / f"{name}.yaml")]
    metrics = run(tmp_path, [*files, "--data.root", str(root), *tiny_model])
    image, pixel = (metrics["mean"][key] for key in ("image_auroc", "pixel_auroc"))
    assert (image is None) == (name in PIXELS_ONLY)
    assert (pixel is None) == (name in IMAGES_ONLY)


@pytest.mark.parametrize("name", ["isic", "clinic_db", "head_ct", "brain_mri"])
def test_sdp_runs_on_the_medical_sets(tmp_path: Path, name: str, tiny_model: list[str]) -> None:
    root = MAKERS[name](tmp_path / "data")
    words = ["--config", str(CONFIGS / f"sdp_{name}.yaml"), "--data.root", str(root), *tiny_model]
    metrics = run(tmp_path, words)
    section = yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text())["data"]
    assert metrics["run"]["protocol"]["data"] == section["class_path"]  # type: ignore[index]


def one_template() -> list[str]:
    return ["--model.prompts.templates", '["a {}."]', "--trainer.accelerator", "cpu"]


TINY_CLIP = ["--model.backbone.image_size", "32", "--model.layers", "null"]
AUXILIARY = {
    "sdp_plus": ["--model.stages", "null", "--model.rvs.method", "mean", *one_template()],
    "anomalyclip": [*TINY_CLIP, "--model.dense_blocks", "null"],
    "april_gan": [*TINY_CLIP, *one_template()],
}
"""Methods that are trained on another data set, by their configurations, with tiny options."""


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*_to_*.yaml")), ids=lambda f: f.stem)
def test_every_pairing_of_data_sets_fits_and_tests(
    tmp_path: Path, mvtec_root: Path, tiny_clip_config: str, file: Path
) -> None:
    makers = {**MAKERS, "mvtec": lambda root: mvtec_root}
    (method,) = (name for name in AUXILIARY if file.stem.startswith(name))
    auxiliary, _, *tested = file.stem.removeprefix(f"{method}_").split("_")
    words = ["--config", str(file), "--model.backbone.name", tiny_clip_config]
    words += ["--model.backbone.pretrained", "random", *AUXILIARY[method]]
    words += ["--trainer.accelerator", "cpu"]
    words += ["--data.root", str(makers["_".join(tested)](tmp_path / "data"))]
    words += ["--data.auxiliary.root", str(makers[auxiliary](tmp_path / "auxiliary"))]
    words += ["--data.num_workers", "0", "--output.root", str(tmp_path / "runs")]
    assert (
        main(["fit", *words, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]) == 0
    )
    (checkpoint,) = (tmp_path / "runs").glob("*/1-*/checkpoints/*.ckpt")
    again = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "tested")]
    assert main(again) == 0
    (metrics,) = (tmp_path / "tested").glob("*/1-*/metrics.json")
    protocol = json.loads(metrics.read_text())["run"]["protocol"]
    names = {"visa": "VisA", "mvtec": "MVTecAD"}
    assert (protocol["fitted"], protocol["auxiliary"]) == (True, names[auxiliary])
    trained = {"anomalyclip": "prompts.pth"}.get(method, "linear_layers.pth")
    assert (checkpoint.parent.parent / trained).is_file()


@pytest.mark.slow
def test_own_images_with_prompts_of_the_demo(tmp_path: Path, mvtec_root: Path) -> None:
    prompts = AnomalyCLIP(CLIPSettings("demo", "demo", 160)).export(tmp_path)
    words = ["--config", str(CONFIGS / "own_anomalyclip.yaml"), "--model.backbone.name", "demo"]
    words += ["--model.backbone.pretrained", "demo", "--model.backbone.image_size", "160"]
    words += ["--data.root", str(mvtec_root / "bottle" / "test"), "--trainer.accelerator", "cpu"]
    protocol = run(tmp_path, [*words, "--model.prompts_file", str(prompts)])["run"]["protocol"]
    assert protocol["borrowed"]["file"] == str(prompts)  # type: ignore[index]


@pytest.mark.parametrize("name", ["winclip", "winclip_4shot"])
def test_winclip_runs(tmp_path: Path, mvtec_root: Path, tiny_clip_config: str, name: str) -> None:
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", str(mvtec_root)]
    words += ["--model.backbone.name", tiny_clip_config, "--model.backbone.pretrained", "random"]
    if "shot" in name:
        words += ["--data.shots", "2"]  # the tiny set has few normal images
    run(tmp_path, [*words, *one_template()])
    references = list((tmp_path / "runs").glob("*/1-*/references.json"))
    assert len(references) == ("shot" in name)


@pytest.mark.parametrize(("name", "kind"), [("sdp_siglip2", "siglip"), ("sdp_pe_core", "pe_core")])
def test_plain_zero_shot_runs(tmp_path: Path, mvtec_root: Path, name: str, kind: str) -> None:
    tower = write_config(tmp_path, kind, write_tokenizer(tmp_path / "tokenizer"))
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", str(mvtec_root)]
    words += ["--model.backbone.name", tower, "--model.backbone.pretrained", "random"]
    metrics = run(tmp_path, [*words, "--model.stages", "[4]", *one_template()])
    assert metrics["mean"]["image_auroc"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["musc", "musc_b16_plus", "musc_visa", "musc_btad", "own_musc"])
def test_musc_runs(tmp_path: Path, mvtec_root: Path, tiny_clip_config: str, name: str) -> None:
    data = name.removeprefix("musc_")
    root = MAKERS[data](tmp_path / "data") if data in MAKERS else mvtec_root
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--trainer.accelerator", "cpu"]
    if name == "own_musc":
        words += ["--data.root", str(root / "bottle" / "test")]
        words += ["--model.backbone.weights", "random", "--model.grid", "4"]
    else:
        words += ["--data.root", str(root), "--model.backbone.name", tiny_clip_config]
        words += ["--model.backbone.pretrained", "random", "--model.backbone.image_size", "32"]
        words += ["--model.layers", "[1, 2]"]
    protocol = run(tmp_path, words)["run"]["protocol"]
    assert protocol["transductive"] is True  # type: ignore[index]
    expected = [1, 8, 9] if name == "musc_visa" else [1, 2, 3]
    assert protocol["k_list"] == expected  # type: ignore[index]


def test_every_known_data_set_has_a_section() -> None:
    files = sorted((CONFIGS / "data").glob("*.yaml"))
    classes = {yaml.safe_load(file.read_text())["data"]["class_path"] for file in files}
    assert classes == set(DATASETS) - {"Demo", "ImageFolder"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mvtec_leather", "MVTecAD"),
        ("magnetic_tile", "MagneticTile"),
        ("brain_mri", "BrainMRI"),
        ("head_ct", "HeadCT"),
    ],
)
def test_sdp_with_the_demo_clip_runs_on_real_images(
    tmp_path: Path, shared_data: Callable[[str], Path], name: str, kind: str
) -> None:
    words = ["--model", "SDP", "--model.backbone.name", "demo", "--data", kind]
    words += ["--model.backbone.pretrained", "demo", "--data.root", str(shared_data(name))]
    words += ["--data.batch_size", "8", "--trainer.limit_test_batches", "1"]
    metrics = run(tmp_path, words)
    assert metrics["run"]["weights"]["random"] is False  # type: ignore[index]


def test_the_category_name_goes_into_the_prompts(
    mvtec_root: Path, tiny_model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    original = SDP.text

    def text(self: SDP, category: str) -> object:
        names.append(self.words(category))
        return original(self, category)

    monkeypatch.setattr(SDP, "text", text)
    words = ["--model", "SDP", "--data", "MVTecAD", "--data.root", str(mvtec_root), *tiny_model]
    run(tmp_path, [*words, "--data.words", "{metal_nut: metal nut}"])
    assert set(names) == {"bottle", "metal nut"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_ada", "clip_ada_strong", "clip_ada_demo"])
def test_clip_ada_runs_as_configured(
    mvtec_root: Path, tmp_path: Path, name: str, tiny_clip_config: str
) -> None:
    words = ["--config", str(CONFIGS / f"{name}.yaml")]
    if name != "clip_ada_demo":
        words += ["--data.root", str(mvtec_root)]
    else:
        words += ["--data.num_train", "3", "--data.num_test", "2"]
    words += ["--model.backbone.name", tiny_clip_config, "--model.backbone.pretrained", "random"]
    words += ["--model.backbone.image_size", "32", "--model.feature_layer", "2"]
    words += ["--data.val_split", "none"]  # there are too few images to hold some out
    words += ["--model.taps", "[2, 3]", "--data.num_workers", "0", "--data.batch_size", "4"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    words += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    words += ["--trainer.log_every_n_steps", "1", "--output.root", str(tmp_path)]
    assert main(["fit", *words]) == 0
    (checkpoint,) = tmp_path.glob("*/1-*/checkpoints/last.ckpt")
    assert main(["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]) == 0


SMALL_VIT = ["--model.backbone.name", "test_vit", "--model.backbone.weights", "random"]
SMALL_VIT += ["--model.image_size", "64", "--trainer.accelerator", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["musc_dinov2", "musc_dinov3"])
@pytest.mark.parametrize("data", ["mvtec", "visa"])
def test_musc_runs_on_a_vit(tmp_path: Path, mvtec_root: Path, name: str, data: str) -> None:
    words = ["--config", str(CONFIGS / f"{name}.yaml"), *SMALL_VIT, "--model.layers", "[2, 5]"]
    root = mvtec_root if data == "mvtec" else visa(tmp_path / "data")
    words += ["--config", str(CONFIGS / "data" / "visa.yaml")] if data == "visa" else []
    protocol = run(tmp_path, [*words, "--data.root", str(root)])["run"]["protocol"]
    assert protocol["transductive"] is True  # type: ignore[index]
    assert protocol["k_list"] == ([1, 8, 9] if data == "visa" else [1, 2, 3])  # type: ignore[index]
    assert "bilinear" in protocol["resize"]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subspace_ad_batched", "anomaly_dino_batched"])
@pytest.mark.parametrize("data", ["mvtec", "visa"])
def test_batched_methods_run_as_configured(
    tmp_path: Path, mvtec_root: Path, name: str, data: str
) -> None:
    layers = "[6]" if name.startswith("anomaly_dino") else "[2, 5]"
    words = ["--config", str(CONFIGS / f"{name}.yaml"), *SMALL_VIT, "--model.layers", layers]
    root = mvtec_root if data == "mvtec" else visa(tmp_path / "data")
    words += ["--config", str(CONFIGS / "data" / "visa.yaml")] if data == "visa" else []
    protocol = run(tmp_path, [*words, "--data.root", str(root)])["run"]["protocol"]
    assert protocol["transductive"] is True  # type: ignore[index]


FEW_SHOT = ["subspace_ad", "anomaly_dino", "anomaly_dino_672"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FEW_SHOT, "patchcore_dinov2", "patchcore_dinov3"])
@pytest.mark.parametrize("data", ["mvtec", "visa"])
def test_detectors_on_a_vit_run_as_configured(
    tmp_path: Path, mvtec_root: Path, name: str, data: str
) -> None:
    layers = "[6]" if "dino_" in f"{name}_" and "patchcore" not in name else "[2, 5]"
    words = ["--config", str(CONFIGS / f"{name}.yaml"), *SMALL_VIT, "--model.layers", layers]
    root = mvtec_root if data == "mvtec" else visa(tmp_path / "data")
    if data == "visa":
        words += ["--config", str(CONFIGS / "data" / "visa.yaml")]
        words += ["--data.shots", "1"] if name in FEW_SHOT else []
    words += ["--data.root", str(root), "--data.num_workers", "0"]
    assert main(["each", *words, "--output.root", str(tmp_path / "runs")]) == 0
    (file,) = (tmp_path / "runs").glob("*/1-each/metrics.json")
    protocol = json.loads(file.read_text())["run"]["protocol"]
    assert (protocol["shots"] or None) == (1 if name in FEW_SHOT else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padim", "patchcore"])
def test_detectors_run_as_configured(mvtec_root: Path, tmp_path: Path, name: str) -> None:
    for category in ("bottle", "metal_nut"):
        good = mvtec_root / category / "train" / "good"
        first = sorted(good.iterdir())[0]
        (good / f"again{first.suffix}").write_bytes(first.read_bytes())
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", str(mvtec_root)]
    words += ["--model.backbone.weights", "random", "--data.num_workers", "0"]
    words += ["--trainer.accelerator", "cpu", "--output.root", str(tmp_path)]
    assert main(["each", *words]) == 0
    assert (tmp_path / name / "1-each" / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rd4ad", "simplenet"])
def test_trained_detectors_run_as_configured(mvtec_root: Path, tmp_path: Path, name: str) -> None:
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", str(mvtec_root)]
    words += ["--model.backbone.weights", "random", "--data.num_workers", "0"]
    words += ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.accelerator", "cpu", "--output.root", str(tmp_path)]
    assert main(["each", *words, "--data.categories", "[bottle]"]) == 0
    assert (tmp_path / name / "1-each" / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regad_4shot", "regad_8shot"])
def test_regad_runs_as_configured(mvtec_root: Path, tmp_path: Path, name: str) -> None:
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", str(mvtec_root)]
    words += ["--model.backbone.weights", "random", "--data.num_workers", "0"]
    words += ["--model.shots", "2"]  # the tiny set has few normal images
    words += ["--model.rounds", "2", "--model.image_size", "64", "--data.categories", "[bottle]"]
    words += ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.accelerator", "cpu", "--output.root", str(tmp_path)]
    assert main(["each", *words]) == 0
    assert (tmp_path / name / "1-each" / "metrics.json").is_file()


def regad_configs() -> Iterator[Path]:
    yield from sorted((Path(__file__).parent.parent / "configs").glob("regad_*shot.yaml"))


def test_the_configurations_differ_in_their_shots() -> None:
    contents = [yaml.safe_load(file.read_text()) for file in regad_configs()]
    assert [content["model"]["init_args"].pop("shots") for content in contents] == [4, 8]
    assert contents[0] == contents[1]
    assert contents[0]["model"]["init_args"]["backbone"]["mean"] == [0.0, 0.0, 0.0]


def test_every_configuration_parses(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert files
    for file in files:
        assert main(["test", "--config", str(file), "--print_config"]) == 0, file.name
    capsys.readouterr()


OPTION = re.compile(r"--((?:model|data|trainer)\.[\w.]+) (\"[^\"]*\"|[^\s,;:()]+)")


SETTING = re.escape("(output.checkpoint_every_n_steps).")
COSTS = {
    "steps": rf"A kill costs at most the last (\d+) steps of a fit {SETTING}",
    "epoch": r"A kill costs at most the last epoch of a fit, which can be resumed only from the",
    "all": r"A kill costs the whole fit, as it is a single pass over the images\.",
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_header_says_what_a_kill_costs(file: Path) -> None:
    text = file.read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    config = yaml.safe_load(text)
    name = config["model"]["class_path"].rpartition(".")[2]
    costs = {kind: match for kind, words in COSTS.items() if (match := re.search(words, header))}
    every = config.get("output", {}).get("checkpoint_every_n_steps")
    is_trained = "prompts_file" in config["model"]["init_args"]
    if is_trained or name in ZERO_SHOT:
        assert not costs
        assert every is None
        return
    (kind,) = costs
    assert kind == ("all" if name in SINGLE_PASS else "epoch" if name in WHOLE_EPOCHS else "steps")
    assert (every is None) == (kind != "steps")
    assert every is None or int(costs[kind][1]) == every


def test_needs_are_those_of_the_headers() -> None:
    """The methods in the lists below promise the same of themselves."""
    for name in methods.__all__:
        code = inspect.getsource(importlib.import_module(getattr(methods, name).__module__))
        assert ("whole_epochs=True" in code) == (name in WHOLE_EPOCHS), name


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_options_in_a_header_are_accepted(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option that a header names, with its value, is one of that configuration."""
    lines = file.read_text().splitlines()
    header = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    options = [(name, value.strip('"').rstrip(".")) for name, value in OPTION.findall(header)]
    fits = "fit" if "max_epochs" in file.read_text() or "anomaly_clip fit" in header else "test"
    words = [f"--{name}={value}" for name, value in dict(options).items() if value != "k"]
    with contextlib.suppress(SystemExit):
        assert main([fits, "--config", str(file), *words, "--print_config"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert yaml.safe_load(printed.out)["model"]
