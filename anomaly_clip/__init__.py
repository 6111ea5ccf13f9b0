"""Visual anomaly detection with CLIP.

    import anomaly_clip

    detector = anomaly_clip.load("runs/own_patchcore/1-fit")
    detector.predict("photo.jpg").decision

Importing the package is instant: heavy dependencies are loaded by the submodules that use them, at
the first use of a name of this module.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from anomaly_clip import backbones, data, decisions, methods, metrics, synthesis, testing
    from anomaly_clip.data import (
        BTAD,
        ISIC,
        KSDD2,
        AnomalyData,
        BrainMRI,
        CVCClinicDB,
        Demo,
        HeadCT,
        ImageFolder,
        IndustrialFolders,
        MagneticTile,
        MetaJSON,
        MixedWM38,
        MVTecAD,
        MVTecAD2,
        RealIAD,
        Resize,
        VisA,
    )
    from anomaly_clip.decisions.calibration import Calibration
    from anomaly_clip.detector import Detector
    from anomaly_clip.fitting import fit
    from anomaly_clip.methods import (
        APRILGAN,
        CLIPADA,
        RD4AD,
        SDP,
        TAB,
        AnomalyCLIP,
        AnomalyDINO,
        AnomalyMethod,
        BatchedAnomalyDINO,
        BatchedSubspaceAD,
        Contrastive,
        LinearProbe,
        MuSc,
        PaDiM,
        PatchCore,
        RegAD,
        SDPPlus,
        SimpleNet,
        SubspaceAD,
        WinCLIP,
    )
    from anomaly_clip.prediction import Prediction
    from anomaly_clip.recording.writer import RunWriter
    from anomaly_clip.reporting.report import report
    from anomaly_clip.sources import load

__all__ = [
    "APRILGAN",
    "BTAD",
    "CLIPADA",
    "ISIC",
    "KSDD2",
    "RD4AD",
    "SDP",
    "TAB",
    "AnomalyCLIP",
    "AnomalyDINO",
    "AnomalyData",
    "AnomalyMethod",
    "BatchedAnomalyDINO",
    "BatchedSubspaceAD",
    "BrainMRI",
    "CVCClinicDB",
    "Calibration",
    "Contrastive",
    "Demo",
    "Detector",
    "HeadCT",
    "ImageFolder",
    "IndustrialFolders",
    "LinearProbe",
    "MVTecAD",
    "MVTecAD2",
    "MagneticTile",
    "MetaJSON",
    "MixedWM38",
    "MuSc",
    "PaDiM",
    "PatchCore",
    "Prediction",
    "RealIAD",
    "RegAD",
    "Resize",
    "RunWriter",
    "SDPPlus",
    "SimpleNet",
    "SubspaceAD",
    "VisA",
    "WinCLIP",
    "__version__",
    "backbones",
    "data",
    "decisions",
    "fit",
    "load",
    "methods",
    "metrics",
    "report",
    "synthesis",
    "testing",
]

_PACKAGES = ("backbones", "data", "decisions", "methods", "metrics", "synthesis", "testing")
_MODULES = {
    "Calibration": "decisions.calibration",
    "Detector": "detector",
    "Prediction": "prediction",
    "RunWriter": "recording.writer",
    "fit": "fitting",
    "load": "sources",
    "report": "reporting.report",
    **dict.fromkeys(("CLIPADA", "RD4AD", "SDP", "TAB", "AnomalyMethod", "Contrastive"), "methods"),
    **dict.fromkeys(("LinearProbe", "PaDiM", "PatchCore", "RegAD", "SDPPlus"), "methods"),
    **dict.fromkeys(("APRILGAN", "AnomalyCLIP", "AnomalyDINO", "MuSc"), "methods"),
    **dict.fromkeys(("SimpleNet", "SubspaceAD", "WinCLIP"), "methods"),
    **dict.fromkeys(("BatchedAnomalyDINO", "BatchedSubspaceAD"), "methods"),
}
"""Module of each name; those of data sets are in ``data``."""


if not TYPE_CHECKING:  # type checkers know the names from the imports above

    def __getattr__(name: str) -> object:
        """Import a name of ``__all__`` at its first use."""
        import importlib
        import sys

        # jsonargparse writes the shortest path of a class into configurations and checkpoints,
        # where earlier versions and --resume expect anomaly_clip.methods and anomaly_clip.data.
        if name not in __all__ or sys._getframe(1).f_code.co_name == "get_import_path":
            # Python names a similar attribute of the object below the traceback.
            error = f"module 'anomaly_clip' has no attribute {name!r}"
            raise AttributeError(error, name=name, obj=sys.modules[__name__])
        if name in _PACKAGES:
            return importlib.import_module(f"anomaly_clip.{name}")
        module = importlib.import_module(f"anomaly_clip.{_MODULES.get(name, 'data')}")
        return getattr(module, name)  # not kept as an attribute, which jsonargparse would find

    def __dir__() -> list[str]:
        """Return the names that exist, for completion."""
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
