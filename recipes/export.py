"""`bridges export`: a trained run as a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from qformer.runs import is_stage1_run

if TYPE_CHECKING:
    from bridges import VisionLanguageModel


def main(arguments: Sequence[str]) -> None:
    """`bridges export --run RUN --out DIR`.

    Raises:
        ValueError: no run, files at `--out`, or something that HF's classes cannot hold.
    """
    parser = ArgumentParser(
        prog="bridges export",
        description="Writes a run as a Hugging Face folder: a stage-1 run as "
        "Blip2ForImageTextRetrieval, a run with a Q-Former as Blip2ForConditionalGeneration, or "
        "InstructBlipForConditionalGeneration if the Q-Former reads text, a run with gated "
        "cross-attention as IdeficsForVisionText2Text.",
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = vars(parser.parse_args(list(arguments)))
    export_run(options["run"], options["out"])


def export_run(run: Path, out: Path) -> None:
    """Writes a run as the Hugging Face folder that fits its kind. Errors as for `main`."""
    import bridges
    from gated_xattn import GatedXAttn
    from qformer.hf_export import export_blip2, export_retrieval
    from qformer.runs import load_stage1

    if is_stage1_run(run):
        left = export_retrieval(*load_stage1(run, device="cpu"), out)
        print(f"{out}: Blip2ForImageTextRetrieval")
        for name, reason in left.items():
            print(f"  without {name}: {reason}")
        return
    model = bridges.load(run, device="cpu")
    if isinstance(model.bridge, GatedXAttn):
        export_idefics(model, out)
    else:
        export_blip2(model, out)
    print(f"{out}: {_architecture(out)}")


def export_idefics(model: "VisionLanguageModel", folder: str | Path) -> None:
    """Writes ``IdeficsForVisionText2Text``, the tokenizer and, where it fits, the processor.

    Args:
        model: CLIP with all its tokens, a `GatedXAttn` with IDEFICS-1's settings around a
            `PerceiverResampler` with IDEFICS-1's (or the patches themselves), a Llama.
        folder: new, or empty.

    Raises:
        ValueError: something that HF's class cannot hold, or a folder with files in it.
    """
    from gated_xattn.hf_export import write_idefics
    from perceiver.official import idefics_form

    write_idefics(model, folder, idefics_form)


def _architecture(folder: Path) -> str:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["architectures"][0]
