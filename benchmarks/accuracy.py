"""How many answers of the running service are right, by kind of question, with intervals.

    python -m benchmarks.accuracy --model demo
    python -m benchmarks.accuracy --model demo --precision int4 --compare bf16.jsonl
    python -m benchmarks.accuracy --server 127.0.0.1:8001 --jsonl textvqa.jsonl

Asks the demo's generated questions, or those of a VQA-style file (benchmarks/vqa.py), greedily.
Without --server it builds MODEL, serves it on the CPU and stops it. A failed request counts as
wrong and is listed. exact: the answer is one of the right ones, with Wilson's 95 % interval.
ANLS: similarity to the closest right answer, with a bootstrap's.

--output is written answer by answer. After a run that was interrupted it holds the answers so far,
says so in its first line, and can be given to --compare all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.answer_scores import (
    anls,
    bootstrap_interval,
    exact_match,
    mcnemar_p,
    wilson_interval,
)
from benchmarks.markdown import markdown_table
from benchmarks.metrics import NoMetricValue
from benchmarks.running_service import running_service
from benchmarks.vqa import VqaQuestion, read_vqa, scene_questions
from internvl_triton.client import AsyncClient
from internvl_triton.errors import InvalidRequest, ServerError
from internvl_triton.program import program

__all__ = [
    "Result",
    "append_result",
    "ask_all",
    "check_output",
    "comparison_table",
    "measure",
    "read_results",
    "run_label",
    "score_table",
    "write_results",
]

ALL = "all"


@dataclass(frozen=True)
class Result:
    """One question's answer. `error` names why there is none; such an answer is wrong."""

    id: str
    kind: str
    group: str
    question: str
    answers: tuple[str, ...]
    given: str
    exact: bool
    anls: float
    error: str = ""


async def ask_all(
    client: AsyncClient,
    questions: Iterable[VqaQuestion],
    *,
    concurrency: int,
    max_tokens: int,
    progress: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Ask `concurrency` questions at a time. Results are in the order of the questions.

    on_result: gets each result when it is there, in any order.
    """
    from tqdm import tqdm

    waiting = enumerate(questions)
    taking = asyncio.Lock()
    results: dict[int, Result] = {}
    bar = tqdm(unit=" questions", disable=not progress)

    async def work() -> None:
        while True:
            async with taking:  # pictures are drawn in a thread, one question at a time
                taken = await asyncio.to_thread(next, waiting, None)
            if taken is None:
                return
            number, question = taken
            results[number] = await _ask(client, question, max_tokens)
            if on_result:
                on_result(results[number])
            bar.update()

    with bar:
        tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [results[number] for number in sorted(results)]


async def measure(
    client: AsyncClient,
    questions: Iterable[VqaQuestion],
    run: dict[str, Any],
    *,
    output: Path | None,
    concurrency: int,
    max_tokens: int,
    progress: bool = False,
) -> tuple[dict[str, Any], list[Result]]:
    """`run` with the served model's name, and the results of `ask_all`; `output` gets them too.

    When this ends early, `output` holds the results so far and a run that is not `finished`.
    """
    run = {"model": (await client.limits()).model, **run}
    if output:
        write_results(output, {**run, "finished": False}, [])
    try:
        results = await ask_all(
            client,
            questions,
            concurrency=concurrency,
            max_tokens=max_tokens,
            progress=progress,
            on_result=functools.partial(append_result, output) if output else None,
        )
    except BaseException:
        if output:
            print(f"the answers so far are in {output}", file=sys.stderr)
        raise
    if output:
        write_results(output, run, results)
    return run, results


async def _ask(client: AsyncClient, question: VqaQuestion, max_tokens: int) -> Result:
    request = question.request
    sampling = json.loads(request.sampling_parameters or "{}")
    given, error = "", ""
    try:
        answer = await client.generate(
            json.loads(request.messages) if request.messages else request.text_input or "",
            images=request.images,
            videos=request.videos,
            **{"max_tokens": max_tokens, **sampling},
        )
        given = answer.text
    except (InvalidRequest, ServerError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Result(
        id=question.id,
        kind=question.kind,
        group=question.group,
        question=question.text,
        answers=question.answers,
        given=given,
        exact=not error and exact_match(given, question.answers),
        anls=0.0 if error else anls(given, question.answers),
        error=error,
    )


def by_kind(results: Sequence[Result]) -> dict[str, list[Result]]:
    """All results under "all", then those of each kind, in the order in which kinds appear."""
    kinds: dict[str, list[Result]] = {ALL: list(results)}
    for result in results:
        kinds.setdefault(result.kind, []).append(result)
    return kinds if len(kinds) > 2 else {ALL: list(results)}


def score_table(results: Sequence[Result]) -> list[list[str]]:
    """Header, then one row of text per kind."""
    rows = [["kind", "asked", "exact", "95 %", "ANLS", "95 %", "failed"]]
    for kind, members in by_kind(results).items():
        right = sum(result.exact for result in members)
        scores = [result.anls for result in members]
        similar = _spread(scores, [result.group for result in members])
        rows.append(
            [
                kind,
                str(len(members)),
                _percent(right / len(members)),
                _range(wilson_interval(right, len(members))),
                _percent(sum(scores) / len(scores)),
                similar,
                str(sum(bool(result.error) for result in members)),
            ]
        )
    return rows


def comparison_table(ours: Sequence[Result], theirs: Sequence[Result]) -> list[list[str]]:
    """Header, then one row per kind, over the questions that both runs were asked.

    Raises InvalidRequest when they have no question in common.
    """
    known = {result.id: result for result in theirs}
    pairs = [(result, known[result.id]) for result in ours if result.id in known]
    if not pairs:
        raise InvalidRequest("the two runs have no question in common: nothing to compare")
    if any(one.answers != other.answers for one, other in pairs):
        raise InvalidRequest("the two runs have other answers to questions of the same id")
    head = ["kind", "both asked", "exact", "other", "only here", "only other", "McNemar p"]
    rows = [[*head, "exact - other", "95 %", "ANLS - other", "95 %", "same text"]]
    groups = {ALL: pairs}
    for pair in pairs:
        groups.setdefault(pair[0].kind, []).append(pair)
    for kind, members in groups.items() if len(groups) > 2 else [(ALL, pairs)]:
        only_here = sum(one.exact and not other.exact for one, other in members)
        only_other = sum(other.exact and not one.exact for one, other in members)
        pictures = [one.group for one, _ in members]
        exact = [float(one.exact) - float(other.exact) for one, other in members]
        similar = [one.anls - other.anls for one, other in members]
        count = len(members)
        rows.append(
            [
                kind,
                str(count),
                _percent(sum(one.exact for one, _ in members) / count),
                _percent(sum(other.exact for _, other in members) / count),
                str(only_here),
                str(only_other),
                f"{mcnemar_p(only_here, only_other):.3g}",
                _points(sum(exact) / count),
                _spread(exact, pictures, signed=True),
                _points(sum(similar) / count),
                _spread(similar, pictures, signed=True),
                _percent(sum(one.given == other.given for one, other in members) / count),
            ]
        )
    return rows


def check_output(path: Path) -> None:
    """Raises InvalidRequest if `write_results` could not write `path`. Leaves nothing behind."""
    problem: str | None = None
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not path.is_file():
            problem = "it is there and not a file"
        elif path.exists():
            path.open("r+b").close()
    except OSError as error:
        problem = error.strerror
    if problem:
        raise InvalidRequest(
            f"--output {path} cannot be written: {problem}; "
            "name a file in a folder that exists and can be written to"
        )


def write_results(path: Path, run: dict[str, Any], results: Sequence[Result]) -> None:
    """JSONL: first {"run": what was asked of whom}, then one result a line.

    Raises InvalidRequest if the file cannot be written; what it held before is left as it was.
    """
    unfinished = path.with_name(path.name + ".tmp")
    text = "".join(map(_line, [{"run": run}, *map(asdict, results)]))
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def append_result(path: Path, result: Result) -> None:
    """Add one result to a file of `write_results`. Raises InvalidRequest if that fails."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(asdict(result)))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `write_results` wrote. Raises InvalidRequest: the file is something else, no answer."""
    try:
        # Not str.splitlines(): U+2028 and others are written as they are inside of strings.
        lines = path.read_bytes().decode("utf-8").split("\n")
        first, *rest = [json.loads(line) for line in lines if line.strip()]
        run = dict(first["run"])
        results = [Result(**{**r, "answers": tuple(r["answers"])}) for r in rest]
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{path} was not written by --output of this benchmark, or the run was killed while it "
            "wrote; if the last line is cut off, delete that line"
        ) from error
    if not results:
        raise InvalidRequest(f"{path} holds no answer: its run ended before the first one")
    return run, results


def run_label(run: dict[str, Any], results: Sequence[Result]) -> str:
    """What a file of results is of, and that its run ended early if it did."""
    label = f"{run.get('model')} ({run.get('served')})"
    unfinished = f", which ended early, after {len(results)} answers"
    return label + unfinished if run.get("finished") is False else label


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _spread(values: Sequence[float], groups: Sequence[str], *, signed: bool = False) -> str:
    """The bootstrap interval, "-" where all questions are about one picture."""
    try:
        return _range(bootstrap_interval(values, groups), signed=signed)
    except NoMetricValue:
        return "-"


def _range(interval: tuple[float, float], *, signed: bool = False) -> str:
    low, high = (100 * bound for bound in interval)
    return f"{low:+.2f} .. {high:+.2f}" if signed else f"{low:.1f} - {high:.1f}"


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n{markdown_table(rows)}")


def _print_failures(results: Sequence[Result]) -> None:
    failed = [result for result in results if result.error]
    for error, count in Counter(result.error for result in failed).most_common():
        names = [result.id for result in failed if result.error == error]
        shown = ", ".join(names[:5]) + (", ..." if count > 5 else "")
        print(f"failed {count}x, counted as wrong: {error} [{shown}]")


def _print_wrong(results: Sequence[Result], limit: int) -> None:
    wrong = [result for result in results if not result.exact and not result.error]
    for result in wrong[:limit]:
        print(f"wrong  {result.id}: {result.question} -> {result.given!r}, right: {result.answers}")
    if len(wrong) > limit:
        print(f"... and {len(wrong) - limit} more wrong answers (--output lists all)")


async def _measure_service(
    grpc_url: str, questions: Iterable[VqaQuestion], run: dict[str, Any], args: argparse.Namespace
) -> tuple[dict[str, Any], list[Result]]:
    async with AsyncClient(grpc_url, timeout_s=args.timeout) as client:
        return await measure(
            client,
            questions,
            run,
            output=args.output,
            concurrency=args.concurrency,
            max_tokens=args.max_tokens,
            progress=sys.stderr.isatty(),
        )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="what to build and serve (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--precision", help="of the language model (the checkpoint's)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--server", metavar="HOST:PORT", help="ask this running gRPC endpoint")
    parser.add_argument("--examples", type=int, default=1000, help="scenes or clips (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (%(default)s)")
    parser.add_argument("--jsonl", type=Path, help="ask the questions of this VQA-style file")
    parser.add_argument("--concurrency", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="of a request, s (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write every answer to this JSONL file")
    parser.add_argument("--compare", type=Path, help="an earlier --output to compare with")
    parser.add_argument("--show-wrong", type=int, default=20, help="wrong answers (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.examples, args.concurrency, args.max_tokens) < 1:
        parser.error("--examples, --concurrency and --max-tokens must be at least 1")
    return args


@program()
def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.output:
        check_output(args.output)
    other = read_results(args.compare) if args.compare else None
    questions = (
        read_vqa(args.jsonl) if args.jsonl else scene_questions(args.examples, seed=args.seed)
    )
    asked = str(args.jsonl) if args.jsonl else f"{args.examples} scenes, seed {args.seed}"
    built = "a running server" if args.server else f"TP {args.tp_size}"
    if args.precision and not args.server:
        built += f", {args.precision}"
    run = {"served": built, "asked": asked, "max_tokens": args.max_tokens}
    with running_service(
        args.model,
        server=args.server,
        tp_size=args.tp_size,
        precision=args.precision,
        artifacts_dir=args.artifacts,
    ) as service:
        run, results = asyncio.run(_measure_service(service.grpc_url, questions, run, args))
    served = run["model"]
    _print_wrong(results, args.show_wrong)
    _print_failures(results)
    _print_table(f"{served} ({built}), {asked}", score_table(results))
    if other:
        title = f"{served} ({built}) and the other, {run_label(*other)}"
        _print_table(title, comparison_table(results, other[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
