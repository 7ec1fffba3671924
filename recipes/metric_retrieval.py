"""Recall at k, several captions to an image: images found for texts and texts for images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qformer.retrieval import KS, first, itc_similarity, recall_at
from recipes.metric_rows import PerImage

UNIT = 0.02
"""How far from 1 a norm may lie: rounded to bf16, a unit vector's does by less than a hundredth."""


class CaptionRecall(PerImage):
    """Recall at k in both directions, over all images and texts of all ranks.

    The similarity of an image with a text is the maximum over the image's vectors, see
    `qformer.retrieval`; of a model with one vector to an image, n is 1. An image may come from one
    rank, or one update, and its texts from another.

    Args:
        ks: the k's.
    """

    higher_is_better = True

    def __init__(self, ks: Sequence[int] = KS) -> None:
        super().__init__()
        self.ks = tuple(ks)
        # Flat, so that a rank that has seen nothing, nor knows the widths, has the same states.
        self.add_rows("image_values", dtype=torch.float32)
        self.add_rows("image_ids", dtype=torch.long)
        self.add_rows("text_values", dtype=torch.float32)
        self.add_rows("text_owners", dtype=torch.long)

    def update(
        self,
        image_embeddings: Tensor,
        image_ids: Tensor,
        text_embeddings: Tensor,
        text_owners: Tensor,
    ) -> None:
        """Adds images and texts.

        Args:
            image_embeddings: (b, n, e), L2-normalised.
            image_ids: long (b,), a number for each image that no other one has.
            text_embeddings: (m, e), L2-normalised.
            text_owners: long (m,), the number of the image that each text describes.

        Raises:
            ValueError: shapes that do not belong together, or vectors that are no unit vectors.
        """
        shapes = [tuple(x.shape) for x in (image_embeddings, text_embeddings)]
        if (
            image_embeddings.ndim != 3
            or text_embeddings.ndim != 2
            or image_embeddings.shape[-1] != text_embeddings.shape[-1]
            or image_ids.shape != image_embeddings.shape[:1]
            or text_owners.shape != text_embeddings.shape[:1]
        ):
            raise ValueError(
                f"found embeddings {shapes[0]} of images and {shapes[1]} of texts with "
                f"{tuple(image_ids.shape)} image numbers and {tuple(text_owners.shape)} owners; "
                "expected (b, n, e) and (m, e) with (b,) and (m,)"
            )
        for name, vectors in (("images", image_embeddings), ("texts", text_embeddings)):
            norms = vectors.float().norm(dim=-1)
            if ((norms - 1).abs() > UNIT).any():
                raise ValueError(
                    f"found {name} with norms of {norms.min():.3g} to {norms.max():.3g}; expected "
                    "unit vectors: pass them through torch.nn.functional.normalize(…, dim=-1)"
                )
        self.append("image_values", image_embeddings.flatten())
        self.append("image_ids", image_ids)
        self.append("text_values", text_embeddings.flatten())
        self.append("text_owners", text_owners)

    def compute(self) -> dict[str, float]:
        """``{"text_to_image_recall@1": …, … "image_to_text_recall@1": …}``, in 0…1.

        Raises:
            ValueError: no image or no text yet, an image twice, or a text without its image.
        """
        return {
            f"{direction}_{name}": value
            for direction, ranking in self._rankings().items()
            for name, value in recall_at(*ranking, self.ks).items()
        }

    def hits(self) -> dict[str, Tensor]:
        """Whether each row has a right column among its first k, for resampling.

        Returns:
            The keys of `compute` -> fp64, 0 or 1; (M,) in the order of the texts and (N,) in that
            of the images.
        """
        with self.sync_context():
            found = {}
            for direction, (scores, rows, columns) in self._rankings().items():
                right = columns[first(scores, max(self.ks))] == rows[:, None]
                for k in self.ks:
                    hit = right[:, :k].any(dim=1)
                    found[f"{direction}_recall@{k}"] = hit.double()
            return found

    def owners(self) -> Tensor:
        """The number of each text's image, (M,): the rows of `hits` that are resampled together."""
        with self.sync_context():
            return self.rows("text_owners")

    def _each(self) -> Tensor:
        """Share of each image's own texts that find it first."""
        scores, rows, columns = self._rankings()["text_to_image"]
        found = (columns[first(scores, 1)[:, 0]] == rows).double()
        mine = (rows[None, :] == columns[:, None]).double()
        return mine @ found / mine.sum(dim=1)

    def _rankings(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Direction -> scores (rows, columns), the image of each row, the image of each column."""
        ids, owners = self.rows("image_ids"), self.rows("text_owners")
        if not len(ids) or not len(owners):
            raise ValueError(
                f"found {len(ids)} images and {len(owners)} texts; expected some of both: call "
                "update() before compute()"
            )
        if repeated := len(ids) - len(ids.unique()):
            raise ValueError(
                f"found {repeated} of {len(ids)} image numbers more than once; expected each "
                "image once: let no sampler fill up the last batch with repeated images"
            )
        if lost := int((~torch.isin(owners, ids)).sum()):
            raise ValueError(
                f"found {lost} of {len(owners)} texts whose image is not there; expected the "
                "image of every text: give an image and its texts the same number"
            )
        texts = self.rows("text_values").view(len(owners), -1)
        images = self.rows("image_values").view(len(ids), -1, texts.shape[1])
        scores = itc_similarity(images, texts)
        return {"text_to_image": (scores.T, owners, ids), "image_to_text": (scores, ids, owners)}
