"""METEOR of captions, by its authors' own program."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from recipes.metric_texts import CaptionTexts

SEPARATOR = " ||| "
"""Between the fields of a line to the program."""

INSTALL = "pip install 'bridges[meteor]', and a Java runtime (8 or later) on the PATH"


class Meteor(CaptionTexts):
    """METEOR 1.5 of the corpus, English, in 0…1: matches by stem, synonym and paraphrase too.

    Needs pycocoevalcap (100 MB: the program and its tables) and Java, and 2 GB of memory while it
    runs, which takes some seconds before the first image.

    Args:
        jar: the program; that of pycocoevalcap by default.
        java: the runtime, by name or path.

    Raises:
        ImportError: no pycocoevalcap, or no Java.

    Source: Denkowski and Lavie 2014; pycocoevalcap's ``Meteor``.
    """

    higher_is_better = True

    def __init__(self, jar: Path | None = None, java: str = "java") -> None:
        super().__init__()
        self.jar = _packaged_jar() if jar is None else jar
        found = shutil.which(java)
        if found is None:
            raise ImportError(f"found no program {java!r}; METEOR needs Java: {INSTALL}")
        self.java = found
        self._last: tuple[list[list[list[str]]], Tensor] | None = None

    def compute(self) -> Tensor:
        """METEOR of the statistics of all images added up, fp64; not the mean of `per_image`.

        Raises:
            ValueError: no image yet.
            RuntimeError: the program failed.
        """
        return self._evaluate()[-1]

    def _each(self) -> Tensor:
        return self._evaluate()[:-1]

    def _evaluate(self) -> Tensor:
        """Scores of the images, and then that of the corpus."""
        images = self.captions()
        if not images:
            raise ValueError(
                "found no image; expected at least one: call update() before compute()"
            )
        if self._last is not None and self._last[0] == images:
            return self._last[1].to(self.device)
        with _running(self.java, self.jar) as ask:
            found = [ask(_line("SCORE", [*rights, text]), 1)[0] for text, *rights in images]
            scores = ask(SEPARATOR.join(["EVAL", *found]), len(images) + 1)
        self._last = images, torch.tensor(list(map(float, scores)), dtype=torch.float64)
        return self._last[1].to(self.device)


class _Program:
    """A conversation by lines."""

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self.process = process
        self.errors = errors

    def __call__(self, line: str, answers: int) -> list[str]:
        """Says a line, and waits for some."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        found = [self.process.stdout.readline() for _ in range(answers)]
        if not all(found):
            raise self._failure()
        return [answer.strip() for answer in found]

    def _failure(self) -> RuntimeError:
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()[-500:]
        return RuntimeError(
            f"METEOR's program ended with code {code} before it had answered; it said: {said!r}"
        )


@contextmanager
def _running(java: str, jar: Path) -> Iterator[_Program]:
    # Its data lies beside the jar.
    command = [java, "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command,
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        ) as process,
    ):
        try:
            yield _Program(process, errors)
        finally:
            process.kill()


def _line(command: str, texts: Sequence[Sequence[str]]) -> str:
    # A caption that holds the separator would be taken for two.
    fields = [" ".join(word for word in words if "|||" not in word) for words in texts]
    return SEPARATOR.join([command, *fields])


def _packaged_jar() -> Path:
    package = find_spec("pycocoevalcap")
    for folder in (package and package.submodule_search_locations) or ():
        if (jar := Path(folder, "meteor", "meteor-1.5.jar")).is_file():
            return jar
    raise ImportError(f"found no pycocoevalcap with METEOR's program in it: {INSTALL}")
