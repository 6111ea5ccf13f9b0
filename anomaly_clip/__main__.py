"""``python -m anomaly_clip`` is the same as ``anomaly_clip``."""

import sys

from anomaly_clip.cli import main

if __name__ == "__main__":
    sys.exit(main())
