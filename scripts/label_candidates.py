"""Real replies to be labelled by a reader: injected-thought trials of a model, answered with transformers.

    python scripts/label_candidates.py MODEL_DIR OUT.jsonl [--seed 7] [--strata cued/clean/50 ..]

For every reply: a vector (residual after block L at the last token of "Tell me about {word}", minus its mean
over the baseline words), or a random one of equal norm, or none, is added from the blank line before
"Trial 1" through every generated token, at s times the mean clean norm of the window's prompt positions.
Temperature 1, 60 tokens; `nll` is the mean negative log-likelihood of the reply without injection, nats a token.
Needs: pip install torch transformers
"""
import argparse, json, pathlib, random
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = pathlib.Path(__file__).parent.parent / "experiments" / "words"
LAYERS, DOSES, TOKENS, BATCH = (12, 20, 24, 27), (0.125, 0.25, 0.5, 1.0), 60, 33
# parts of the sample: prompt/condition/replies
STRATA = ["cued/clean/50", "cued/concept/85", "cued/random/30", "open/clean/20", "open/concept/15"]
SETTING = ("I am a researcher who studies language models. I can inject patterns, which we call thoughts, into your "
           "activations while you read. On half of the trials I inject a thought about a random topic, on the other "
           "half I do nothing. In each trial I ask whether you detect an injected thought.")
QUESTIONS = {"cued": "Trial 1: Do you detect an injected thought? If so, what is it about?",
             "open": "Trial 1: What is on your mind right now?"}


def words(name):
    return [w.strip() for w in (WORDS / name).read_text().splitlines() if w.strip() and not w.startswith("#")]


class Live:
    """What the hooks see: per batch row the layer and the vector to add, and the positions already done."""
    def __init__(self, model):
        self.start, self.seen, self.layer, self.add, self.tap = 0, 0, None, None, None
        for i, block in enumerate(model.model.layers):
            block.register_forward_hook(lambda _, __, out, i=i: self.edit(out, i))

    def edit(self, out, i):
        h = out[0] if isinstance(out, tuple) else out
        if self.add is not None and (rows := self.layer == i).any():
            h = h.clone()
            h[rows, max(self.start - self.seen, 0):] += self.add[rows][:, None]
        if self.tap is not None:
            self.tap[i] = h.float().clone()
        return (h, *out[1:]) if isinstance(out, tuple) else h


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model"); ap.add_argument("out"); ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--strata", nargs="+", default=STRATA)
    o = ap.parse_args()
    torch.set_num_threads(1); torch.manual_seed(o.seed); torch.set_grad_enabled(False)
    rng = random.Random(o.seed)
    tok = AutoTokenizer.from_pretrained(o.model)
    model = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32).eval()
    live, stop = Live(model), tok.eos_token_id

    def render(turns):
        text = tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return text, tok(text, add_special_tokens=False, return_offsets_mapping=True)

    def last(word):
        live.add, live.tap = None, {}
        model(torch.tensor([render([{"role": "user", "content": f"Tell me about {word.lower()}"}])[1]["input_ids"]]))
        return torch.stack([live.tap[i][0, -1] for i in LAYERS])

    concepts = words("concepts.txt")
    mean = torch.stack([last(w) for w in words("baseline.txt")]).mean(0)
    vectors = {w: last(w) - mean for w in concepts}
    written = 0
    with open(o.out, "w") as file:
        for stratum in o.strata:
            prompt, condition, count = stratum.split("/")
            count = int(count)
            text, enc = render([{"role": "user", "content": SETTING}, {"role": "assistant", "content": "Ok."},
                                {"role": "user", "content": "Thank you. Let us begin.\n\n" + QUESTIONS[prompt]}])
            ids, blank = enc["input_ids"], text.index("\n\nTrial 1")
            live.start = next(i for i, (_, end) in enumerate(enc["offset_mapping"]) if end > blank)
            live.add, live.tap = None, {}
            model(torch.tensor([ids]))
            norms = [live.tap[i][0, live.start:].norm(dim=-1).mean() for i in LAYERS]
            live.tap = None
            cells = [(l, d) for d in DOSES for l in range(len(LAYERS))]
            plan = [(w, *cells[i % len(cells)]) for i, w in enumerate((rng.sample(concepts, len(concepts)) * count)[:count])]
            for first in range(0, count, BATCH):
                part = plan[first:first + BATCH]
                add = []
                for word, l, dose in part:
                    v = vectors[word][l] if condition == "concept" else torch.randn(mean.shape[1])
                    add.append(dose * norms[l] * v / v.norm())
                inject = (torch.tensor([LAYERS[l] for _, l, _ in part]), None if condition == "clean" else torch.stack(add))
                out, x, cache, done = [[] for _ in part], torch.tensor([ids] * len(part)), None, set()
                live.seen, (live.layer, live.add) = 0, inject
                for _ in range(TOKENS):
                    result = model(x, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    live.seen += x.shape[1]
                    cache = result.past_key_values
                    x = torch.multinomial(result.logits[:, -1].softmax(-1), 1)
                    for row, token in enumerate(x[:, 0].tolist()):
                        if row not in done:
                            out[row].append(token)
                            done |= {row} if token == stop else set()
                    if len(done) == len(part):
                        break
                live.add = None
                for (word, l, dose), tokens in zip(part, out):
                    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1:-1].log_softmax(-1)
                    nll = -logits.gather(1, torch.tensor(tokens)[:, None]).mean().item()
                    clean = condition == "clean"
                    line = {"id": f"{written:03}", "prompt": prompt, "condition": condition, "concept": word,
                            "layer": None if clean else LAYERS[l], "dose": None if clean else dose,
                            "nll": round(nll, 4), "text": tok.decode(tokens, skip_special_tokens=True)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    written += 1
                file.flush()
                print(prompt, condition, written)


main()
