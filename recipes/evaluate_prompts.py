"""Questions and texts about held-out pictures, put to a bridge as its training puts them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from bridges import VisionLanguageModel
from bridges.fewshot import OPENFLAMINGO_VQA, FewShotPrompts
from bridges.prompts import QUESTION
from recipes.evaluate import HeldOut
from recipes.fewshot_plans import check_fits
from recipes.fewshot_runner import Prompt, Runner


@dataclass(frozen=True)
class Asker:
    """Puts prompts with one picture each to a bridge.

    Attributes:
        model: the bridge between its frozen ends.
        text: makes the prompts.
        patches: of every picture, (p, d), and last the mean of all.
        batch_size: prompts that go through the LM together.
    """

    model: VisionLanguageModel
    text: FewShotPrompts
    patches: Sequence[Tensor]
    batch_size: int

    @classmethod
    def of(
        cls, model: VisionLanguageModel, held_out: HeldOut, batch_size: int, *, asks: bool = False
    ) -> "Asker":
        """Prompts of the run's own training.

        Args:
            model: the bridge between its frozen ends.
            held_out: the pictures.
            batch_size: prompts that go through the LM together.
            asks: put questions. A run whose prompt has no place for one is asked as OpenFlamingo
                asks.
        """
        template = OPENFLAMINGO_VQA if asks and QUESTION not in model.prompt else None
        text = FewShotPrompts.of(model, template, bos=False)
        return cls(model, text, [*held_out.features, mean_picture(held_out)], batch_size)

    @property
    def mean(self) -> int:
        """The place of the mean picture."""
        return len(self.patches) - 1

    def write(self, asked: Sequence[tuple[int, str]], max_new_tokens: int, title: str) -> list[str]:
        """Greedy answers, up to the end of their line.

        Args:
            asked: places of pictures, and questions. What is asked twice is answered once.
            max_new_tokens: longest answer.
            title: of the progress bar.

        Raises:
            ValueError: a question that leaves the context no room.
        """
        prompts = {one: self._prompt(*one) for one in dict.fromkeys(asked)}
        check_fits(self.model, [prompt.ids for prompt in prompts.values()], 0, max_new_tokens)
        # Questions of like length go together, and need little padding.
        order = sorted(prompts, key=lambda one: len(prompts[one].ids))
        with self._progress(title, len(order)) as runner:
            said = runner.generate(
                [prompts[one] for one in order], max_new_tokens=max_new_tokens, do_sample=False
            )
        answers = dict(zip(order, said, strict=True))
        return [answers[one].split("\n")[0].strip() for one in asked]

    def score(self, places: Sequence[int], texts: Sequence[str], title: str) -> Tensor:
        """How likely each text is after each picture: (places, texts), in nats.

        Raises:
            ValueError: a text that leaves the context no room.
        """
        choices = [self.text.answer(text) for text in texts]
        prompts = [self._prompt(place, None) for place in places]
        check_fits(self.model, [prompts[0].ids], 0, max(map(len, choices)))
        # Texts of like length are scored together.
        order = sorted(range(len(texts)), key=lambda column: len(choices[column]))
        ordered = [choices[column] for column in order]
        with self._progress(title, len(prompts)) as runner:
            found = runner.score(prompts, [ordered] * len(prompts))
        scores = torch.stack([each for each, _ in found]).double()
        return scores[:, torch.tensor(order).argsort()]

    def _prompt(self, place: int, question: str | None) -> Prompt:
        return Prompt(self.text((), question), [place], question)

    @contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Runner]:
        with Progress(transient=True) as progress:
            advance = partial(progress.advance, progress.add_task(title, total=total))
            yield Runner(self.model, self.patches, self.batch_size, advance)


def mean_picture(held_out: HeldOut) -> Tensor:
    """What a blind model sees in the place of every picture: the mean of those asked about, (p, d).

    It says what they have in common, and nothing of any one of them.
    """
    return held_out.features.mean(dim=0)
