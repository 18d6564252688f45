"""Makes the GGUF fixtures of tests/golden/gguf: tiny models of tests/golden/families, converted by llama.cpp itself.

    python golden_gguf.py LLAMA_CPP_FOLDER [NAME ...]

LLAMA_CPP_FOLDER holds convert_hf_to_gguf.py. The models have no vocabulary: their files say only how large it is.
What `inkling` computes of them is compared with transformers' answers to the models that they were made of.

Needs: torch, transformers, safetensors, gguf.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
# One of every architecture, and of every kind of rope that the files know. (Of windows they tell less than a folder.)
NAMES = ["gemma2", "gemma3_nested", "llama_linear", "llama_llama3", "llama_yarn", "mixtral", "olmo2", "olmo3", "phi3",
         "phi3_longrope", "qwen2", "qwen3", "qwen3_moe"]  # fmt: skip


def without_vocabulary(model):
    model.gguf_writer.add_tokenizer_model("none")
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def convert(name):
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import LlamaFileType

    out = GOLDEN / "gguf" / f"{name}.gguf"
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / name
        shutil.copytree(GOLDEN / "families" / name, folder)
        hparams = ModelBase.load_hparams(folder, False)
        # Some converters count its entries.
        vocabulary = {str(i): i for i in range(hparams.get("text_config", hparams)["vocab_size"])}
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        made = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        made.set_vocab = without_vocabulary
        made(folder, LlamaFileType.MOSTLY_BF16, out).write()


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "gguf-py")]
    for name in sys.argv[2:] or NAMES:
        convert(name)


if __name__ == "__main__":
    main()
