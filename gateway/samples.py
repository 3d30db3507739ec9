"""GET /samples and /samples/{name}: pictures, clips and questions whose answers are known.

The page offers them where the served model is the demo model, which was trained on such pictures.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from internvl_triton.errors import InvalidRequest

__all__ = ["Samples"]

PlainName = Annotated[str, Field(pattern=r"^[^/\\]+$")]


class Turn(BaseModel):
    question: str
    answer: str


class Sample(BaseModel):
    """One conversation. images, video: names of files beside samples.json."""

    name: str
    shows: str
    images: list[PlainName]
    video: PlainName | None
    sampling_parameters: dict[str, Any]
    turns: list[Turn] = Field(min_length=1)


_LIST = TypeAdapter(list[Sample])


class Samples:
    """Raises InvalidRequest for a directory without a samples.json, or without a file it names."""

    def __init__(self, directory: Path) -> None:
        listing = directory / "samples.json"
        try:
            samples = _LIST.validate_json(listing.read_bytes())
        except (OSError, ValidationError) as error:
            raise InvalidRequest(f"the list of samples, {listing}, is unusable: {error}") from error
        self._listing = _LIST.dump_json(samples)
        names = {name for sample in samples for name in (*sample.images, sample.video) if name}
        self._files = {name: directory / name for name in names}
        for file in self._files.values():
            if not file.is_file():
                raise InvalidRequest(f"{listing} names {file.name}, which is not there")

    async def list(self, request: Request) -> Response:
        return Response(self._listing, media_type="application/json")

    async def file(self, request: Request) -> Response:
        file = self._files.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        media_type, _ = mimetypes.guess_type(file.name, strict=False)
        return FileResponse(
            file,
            media_type=media_type or "application/octet-stream",
            headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"},
        )
