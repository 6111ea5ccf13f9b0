"""Stand-ins for what the documentation's commands would download or train for hours.

Pages show the real commands. Their tests replace, at the places where the package resolves them:

- weights of the network (ImageNet's, those of open_clip's tags) by random ones of a fixed seed, in
  models with the same layers and fewer channels;
- long fits by one epoch of a few batches;
- the generated data set by a few of its images per category;
- loader processes by the process itself, and connections by an error.

``install`` patches the process itself. ``install_on_import`` does the same at the start of the
processes that commands start: it is called from a ``sitecustomize.py`` on ``PYTHONPATH``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Set = Callable[..., None]
"""``setattr``, or that of a monkeypatch."""

NUM_EPOCHS, NUM_BATCHES = 1, 3
NUM_IMAGES = {"train": 24, "test": 6}
"""Images of a category of the generated data set; those of the test per label."""


def small_networks(cnn: ModuleType, replace: Set) -> None:
    """Replace ResNets by ones of a block per stage, and ImageNet's weights by random ones."""
    import torch
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    blocks = {"resnet18": (BasicBlock, 64), "resnet34": (BasicBlock, 64)}
    blocks |= dict.fromkeys(("resnet50", "wide_resnet50_2"), (Bottleneck, 16))
    build_real = cnn._build

    def build(name: str) -> Any:
        if name not in blocks:
            return build_real(name)
        block, width = blocks[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            return ResNet(block, [1, 1, 1, 1], width_per_group=width)

    def imagenet_state(name: str) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(name).state_dict()

    replace(cnn, "_build", build)
    replace(cnn, "_imagenet_state", imagenet_state)


def small_clips(weights: ModuleType, replace: Set) -> None:
    """Replace the models of open_clip by narrow ones, and the weights of tags by random ones."""
    import torch
    from safetensors.torch import save_file

    read_real = weights.read_config

    def read_config(name: str) -> Any:
        config, preprocessing = read_real(name)
        if name != "demo" and not name.endswith(".json"):
            config["embed_dim"] = 16
            if "timm_model_name" in config["vision_cfg"]:
                small_timm_tower(config)
            else:
                config["vision_cfg"] |= {"width": 32, "head_width": 16}
            config["text_cfg"] |= {"width": 16, "heads": 2, "layers": 1}
        return config, preprocessing

    def fetch(name: str, tag: str, record: dict[str, Any]) -> Any:
        from anomaly_clip.backbones.weight_tags import TagFile

        config, _ = read_config(name)
        folder = Path(os.environ["ANOMALY_CLIP_CACHE"]) / "stand_ins"
        file = folder / f"{name}-{tag}.safetensors"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                state = weights.build(name, config).state_dict()
            save_file({key: value.contiguous() for key, value in state.items()}, file)
        return TagFile(file, bool(record.get("hf_hub")))

    replace(weights, "read_config", read_config)
    replace(weights, "fetch", fetch)


def small_timm_tower(config: dict[str, Any]) -> None:
    """Replace an image tower of timm by a narrow ViT, and a tokenizer of the hub by CLIP's."""
    from timm.models import registry, vision_transformer

    def docs_vit(pretrained: bool = False, **options: Any) -> Any:
        names = ("num_classes", "global_pool")
        given: dict[str, Any] = {name: options[name] for name in names if name in options}
        sizes: dict[str, Any] = {"embed_dim": 32, "depth": 12, "num_heads": 2}
        sizes |= {"class_token": False, "global_pool": "map"}
        sizes |= given
        model: Any = vision_transformer.VisionTransformer(**sizes)
        model.default_cfg = {}
        return model

    if not registry.is_model("docs_vit"):
        docs_vit.__module__ = vision_transformer.__name__
        registry.register_model(docs_vit)
    config["vision_cfg"] |= {"timm_model_name": "docs_vit", "timm_pool": "map"}
    config["vision_cfg"] |= {"timm_proj": "linear"}
    text = config["text_cfg"]
    text |= {"vocab_size": 49408}
    text.pop("hf_tokenizer_name", None)
    text.pop("tokenizer_kwargs", None)


def small_demo(demo: ModuleType, replace: Set) -> None:
    """List a few images per category of the generated data set."""
    list_real = demo.Demo.list_samples

    def list_samples(self: Any, category: str, split: str) -> Iterator[Any]:
        samples = list(list_real(self, category, split))
        for label in (False, True):
            yield from [s for s in samples if bool(s.label) is label][: NUM_IMAGES.get(split, 6)]

    replace(demo.Demo, "list_samples", list_samples)


def no_workers(dataset: ModuleType, replace: Set) -> None:
    """Load in the process itself."""
    number = property(lambda self: 0, lambda self, value: None)
    replace(dataset.AnomalyData, "num_workers", number, raising=False)


def short_fits(trainer: ModuleType, replace: Set) -> None:
    """End a fit of several epochs or many steps after a few batches."""
    fit_real = trainer.Trainer.fit

    def fit(self: Any, *arguments: Any, **options: Any) -> None:
        epochs, steps = self.max_epochs, self.max_steps
        if (epochs is None or epochs > NUM_EPOCHS or epochs < 0) and self.limit_train_batches:
            if steps is None or steps < 0 or epochs not in (-1, None):
                self.fit_loop.max_epochs = NUM_EPOCHS
            self.limit_train_batches = NUM_BATCHES
            if self.check_val_every_n_epoch is None:  # validation after a number of batches
                self.val_check_interval = NUM_BATCHES
            else:
                self.check_val_every_n_epoch = 1
        if steps is not None and steps > NUM_BATCHES:
            self.fit_loop.epoch_loop.max_steps = NUM_BATCHES
        fit_real(self, *arguments, **options)

    replace(trainer.Trainer, "fit", fit)


PATCHES: dict[str, Callable[[ModuleType, Set], None]] = {
    "anomaly_clip.backbones.cnn": small_networks,
    "anomaly_clip.backbones.weights": small_clips,
    "anomaly_clip.data.demo": small_demo,
    "anomaly_clip.data.dataset": no_workers,
    "lightning.pytorch.trainer.trainer": short_fits,
}


def no_network(replace: Set) -> None:
    """Refuse connections to other machines."""
    connect_real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or str(address[0]) in (
            "127.0.0.1",
            "::1",
            "localhost",
        )
        if not local:
            raise OSError(f"a test of the documentation tried to connect to {address}")
        connect_real(self, address)

    replace(socket.socket, "connect", connect)


def install(replace: Set) -> None:
    """Patch the modules in this process."""
    no_network(replace)
    for name, patch in PATCHES.items():
        patch(importlib.import_module(name), replace)


class _Finder(importlib.abc.MetaPathFinder):
    """Finder that patches modules when they are first imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                PATCHES[name](module, _replace)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _replace(target: Any, name: str, value: Any, raising: bool = True) -> None:
    setattr(target, name, value)


def install_on_import() -> None:
    """Patch the modules of this process when they are imported."""
    no_network(_replace)
    sys.meta_path.insert(0, _Finder())
