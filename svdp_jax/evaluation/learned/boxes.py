"""Where a face detector would put its box, from landmarks: for metrics whose networks learnt on what S3FD or RetinaFace cut out.

Those detectors learnt boxes around forehead, chin and cheeks. 478 landmarks reach up the forehead; 68 end at the brows, and their box is
raised by what 478 add. How near this comes to either detector's box was not checked.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32

FOREHEAD = 0.2  # of the height from brows to chin: 0.20 +- 0.03 of 15 faces of 6 people, in photographs and videos, by MediaPipe


def detector_box(landmarks: Float32[np.ndarray, "K 2"]) -> Float[np.ndarray, " 4"]:
    """x0, y0, x1, y1."""
    (x0, y0), (x1, y1) = landmarks.min(0), landmarks.max(0)
    return np.array([x0, y0 - FOREHEAD * (y1 - y0) if len(landmarks) == 68 else y0, x1, y1])
