"""Few-shot prompts: demonstrations of a task, then a query; and which demonstrations."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bridges.language import IMAGE_TOKEN
from bridges.model import VisionLanguageModel
from bridges.prompts import CAPTION_INSTRUCTION, END_OF_CHUNK, QUESTION, PromptEncoder

ANSWER = "{answer}"
"""Where a template takes the answer as it is, no space put before it; always at its end."""

OPENFLAMINGO_CAPTION = f"{IMAGE_TOKEN}Output:{ANSWER}"
OPENFLAMINGO_VQA = f"{IMAGE_TOKEN}Question:{QUESTION} Short answer:{ANSWER}"


@dataclass(frozen=True)
class Shot:
    """The text of a demonstration.

    Attributes:
        answer: what the model should have written.
        question: for a template that has ``{question}``.
    """

    answer: str
    question: str | None = None


@dataclass(frozen=True)
class FewShotPrompts:
    """Demonstrations ``<image>{prefix}{answer}<end of chunk>`` …, then ``<image>{prefix}``.

    Made by `of`. Questions and answers are data: special tokens in them are spelt out. BOS at the
    start of the prefix begins the whole once, as in a document, and no demonstration.

    Attributes:
        encode: of the model.
        prefix: what stands before an answer, with one image in it.
        literal: whether the answer follows as it is; else as a caption in training, with a space
            after text.
        bos: begin as a document in training does, see `PromptEncoder.bos`; else as a pair does,
            with BOS only if the tokenizer puts one by itself or the prefix has it.

    Source: Flamingo (arXiv 2204.14198) appendix A.2; the templates are OpenFlamingo's
        (arXiv 2308.01390).
    """

    encode: PromptEncoder
    prefix: str
    literal: bool = False
    bos: bool = True
    # A demonstration is tokenised once, however many prompts it is in.
    _known: dict[tuple[str, ...], list[int]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        model: VisionLanguageModel,
        template: str | None = None,
        *,
        bos: bool = True,
        max_answer: int = 64,
    ) -> "FewShotPrompts":
        """Prompts for a model.

        Args:
            model: the model.
            template: with ``<image>`` once, ``{question}`` if there are questions, and maybe
                ``{answer}`` at its end. The prompt of the model's own training by default, so that
                a demonstration looks like a sample that it was trained on.
            bos: see `FewShotPrompts`.
            max_answer: tokens of an answer, its end included; the rest is cut off.

        Raises:
            ValueError: a template with no image or several, or with text after the answer.
        """
        token = model.lm.image_token
        text = model.prompt if template is None else template.replace(IMAGE_TOKEN, token)
        prefix = text.removesuffix(ANSWER)
        if text.count(token) != 1 or ANSWER in prefix:
            raise ValueError(
                f"found template {text!r}; expected {token!r} in it once, and {ANSWER!r} at its "
                f"end or nowhere, e.g. {OPENFLAMINGO_CAPTION!r}"
            )
        return cls(model.prompt_encoder(max_answer), prefix, literal=prefix != text, bos=bos)

    @property
    def template(self) -> str:
        """The prefix, and ``{answer}`` where the answer follows as it is."""
        return self.prefix + ANSWER * self.literal

    def __call__(
        self, shots: Sequence[Shot], question: str | None = None, *, images: bool = True
    ) -> list[int]:
        """Token ids of the demonstrations and the query.

        Args:
            shots: in their order.
            question: the query's; for a template that has one, `CAPTION_INSTRUCTION` by default.
            images: whether the demonstrations have their images. Without them they are the
                text-only ones of a "0-shot" prompt; the query always has its own.
        """
        own = self.prefix.removeprefix(self._begin())
        prefix = own if images else own.replace(self.encode.image_token, "")
        if own != self.prefix:
            ids = self.encode.bos()
        elif self._holds_bos(own):  # elsewhere: BLIP-2 has it after each image
            ids = []
        else:
            ids = self.encode.bos() if self.bos else self._put()
        for shot in shots:
            ids = ids + self._head(prefix, shot.question) + self.answer(shot.answer, prefix)
        return ids + self._head(own, question)

    def answer(self, text: str, prefix: str | None = None, *, end: bool = True) -> list[int]:
        """Token ids of an answer.

        Args:
            text: the answer; what is longer than ``max_answer`` is cut off, see `cuts`.
            prefix: what it follows; by default what a query ends in.
            end: whether the end of a chunk follows it.
        """
        joined = self._joined(text, prefix)
        if (joined,) not in self._known:
            ids = self.encode.document([joined])[0][: self.encode.max_completion - 1]
            self._known[joined,] = ids + self.encode.document([END_OF_CHUNK])[0]
        return self._known[joined,] if end else self._known[joined,][:-1]

    def cuts(self, text: str) -> bool:
        """Whether an answer is so long that `answer` gives its beginning only."""
        ids = self.encode.document([self._joined(text, None)])[0]
        return len(ids) > self.encode.max_completion - 1

    def _joined(self, text: str, prefix: str | None) -> str:
        before = self.prefix if prefix is None else prefix
        return text if self.literal else self.encode.caption(before, text)

    def _head(self, prefix: str, question: str | None) -> list[int]:
        """Tokens of a prefix, its BOS left out unless it stands in the prefix itself."""
        asked = CAPTION_INSTRUCTION if question is None else question
        if (prefix, asked) not in self._known:
            shortened = self.encode.shortened(asked)
            ids: list[int] = self.encode([prefix], questions=[shortened]).input_ids[0].tolist()
            put = [] if self._holds_bos(prefix) else self._put()
            self._known[prefix, asked] = ids[len(put) :]
        return self._known[prefix, asked]

    def _begin(self) -> str:
        """Text of what a document begins with."""
        return "".join(self.encode.tokenizer.convert_ids_to_tokens(self.encode.bos()))

    def _put(self) -> list[int]:
        """What the tokenizer puts before ordinary text by itself."""
        return self.encode([""]).input_ids[0].tolist()

    def _holds_bos(self, prefix: str) -> bool:
        bos = self.encode.tokenizer.bos_token
        return bool(bos) and bos in prefix


def draw(seed: str, shots: int, allowed: Tensor) -> list[int]:
    """So many samples of a support set at random; with more shots, the same ones and further ones.

    Args:
        seed: of the query, so that another query is given others.
        shots: how many.
        allowed: bool (n), False where a sample must not be taken.

    Raises:
        ValueError: fewer samples than shots.
    """
    candidates: list[int] = allowed.nonzero()[:, 0].tolist()
    _check_enough(len(candidates), shots)
    random.Random(seed).shuffle(candidates)
    return candidates[:shots]


def most_similar(query: Tensor, support: Tensor, shots: int, allowed: Tensor) -> list[int]:
    """The samples of a support set that look most like a query, the most similar one LAST.

    Retrieval-based In-Context Example Selection (RICES), as Flamingo has it: a demonstration
    weighs more the nearer it stands to the query.

    Args:
        query: (d), see `pooled`.
        support: (n, d).
        shots: how many.
        allowed: bool (n), False where a sample must not be taken: at least the query's own picture.

    Raises:
        ValueError: fewer samples than shots.

    Source: Flamingo (arXiv 2204.14198) appendix A.2; Yang et al. (arXiv 2109.05014).
    """
    _check_enough(int(allowed.sum()), shots)
    similarity = (support @ query).masked_fill(~allowed, -torch.inf)
    ranked = similarity.argsort(descending=True, stable=True)
    return ranked[:shots].flip(0).tolist()


def pooled(patches: Tensor) -> Tensor:
    """Mean over the patches of each image, of length one: (n, p, d) -> (n, d), fp32."""
    return torch.nn.functional.normalize(patches.float().mean(dim=1), dim=-1)


def _check_enough(found: int, shots: int) -> None:
    if found < shots:
        raise ValueError(
            f"found {found} samples to demonstrate {shots} shots with, the query's own picture "
            "left out; expected at least as many: take a larger support set or fewer shots"
        )
