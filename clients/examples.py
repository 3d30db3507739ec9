"""The examples of the InternVL2.5 model card, asked of the running service.

python -m clients.examples                        all of them
python -m clients.examples combined-images        one
"""

from __future__ import annotations

import argparse
import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.chat import read_file
from clients.chat_session import ChatSession
from internvl_triton.client import Answer, Client
from internvl_triton.errors import RequestFailed, ServerUnavailable
from internvl_triton.program import program

__all__ = ["EXAMPLES", "Setting"]

SAMPLES = Path(__file__).resolve().parents[1] / "demo" / "samples"
IMAGES = (SAMPLES / "wide.jpg", SAMPLES / "tall.jpg")
VIDEO = SAMPLES / "moving-circle.mp4"


@dataclass(frozen=True)
class Setting:
    """What the examples talk to and about: two pictures and a clip, as encoded files."""

    client: Client
    http_url: str
    images: Sequence[bytes]
    video: bytes
    sampling: dict[str, Any] = field(default_factory=dict)

    def session(self, **sampling: Any) -> ChatSession:
        return ChatSession(self.client, **{**self.sampling, **sampling})

    def ask(self, question: str, *images: bytes, **sampling: Any) -> Answer:
        return self.client.generate(question, images=images, **{**self.sampling, **sampling})


def pure_text(given: Setting) -> list[str]:
    chat = given.session()
    return [
        show(question, chat.ask(question).text)
        for question in ("Hello, who are you?", "Can you tell me a story?")
    ]


def single_image(given: Setting) -> list[str]:
    question = "<image>\nPlease describe the image shortly."
    return [show(question, given.ask(question, given.images[0]).text)]


def single_image_turns(given: Setting) -> list[str]:
    chat = given.session()
    question = "<image>\nPlease describe the image in detail."
    first = show(question, chat.ask(question, images=given.images[:1]).text)
    question = "Please write a poem according to the image."
    return [first, show(question, chat.ask(question).text)]


def combined_images(given: Setting) -> list[str]:
    """One `<image>` for two pictures: the tiles of both stand there, one after the other."""
    return _two_images(given, "<image>\nDescribe the two images in detail.")


def separate_images(given: Setting) -> list[str]:
    return _two_images(
        given, "Image-1: <image>\nImage-2: <image>\nDescribe the two images in detail."
    )


def _two_images(given: Setting, question: str) -> list[str]:
    chat = given.session()
    first = show(question, chat.ask(question, images=given.images).text)
    question = "What are the similarities and differences between these two images."
    return [first, show(question, chat.ask(question).text)]


def batch(given: Setting) -> list[str]:
    """batch_chat(): a question about each picture, all at once; the server batches in flight."""
    question = "<image>\nDescribe the image in detail."
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda image: given.ask(question, image), given.images)
        return [show(question, answer.text) for answer in answers]


def video(given: Setting, num_frames: int = 8) -> list[str]:
    """The server takes the frames and writes `Frame1: <image>` and so on before the question."""
    chat = given.session(num_frames=num_frames)
    question = "What is the red panda doing?"
    first = show(question, chat.ask(question, videos=[given.video]).text)
    question = "Describe this video in detail."
    return [first, show(question, chat.ask(question).text)]


def long_video(given: Setting) -> list[str]:
    """As many frames as one request may have by default."""
    return video(given, num_frames=64)


def streaming(given: Setting) -> list[str]:
    question, text = "<image>\nPlease describe the image in detail.", ""
    print(f"User: {question}\nAssistant: ", end="")
    for chunk in given.client.stream(question, images=given.images[:1], **given.sampling):
        text += chunk.text
        print(chunk.text, end="", flush=True)
    print()
    return [text]


def lmdeploy_hello(given: Setting) -> list[str]:
    question = "describe this image"
    return [show(question, given.ask(question, given.images[0]).text)]


def lmdeploy_images(given: Setting) -> list[str]:
    question = "Image-1: <image>\nImage-2: <image>\ndescribe these two images"
    return [show(question, given.ask(question, *given.images).text)]


def lmdeploy_batch(given: Setting) -> list[str]:
    prompts = [("describe this image", image) for image in given.images]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: given.ask(*prompt), prompts))
    return [show(question, a.text) for (question, _), a in zip(prompts, answers, strict=True)]


def lmdeploy_chat(given: Setting) -> list[str]:
    """pipe.chat() with a GenerationConfig; the seed makes it repeatable."""
    chat = given.session(top_k=40, top_p=0.8, temperature=0.8, seed=1)
    first = show(
        "describe this image", chat.ask("describe this image", images=given.images[:1]).text
    )
    question = "What is the woman doing?"
    return [first, show(question, chat.ask(question).text)]


def lmdeploy_service(given: Setting) -> list[str]:
    """OpenAI's messages over HTTP, without our client; `curl` can do the same."""
    question = "describe this image"
    parts = [{"type": "text", "text": question}, {"type": "image"}]
    image = base64.b64encode(given.images[0]).decode()
    body = {
        "messages": json.dumps([{"role": "user", "content": parts}]),
        "images": [f"data:image/jpeg;base64,{image}"],
        "sampling_parameters": json.dumps({**given.sampling, "temperature": 0.8, "top_p": 0.8}),
    }
    url = f"http://{given.http_url}/v2/models/internvl/generate"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode()), timeout=300
        ) as reply:
            found = json.loads(reply.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        raise RequestFailed(f"{url}: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise ServerUnavailable(f"{url} cannot be reached: {error}") from error
    if found["error"]:
        raise RequestFailed(found["error"])
    return [show(question, found["text_output"].strip())]


EXAMPLES: dict[str, Callable[[Setting], list[str]]] = {
    example.__name__.replace("_", "-"): example
    for example in (
        pure_text,
        single_image,
        single_image_turns,
        combined_images,
        separate_images,
        batch,
        video,
        long_video,
        streaming,
        lmdeploy_hello,
        lmdeploy_images,
        lmdeploy_batch,
        lmdeploy_chat,
        lmdeploy_service,
    )
}


def show(question: str, answer: str) -> str:
    print(f"User: {question}\nAssistant: {answer}", flush=True)
    return answer


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clients.examples", description=__doc__.split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(EXAMPLES)}")
    parser.add_argument(
        "--image", nargs=2, default=list(map(str, IMAGES)), help="two picture files"
    )
    parser.add_argument("--video", default=str(VIDEO), help="a video file")
    parser.add_argument("--max-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="(%(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="(%(default)s)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in EXAMPLES:
            parser.error(f"there is no example {name!r}; there are: {', '.join(EXAMPLES)}")
    with Client(f"{args.host}:{args.grpc_port}") as client:
        setting = Setting(
            client,
            f"{args.host}:{args.http_port}",
            images=[read_file("--image", path) for path in args.image],
            video=read_file("--video", args.video),
            sampling={"max_tokens": args.max_tokens, "temperature": args.temperature},
        )
        for name in args.names or EXAMPLES:
            print(f"== {name}")
            EXAMPLES[name](setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
