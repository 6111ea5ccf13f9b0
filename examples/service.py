"""A web service around an exported detector: send an image, get its decision. See README.md.

Start it with ``DETECTOR=exported/folder uvicorn --factory service:create_app``.
"""

import importlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

MAX_BYTES = 64 * 2**20  # of an image


def create_app() -> FastAPI:
    """Return the service of the detector in the folder that the variable DETECTOR names."""
    folder = Path(os.environ.get("DETECTOR", "detector")).resolve()
    if not (folder / "detector.py").is_file():
        sys.exit(f"{folder}: not an exported detector: set the variable DETECTOR to its folder")
    sys.path.insert(0, str(folder))
    detector = importlib.import_module("detector").Detector(folder)
    app = FastAPI(title=f"Anomalies of {detector.category}")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "category": detector.category}

    @app.post("/images/{name}")
    async def decide(name: str, request: Request, overlay: bool = False) -> Any:
        if int(request.headers.get("content-length", MAX_BYTES + 1)) > MAX_BYTES:
            raise HTTPException(413, f"{name}: larger than {MAX_BYTES} bytes, or of unknown size")
        return await run_in_threadpool(answer, detector, name, await request.body(), overlay)

    return app


def answer(detector: Any, name: str, content: bytes, overlay: bool) -> Any:
    """Return the decision on an image, or its drawing as PNG; threads call this."""
    with tempfile.TemporaryDirectory() as folder:  # a file, as its suffix tells raw files
        file = Path(folder, "image." + "".join(filter(str.isalnum, Path(name).suffix[:9])))
        file.write_bytes(content)
        try:
            result = detector.predict(file)
        except ValueError as error:
            raise HTTPException(400, str(error).replace(str(file), name)) from None
        if overlay:
            result.overlay().save(drawing := io.BytesIO(), "PNG")
            return Response(drawing.getvalue(), media_type="image/png")
    decision = {each: getattr(result, each) for each in ("decision", "p_value", "score")}
    return decision | {"guarantee": detector.guarantee() if result.decision else None}
