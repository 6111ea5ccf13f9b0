"""Compare methods on generated photographs with Lightning's trainer, without the command line.

``python compare_methods.py`` prints a table and writes ``comparison.html``. It needs no data and no
network: PaDiM and PatchCore have random weights here, and SDP the small CLIP of the package.
"""

from __future__ import annotations

from lightning import Trainer

import anomaly_clip
from anomaly_clip import SDP, AnomalyMethod, Demo, PaDiM, PatchCore, RunWriter
from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings


def photographs() -> Demo:
    """Return the data, which each method resizes as it needs."""
    return Demo(categories=["brass washer"], num_train=20, num_test=20)


def main() -> None:
    """Fit and test each method, and print the table of their metrics."""
    random = CNNSettings("resnet18", "random")  # "imagenet" for results that mean something
    methods: list[AnomalyMethod] = [
        SDP(CLIPSettings(pretrained="demo", image_size=160)),
        PaDiM(random, image_size=128),
        PatchCore(random, image_size=128, coreset=0.05),
    ]
    folders = []
    for method in methods:
        writer = RunWriter("runs", type(method).__name__)
        trainer = Trainer(
            max_epochs=1, logger=False, enable_model_summary=False, callbacks=[writer]
        )
        if method.can_be_fitted:
            trainer.fit(method, datamodule=photographs())
        trainer.test(method, datamodule=photographs(), verbose=False)
        folders.append(writer.folder)
    print(anomaly_clip.report(*folders, html="comparison.html"))


if __name__ == "__main__":
    main()
