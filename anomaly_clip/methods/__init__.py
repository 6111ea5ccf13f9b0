"""Methods of visual anomaly detection."""

from typing import TYPE_CHECKING

from anomaly_clip.lazy_names import lazy_names

if TYPE_CHECKING:
    from anomaly_clip.methods.anomaly_dino import AnomalyDINO
    from anomaly_clip.methods.april_gan import APRILGAN
    from anomaly_clip.methods.base import AnomalyMethod
    from anomaly_clip.methods.batched_anomaly_dino import BatchedAnomalyDINO
    from anomaly_clip.methods.batched_subspace_ad import BatchedSubspaceAD
    from anomaly_clip.methods.clip_ada import CLIPADA
    from anomaly_clip.methods.contrastive import Contrastive
    from anomaly_clip.methods.linear_probe import LinearProbe
    from anomaly_clip.methods.musc import MuSc
    from anomaly_clip.methods.object_agnostic import AnomalyCLIP
    from anomaly_clip.methods.padim import PaDiM
    from anomaly_clip.methods.patchcore import PatchCore
    from anomaly_clip.methods.rd4ad import RD4AD
    from anomaly_clip.methods.regad import RegAD
    from anomaly_clip.methods.sdp import SDP
    from anomaly_clip.methods.sdp_plus import SDPPlus
    from anomaly_clip.methods.simplenet import SimpleNet
    from anomaly_clip.methods.subspace_ad import SubspaceAD
    from anomaly_clip.methods.tab import TAB
    from anomaly_clip.methods.winclip import WinCLIP

__all__ = [
    "APRILGAN",
    "CLIPADA",
    "RD4AD",
    "SDP",
    "TAB",
    "AnomalyCLIP",
    "AnomalyDINO",
    "AnomalyMethod",
    "BatchedAnomalyDINO",
    "BatchedSubspaceAD",
    "Contrastive",
    "LinearProbe",
    "MuSc",
    "PaDiM",
    "PatchCore",
    "RegAD",
    "SDPPlus",
    "SimpleNet",
    "SubspaceAD",
    "WinCLIP",
]

_MODULES = {
    "anomaly_dino": ("AnomalyDINO",),
    "april_gan": ("APRILGAN",),
    "base": ("AnomalyMethod",),
    "batched_anomaly_dino": ("BatchedAnomalyDINO",),
    "batched_subspace_ad": ("BatchedSubspaceAD",),
    "clip_ada": ("CLIPADA",),
    "contrastive": ("Contrastive",),
    "linear_probe": ("LinearProbe",),
    "musc": ("MuSc",),
    "object_agnostic": ("AnomalyCLIP",),
    "padim": ("PaDiM",),
    "patchcore": ("PatchCore",),
    "rd4ad": ("RD4AD",),
    "regad": ("RegAD",),
    "sdp": ("SDP",),
    "sdp_plus": ("SDPPlus",),
    "simplenet": ("SimpleNet",),
    "subspace_ad": ("SubspaceAD",),
    "tab": ("TAB",),
    "winclip": ("WinCLIP",),
}

if not TYPE_CHECKING:  # type checkers know the names from the imports above
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
