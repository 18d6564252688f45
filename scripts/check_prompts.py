"""Compares the prompts of tests/golden/prompts with transformers: the same chats through the same templates.

    python3 scripts/check_prompts.py HF_FOLDER

HF_FOLDER holds the demo model's tokenizer (scripts/gguf_to_hf.py makes it). The protocols' texts are filled in
here anew, from the TOML files. Says how many prompts are equal, and ends with 1 where one is not.
"""

import json
import pathlib
import sys
import tomllib

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = "\uf8ff"


def messages(prompts, name, word, sentence):
    """The prompt's turns, and the text that its answer begins with."""
    own = prompts[name]
    of = {**prompts.get(own.get("like"), {}), **own}
    def fill(text):
        text = text.replace("{question}", of.get("question", ""))
        text = text.replace("{trial}", str(of.get("trial", 1)))
        return text.replace("{word}", word.lower()).replace("{sentence}", sentence)
    turns = [{"role": turn["role"], "content": fill(turn["text"])} for turn in of["turns"]]
    prefill = of.get("prefill")
    return turns, None if prefill is None else fill(prefill)


def render(tokenizer, template, turns, prefill):
    """Text, with the answer begun where there is a prefill."""
    options = {"chat_template": template, "tokenize": False}
    if prefill is None:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    turns = turns + [{"role": "assistant", "content": prefill + MARK}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=False, **options)
    return text[: text.index(MARK)]


def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    wrong = same = 0
    for path in sorted((ROOT / "tests/golden/prompts").glob("*.jsonl")):
        template = (ROOT / "tests/templates" / f"{path.stem}.jinja").read_text()
        for line in path.read_text().splitlines():
            want = json.loads(line)
            prompts = tomllib.loads((ROOT / "experiments" / f"{want['protocol']}.toml").read_text())["prompts"]
            turns, prefill = messages(prompts, want["prompt"], want["word"], want["sentence"])
            text = render(tokenizer, template, turns, prefill)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokens == want["tokens"]:
                same += 1
            else:
                wrong += 1
                print(f"{path.stem}, {want['protocol']}, {want['prompt']}: {text!r}")
    print(f"{same} prompts equal, {wrong} not")
    return 1 if wrong or not same else 0


if __name__ == "__main__":
    sys.exit(main())
