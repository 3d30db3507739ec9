"""Every error this project raises on purpose.

InternVLTritonError
├── InvalidRequest              the caller's request is wrong (HTTP 400)
│   ├── InvalidMessages         text_input / messages: missing, malformed, not fitting the images
│   ├── InvalidSampling         an unknown key or a value out of range in sampling_parameters
│   ├── InvalidImage            not an image, truncated, or of an unsupported format
│   │   └── ImageTooLarge       more pixels or bytes than the limit
│   ├── InvalidVideo            not a video, or no frame could be decoded
│   ├── ForbiddenToken          user text spells a special token of the template
│   └── RequestTooLong          prompt + answer, or visual tokens, exceed the engine's limits
├── InvalidCheckpoint           the checkpoint is not one this project can convert
│   ├── UnsupportedCheckpoint   another architecture, by name, with the reason
│   └── IncompleteCheckpoint    a file, shard or tensor is missing
├── InvalidTensorParallel       this tp_size cannot split this model
├── UnknownModel                MODEL is neither a known name nor a directory
├── DownloadFailed              the model hub could not be reached
├── BuildFailed                 a build step failed
│   └── EngineBuildFailed       TensorRT or trtllm-build refused
├── ArtifactMismatch            artefacts are missing, stale or do not fit each other
├── ServerError                 the Triton server
│   ├── ServerStartFailed       did not become ready
│   │   └── ServerCrashed       a signal ended it: it may start the next time
│   ├── ServerFailed            failed again and again while it served
│   ├── PortInUse               another program listens there
│   ├── ServerUnavailable       cannot be reached, or went away during a request
│   ├── RequestFailed           it refused or failed this request; the message says why
│   ├── Overloaded              too many requests are waiting: try again later
│   └── RequestTimedOut         the deadline passed
└── EngineError                 the language model engine failed on a request

One class = one thing a caller would do differently. A message names what is wrong, what was given,
what is allowed and what to do; it never holds a path of the server or a traceback.
"""

__all__ = [
    "ArtifactMismatch",
    "BuildFailed",
    "DownloadFailed",
    "EngineBuildFailed",
    "EngineError",
    "ForbiddenToken",
    "ImageTooLarge",
    "IncompleteCheckpoint",
    "InternVLTritonError",
    "InvalidCheckpoint",
    "InvalidImage",
    "InvalidMessages",
    "InvalidRequest",
    "InvalidSampling",
    "InvalidTensorParallel",
    "InvalidVideo",
    "Overloaded",
    "PortInUse",
    "RequestFailed",
    "RequestTimedOut",
    "RequestTooLong",
    "ServerCrashed",
    "ServerError",
    "ServerFailed",
    "ServerStartFailed",
    "ServerUnavailable",
    "UnknownModel",
    "UnsupportedCheckpoint",
]


class InternVLTritonError(Exception):
    """Base of everything above."""


class InvalidRequest(InternVLTritonError):
    pass


class InvalidMessages(InvalidRequest):
    pass


class InvalidSampling(InvalidRequest):
    pass


class InvalidImage(InvalidRequest):
    pass


class ImageTooLarge(InvalidImage):
    pass


class InvalidVideo(InvalidRequest):
    pass


class ForbiddenToken(InvalidRequest):
    pass


class RequestTooLong(InvalidRequest):
    pass


class InvalidCheckpoint(InternVLTritonError):
    pass


class UnsupportedCheckpoint(InvalidCheckpoint):
    pass


class IncompleteCheckpoint(InvalidCheckpoint):
    pass


class InvalidTensorParallel(InternVLTritonError):
    pass


class UnknownModel(InternVLTritonError):
    pass


class DownloadFailed(InternVLTritonError):
    pass


class BuildFailed(InternVLTritonError):
    pass


class EngineBuildFailed(BuildFailed):
    pass


class ArtifactMismatch(InternVLTritonError):
    pass


class ServerError(InternVLTritonError):
    pass


class ServerStartFailed(ServerError):
    pass


class ServerCrashed(ServerStartFailed):
    pass


class ServerFailed(ServerError):
    pass


class PortInUse(ServerError):
    pass


class ServerUnavailable(ServerError):
    pass


class RequestFailed(ServerError):
    pass


class Overloaded(ServerError):
    pass


class RequestTimedOut(ServerError):
    pass


class EngineError(InternVLTritonError):
    pass
