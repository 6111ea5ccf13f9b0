"""A web service around a detector: send an image, get its decision.

    pip install fastapi uvicorn
    DETECTOR=exported/folder uvicorn --factory service:create_app
    curl --data-binary @photo.jpg localhost:8000/images/photo.jpg

README.md tells why it is FastAPI rather than LitServe.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

MAX_BYTES = 64 * 2**20  # of a request; larger ones are refused


def create_app() -> FastAPI:
    """Return the service of the detector in the folder that the variable DETECTOR names."""
    detector = load(os.environ.get("DETECTOR", "detector"))
    app = FastAPI(title=f"Anomalies of {detector.category}")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "category": detector.category}

    @app.post("/images/{name}")
    async def decide(name: str, request: Request, overlay: bool = False) -> Any:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the file itself (curl --data-binary), not a form")
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BYTES:
                raise HTTPException(413, f"{name}: larger than {MAX_BYTES} bytes")
        # In a thread: other requests are received, and images decoded, at the same time.
        return await run_in_threadpool(answer, detector, name, bytes(content), overlay)

    return app


def load(folder: str) -> Any:
    """Return the detector of an exported folder, or of a run if anomaly_clip is installed."""
    if not Path(folder).exists():
        sys.exit(f"DETECTOR={folder}: there is no such folder: set the variable DETECTOR")
    if (Path(folder) / "detector.py").is_file():
        sys.path.insert(0, str(Path(folder).resolve()))
        return importlib.import_module("detector").Detector(folder)
    return importlib.import_module("anomaly_clip").load(folder)


def answer(detector: Any, name: str, content: bytes, overlay: bool) -> Any:
    """Return the decision on an image, or its drawing as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        # As a file, an image is read by the same rules as everywhere. Its suffix matters for camera
        # raw files and for formats without a signature.
        suffix = "".join(filter(str.isalnum, Path(name).suffix))
        file = Path(folder, f"image.{suffix}")
        file.write_bytes(content)
        try:
            result = detector.predict(str(file))
        except ValueError as error:
            raise HTTPException(400, str(error).replace(str(file), name)) from None
        if overlay:
            drawing = Path(folder, "overlay.png")
            result.overlay().save(drawing)
            return Response(drawing.read_bytes(), media_type="image/png")
    names = ("decision", "p_value", "score")
    guarantee = None if result.decision is None else detector.guarantee()
    return {name: getattr(result, name) for name in names} | {"guarantee": guarantee}
