"""Methods of visual anomaly detection."""

from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.contrastive import Contrastive
from anomaly_clip.methods.sdp import SDP

__all__ = ["SDP", "AnomalyMethod", "Contrastive"]
