"""The prompts that CLIP's zero-shot figures are published with."""

_WITH_ARTICLE = (
    "a bad photo of * {}.",
    "a sculpture of * {}.",
    "a photo of * hard to see {}.",
    "a low resolution photo of * {}.",
    "a rendering of * {}.",
    "graffiti of * {}.",
    "a cropped photo of * {}.",
    "a tattoo of * {}.",
    "* embroidered {}.",
    "a bright photo of * {}.",
    "a photo of * clean {}.",
    "a photo of * dirty {}.",
    "a dark photo of * {}.",
    "a drawing of * {}.",
    "* plastic {}.",
    "a photo of * cool {}.",
    "a close-up photo of * {}.",
    "a black and white photo of * {}.",
    "a painting of * {}.",
    "a pixelated photo of * {}.",
    "a jpeg corrupted photo of * {}.",
    "a blurry photo of * {}.",
    "a photo of * {}.",
    "a good photo of * {}.",
    "* {} in a video game.",
    "a doodle of * {}.",
    "* origami {}.",
    "a sketch of * {}.",
    "* toy {}.",
    "a rendition of * {}.",
    "a photo of * large {}.",
    "a photo of * nice {}.",
    "a photo of * weird {}.",
    "* cartoon {}.",
    "art of * {}.",
    "itap of * {}.",
    "* plushie {}.",
    "a photo of * small {}.",
)

_WITHOUT = (
    "a photo of many {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "itap of my {}.",
)

CLIP_TEMPLATES = (
    *(text.replace("*", article) for text in _WITH_ARTICLE for article in ("a", "the")),
    *_WITHOUT,
)
"""The 80 prompts for ImageNet ("itap": I took a picture); "a" before a vowel too, as published.

Source: Radford et al. (arXiv 2103.00020) section 3.1.4; OpenAI's CLIP, MIT licence, notebook
"Prompt Engineering for ImageNet".
"""

CLIP_SIMPLE_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The 7 of them that OpenAI's search chose; they do nearly as well. Source: the same notebook."""
