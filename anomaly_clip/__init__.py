"""Visual anomaly detection with CLIP.

Importing the package is instant: nothing heavy is loaded until a submodule asks for it.
"""

__version__ = "0.1.0"
