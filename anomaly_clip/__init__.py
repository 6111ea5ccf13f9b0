"""Visual anomaly detection with CLIP.

Importing the package is instant: heavy dependencies are loaded by the submodules that use them.
"""

__version__ = "0.1.0"
