"""Makes tests/golden/vocabularies: small GGUF vocabularies with transformers' token ids, and texts cut before merging.

    python make_golden_vocabularies.py

    llama.gguf, gemma.gguf, phi3.gguf   SentencePiece vocabularies, written as llama.cpp's converter writes them
    tokens.json                         texts, their ids by transformers from those files, and what these decode to
    cuts.json                           texts, and where the pieces end into which each pre-tokenizer cuts them

Made again with the same sentencepiece, the files are the same.

Needs: transformers, sentencepiece, protobuf, gguf.
"""

import io
import json
from pathlib import Path

import sentencepiece
from gguf import GGUFWriter, TokenType
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from golden_texts import CHATS, PROMPTS, TEXTS

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "vocabularies"

# Beside TEXTS: blanks and line ends in every place, letters whose case is not simple, marks, and special tokens.
MORE = [
    "\n\t x", "x \n\ty  ", "\t\t\tx", "a\u00a0b\u2009c", "\u3000x", "\r\n\r\nx", "x\r", " \u2028 y", "\x0b\x0c", "\x85x",
    "'\u017f 'S 'LL 'Ve 'rE 'm'D", "it\u2019s I'M we'Ll", "HTTPServer getURLFor aB Ab ABc abC", "\u01c5ungla \u01c4 \u01c6",
    "\u00dcBER A\u00c9B \u00c9TAT \u00c5NGSTROM \u00efLE", "stra\u00dfe STRASSE \u1e9e", "e\u0301\u0301 E\u0301a a\u0327\u0301B", "\u0915\u094d\u0937\u093f \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0e01\u0e33 \u0e19\u0e49\u0e33", "\u0661\u0662\u0663\u0664 \u2167\u2168 \u00b2\u00b3\u00b9 \u2460\u2461", "12,345.678/90", "1a22b333c4444", "/a//b/\n/c", "?!\n\n!?/\n/ x",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 ok", "\U0001d400\U0001d41a\U0001d7ce", "\u02b0a \u02bbo \u30fc\u30fc\u30a2", "\u05d0\u05b7\u05d1 \u064e\u0645", "\ufb01 \u212b \u1100\u1161", "x\u0000y", "\u0001\u001f\u007f",
    "a  b   c    d     e      f       g        h         i", "    " * 5 + "x" + " " * 17, "\n\n\n x\n\n\n\n", "\u2581x \u2581\u2581 y\u2581", "\u2581",
    "\u2581\u2581\u2581 \u2581", "<0x41><0x0A>", "<s> <s>x</s> y", "[INST] hi [/INST]ok", "[INST]  two  [/INST]  two  ", "<bos>a<eos>", "<unk>", "a<unk>b",
    "<start_of_turn>user\nhi<end_of_turn>\n", "<table> x </table>", "x<|end|>\n  y", "<|user|>\nhi<|end|>\n<|assistant|>\n", " <|end|> ",
    "<|endoftext|> x", "x\n<|user|>   \n\t y",
]  # fmt: skip


def corpus():
    """Sentences in many scripts, with code and runs of blanks; some are frequent, so that merges have an order."""
    texts = [message["content"] for chat in PROMPTS for message in chat]
    texts += [message["content"] for chat in CHATS for message in chat["messages"]] + TEXTS
    words = " ".join(texts).split()
    for count in range(2, 12):
        texts += [" ".join(words[at : at + count]) for at in range(0, len(words), count + 1)]
    texts += [" " * count + "x" * (count % 3) for count in range(1, 24)] * 3
    return [text.replace("\0", "").replace("\r", "\n") for text in texts for _ in range(3)]


def train(size, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=0.98, num_threads=1, minloglevel=2, **settings,
    )  # fmt: skip
    return sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())


KINDS = {1: TokenType.NORMAL, 2: TokenType.UNKNOWN, 3: TokenType.CONTROL, 4: TokenType.USER_DEFINED, 5: TokenType.UNUSED,
         6: TokenType.BYTE}  # fmt: skip
ADDED_SCORE = -1000.0  # what the converter gives every token that tokenizer.json adds


def write(name, architecture, proto, added=(), **flags):
    """The pieces, the added control tokens, and padding to a whole number of 16."""
    tokens = [(piece.piece, piece.score, KINDS[piece.type]) for piece in proto.pieces]
    tokens += [(token, ADDED_SCORE, TokenType.CONTROL) for token in added]
    tokens += [(f"[PAD{at}]", ADDED_SCORE, TokenType.UNUSED) for at in range(len(tokens), -len(tokens) // 16 * -16)]
    if architecture.startswith("gemma"):
        tokens = [(t.replace("\u2581", " "), ADDED_SCORE, k) if k == TokenType.USER_DEFINED else (t, s, k) for t, s, k in tokens]
    writer = GGUFWriter(FOLDER / f"{name}.gguf", architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(proto.trainer_spec.bos_id)
    writer.add_eos_token_id(proto.trainer_spec.eos_id)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sentencepiece_vocabularies():
    proto = train(720, add_dummy_prefix=True, control_symbols=["[INST]", "[/INST]"])
    # As in Mistral's, pieces in the midst of the others have the least score: their order is not that of their ids.
    for piece in proto.pieces:
        if piece.type == 1 and len(piece.piece) > 1 and not piece.piece.strip("\u2581"):
            piece.score = -1e9
    write("llama", "llama", proto)
    roles = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    write("phi3", "phi3", proto, roles, add_bos_token=False, add_space_prefix=True)
    runs = ["\u2581" * count for count in range(2, 9)] + ["\n\n", "\n\n\n", "\t\t", "<table>", "</table>"]
    gemma = train(680, add_dummy_prefix=False, user_defined_symbols=runs, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
                  pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
                  control_symbols=["<start_of_turn>", "<end_of_turn>"])  # fmt: skip
    write("gemma", "gemma2", gemma, add_bos_token=True, add_space_prefix=False)
    return {"llama": proto, "phi3": proto, "gemma": gemma}


def reference(name):
    """transformers' tokenizer of a file, with what the model's own tokenizer.json says beyond a GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=f"{name}.gguf")
    if name == "gemma":
        runs = [AddedToken("\u2581" * count, normalized=False, special=False) for count in range(2, 9)]
        tokenizer.add_tokens(runs)
    if name == "phi3":
        keep = ("<unk>", "<s>", "<|endoftext|>")
        trimmed = [token for token in tokenizer.added_tokens_decoder.values() if token.content not in keep]
        tokenizer.add_tokens(
            [AddedToken(t.content, rstrip=True, normalized=False, special=True) for t in trimmed], special_tokens=True
        )
    return tokenizer


def tokens(protos):
    texts = list(dict.fromkeys(TEXTS + MORE))
    answers = {}
    for name, proto in protos.items():
        tokenizer = reference(name)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        decoded = [tokenizer.decode(line, skip_special_tokens=True) for line in ids]
        answers[name] = {"tokens": ids, "decoded": decoded}
        check_with_sentencepiece(name, proto, texts, ids)
    (FOLDER / "tokens.json").write_text(dump({"texts": texts, **answers}))


def check_with_sentencepiece(name, proto, texts, ids):
    """transformers and sentencepiece differ by design where a text starts with a blank or names special tokens."""
    own = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    marks = [piece.piece for piece in proto.pieces if piece.type in (2, 3, 4) and piece.piece.strip("\u2581")] + ["<|"]
    plain = [at for at, text in enumerate(texts) if not text.startswith((" ", "\u2581")) and not any(m in text for m in marks)]
    odd = [texts[at] for at in plain if own.encode(texts[at]) != ids[at]]
    print(f"{name}: {own.get_piece_size()} pieces, {len(plain)} texts by sentencepiece, {len(odd)} otherwise: {odd}")


def cuts():
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    kinds = {"gpt-2": gpt2, "olmo": gpt2, "smollm": digits, "command-r": digits}
    for name in ("llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"):
        kinds[name] = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    texts = [text for text in dict.fromkeys(TEXTS + MORE) if text]
    ends = {name: [piece_ends(cut, text) for text in texts] for name, cut in kinds.items()}
    (FOLDER / "cuts.json").write_text(dump({"texts": texts, "ends": ends}))


def piece_ends(cut, text):
    """In bytes."""
    return [len(text[:to].encode()) for _, (_, to) in cut.pre_tokenize_str(text)]


def dump(value):
    """One line an entry."""
    lines = [f"{json.dumps(key)}: {entries(part)}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def entries(part):
    if isinstance(part, dict):
        return "{" + ",\n".join(f"{json.dumps(key)}: {entries(value)}" for key, value in part.items()) + "}"
    return json.dumps(part, ensure_ascii=True, separators=(",", ":"))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokens(sentencepiece_vocabularies())
    cuts()
