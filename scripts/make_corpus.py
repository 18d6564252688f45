"""Makes the seeds of tests/corpus: small whole files of every kind that fuzzing starts from.

    python scripts/make_corpus.py

Headers are those of tests/golden with tiny tensors, or made by hand. Files that fuzzing found are not touched.
"""

import json
import struct
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
CORPUS = ROOT / "tests/corpus"
U32, F32, BOOL, TEXT, LIST, U64 = 4, 6, 7, 8, 9, 10
STRUCTS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd"))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save(kind, name, data):
    path = CORPUS / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


# GGUF


def packed(kind, value):
    if kind == TEXT:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    if kind == LIST:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(packed(inner, v) for v in values)
    return struct.pack("<" + STRUCTS[kind], value)


def gguf(metadata, tensors):
    """`metadata`: key to (type, value); `tensors`: (name, dimensions, type, data)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += packed(TEXT, key) + struct.pack("<I", kind) + packed(kind, value)
    data = b""
    for name, dimensions, kind, content in tensors:
        out += packed(TEXT, name) + struct.pack("<I", len(dimensions))
        out += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, len(data))
        data += content + bytes(-len(content) % 32)
    return out + bytes(-len(out) % 32) + data


def read_gguf(path):
    """Metadata and (name, dimensions) of a file."""
    data, at = path.read_bytes(), 8

    def number(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def value(kind):
        nonlocal at
        if kind == TEXT:
            length = number("Q")
            at += length
            return data[at - length : at].decode()
        if kind == LIST:
            inner, count = number("I"), number("Q")
            return inner, [value(inner) for _ in range(count)]
        return number(STRUCTS[kind])

    tensors, entries = number("Q"), number("Q")
    metadata = {}
    for _ in range(entries):
        key, kind = value(TEXT), number("I")
        metadata[key] = (kind, value(kind))
    records = []
    for _ in range(tensors):
        name = value(TEXT)
        records.append((name, [number("Q") for _ in range(number("I"))]))
        number("I"), number("Q")
    return metadata, records


def single(dimensions):
    count = 1
    for n in dimensions:
        count *= n
    return b"".join(struct.pack("<f", (n + 1) / 8) for n in range(count))


def one_block(path):
    """The first block of a golden model, its rows cut to one number; factors of rope whole."""
    metadata, records = read_gguf(path)
    for key, (kind, value) in metadata.items():
        if key.endswith(".block_count"):
            metadata[key] = (kind, 1)
        elif kind == LIST and key.endswith("sliding_window_pattern"):
            metadata[key] = (kind, (value[0], value[1][:1]))
    tensors = []
    for name, dimensions in records:
        if name.startswith("blk.") and not name.startswith("blk.0."):
            continue
        if len(dimensions) > 1:
            dimensions = [1, dimensions[1] if ".attn_" in name else min(dimensions[1], 24)] + [1] * len(dimensions[2:])
        elif name.startswith("blk.0.attn_"):
            dimensions = [min(dimensions[0], 24)]
        tensors.append((name, dimensions, 0, single(dimensions)))
    return gguf(metadata, tensors)


def byte_names():
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in plain] + [chr(0x100 + n) for n in range(68)]


def whole_model():
    """One block of Llama with a byte-level vocabulary and a chat template: it can be run."""
    tokens = ["<|bos|>", "<|im_start|>", "<|im_end|>", *byte_names(), "Ġt", "he", "Ġthe"]
    dim, ffn, vocab = 8, 6, len(tokens)
    metadata = {
        "general.architecture": (TEXT, "llama"),
        "llama.block_count": (U32, 1),
        "llama.context_length": (U32, 256),
        "llama.embedding_length": (U32, dim),
        "llama.feed_forward_length": (U32, ffn),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.head_count_kv": (U32, 1),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "tokenizer.ggml.model": (TEXT, "gpt2"),
        "tokenizer.ggml.pre": (TEXT, "smollm"),
        "tokenizer.ggml.tokens": (LIST, (TEXT, tokens)),
        "tokenizer.ggml.token_type": (LIST, (5, [3, 3, 3] + [1] * (vocab - 3))),
        "tokenizer.ggml.merges": (LIST, (TEXT, ["Ġ t", "h e", "Ġt he"])),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
        "tokenizer.chat_template": (TEXT, CHATML),
    }
    block = {
        "attn_norm": [dim],
        "ffn_norm": [dim],
        "attn_q": [dim, dim],
        "attn_k": [dim, 4],
        "attn_v": [dim, 4],
        "attn_output": [dim, dim],
        "ffn_gate": [dim, ffn],
        "ffn_up": [dim, ffn],
        "ffn_down": [ffn, dim],
    }
    shapes = {"output_norm.weight": [dim]} | {f"blk.0.{part}.weight": shape for part, shape in block.items()}
    tensors = [(name, shape, 0, single(shape)) for name, shape in shapes.items()]
    tensors.append(("token_embd.weight", [dim, vocab], 1, bytes(range(256)) * (2 * dim * vocab // 256 + 1)))
    tensors[-1] = (*tensors[-1][:3], tensors[-1][3][: 2 * dim * vocab])
    return metadata, tensors


def make_gguf():
    for path in sorted((GOLDEN / "gguf").glob("*.gguf")):
        save("gguf", path.name, one_block(path))
    metadata, tensors = whole_model()
    save("gguf", "whole_model.gguf", gguf(metadata, tensors))
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "t", "h", "e", "▁t", "he", "▁the", "▁▁", "  "]
    vocabulary = {
        "tokenizer.ggml.model": (TEXT, "llama"),
        "tokenizer.ggml.tokens": (LIST, (TEXT, pieces)),
        "tokenizer.ggml.scores": (LIST, (F32, [-float(n) for n in range(len(pieces))])),
        "tokenizer.ggml.token_type": (LIST, (5, [2, 3, 3, 6, 6, 6] + [1] * (len(pieces) - 7) + [4])),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.add_space_prefix": (BOOL, True),
        "tokenizer.chat_template": (TEXT, "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{% endfor %}"),
    }
    sizes = {key: value for key, value in metadata.items() if not key.startswith("tokenizer.")}
    save("gguf", "sentencepiece.gguf", gguf(sizes | {"llama.vocab_size": (U64, len(pieces))} | vocabulary, []))
    kinds = [(2, 32, 18), (3, 32, 20), (6, 32, 22), (7, 32, 24), (8, 32, 34), (10, 256, 84), (11, 256, 110)]
    kinds += [(12, 256, 144), (13, 256, 176), (14, 256, 210), (30, 1, 2)]
    blocks = [(f"blk.0.ffn_{kind}.weight", [values, 2], kind, bytes(range(size)) * 2) for kind, values, size in kinds]
    save("gguf", "quantised_rows.gguf", gguf(sizes | {"llama.vocab_size": (U64, 9)}, blocks))


# Safetensors


def safetensors(tensors, metadata=None, size=4):
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def make_safetensors():
    weights = {
        "model.embed_tokens.weight": ("BF16", [3, 2], bytes(12)),
        "model.norm.weight": ("F32", [2], single([2])),
        "lm_head.weight": ("BF16", [3, 2], bytes(12)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [1], bytes(4)),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": ("F16", [2, 2], bytes(8)),
    }
    save("safetensors", "weights.safetensors", safetensors(weights, {"format": "pt"}))
    nested = {
        "language_model.model.norm.weight": ("F32", [2], single([2])),
        "model.language_model.embed_tokens.weight": ("F32", [2, 2], single([2, 2])),
        "vision_tower.patch.weight": ("F32", [1], bytes(4)),
        "multi_modal_projector.x": ("F32", [1], bytes(4)),
    }
    save("safetensors", "nested.safetensors", safetensors(nested))
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    save("safetensors", "index.json", json.dumps(index))


# Vectors


def npy(header, data, version=1):
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def make_vectors():
    save("vectors", "set.safetensors", (GOLDEN / "plain/vectors.safetensors").read_bytes())
    plain = {"calm": ("F16", [4], bytes([0, 60] * 4)), "layers": ("BF16", [2, 4], bytes([128, 63] * 8))}
    save("vectors", "plain.safetensors", safetensors(plain))
    save("vectors", "width_8.safetensors", safetensors({"v": ("F32", [8], single([8]))}))
    head = "{'descr': '<f%d', 'fortran_order': %s, 'shape': %s, }"
    save("vectors", "single.npy", npy(head % (4, "False", "(2, 3)"), single([6])))
    save("vectors", "double.npy", npy(head % (8, "True", "(2,)"), struct.pack("<2d", 0.5, -2), version=2))
    save("vectors", "half.npy", npy(head % (2, "False", "(3,)"), bytes([0, 60] * 3), version=3))
    directions = [(f"direction.{layer}", [4], 0, single([4])) for layer in (1, 2, 10)]
    metadata = {"general.architecture": (TEXT, "controlvector"), "controlvector.layer_count": (U32, 3)}
    save("vectors", "control_vector.gguf", gguf(metadata, directions))


# Configurations, tokenizers, requests


def make_configs():
    for path in sorted(GOLDEN.glob("families/*/config.json")) + [GOLDEN / "plain/config.json"]:
        config = json.loads(path.read_text())
        config.pop("vision_config", None)
        save("config", f"{path.parent.name}.json", json.dumps(config))
    generation = {"eos_token_id": [1, 2], "temperature": 0.6}
    config = json.loads((GOLDEN / "plain/config.json").read_text())
    save("config", "with_generation.json", json.dumps(config) + "\0" + json.dumps(generation))


def added(id, content, special=True, **more):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": id, "content": content} | flags | more


def byte_level(**more):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | more


def template_processing(token):
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}},
    }


def tokenizer(model, **parts):
    absent = dict.fromkeys(["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"])
    return {"version": "1.0", "added_tokens": []} | absent | parts | {"model": model}


SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "byte_level": tokenizer(
        {"type": "BPE", "vocab": {t: n for n, t in enumerate(["<s>", "</s>", "Ġ", "t", "h", "e", "Ġt", "he", "Ġthe"])},
         "merges": [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]], "ignore_merges": True},
        added_tokens=[added(0, "<s>"), added(1, "</s>", lstrip=True, rstrip=True), added(9, "ship", special=False)],
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True}, byte_level(use_regex=False)]},
        post_processor={"type": "Sequence", "processors": [byte_level(), template_processing("<s>")]},
        decoder=byte_level(),
    ),
    "sentencepiece": tokenizer(
        {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
         "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "merges": ["▁ a"],
         "vocab": {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁": 3, "a": 4, "▁a": 5}},
        added_tokens=[added(0, "<unk>", normalized=True)],
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True}]},
        decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        post_processor=template_processing("<unk>"),
    ),
    "unigram": tokenizer(
        {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
         "vocab": [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["▁ab", -1.5], ["ship", -2.5]]},
        normalizer={"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ),
    "wordpiece": tokenizer(
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
         "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 3, "ship": 4, "##s": 5}},
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                    "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    ),
    "wordlevel": tokenizer(
        {"type": "WordLevel", "vocab": {"<unk>": 0, "The": 1, "ships": 2}, "unk_token": "<unk>"},
        pre_tokenizer={"type": "Whitespace"},
        normalizer={"type": "Lowercase"},
        decoder={"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    ),
}
TEMPLATES = {
    "chatml": CHATML,
    "headers": (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set loop_messages = messages[1:] %}{%- else %}"
        "{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
        "{%- for message in loop_messages %}{{- '<|h|>' + message['role'] + '\\n\\n' + message['content'] | trim }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|h|>assistant\\n\\n' }}{%- endif %}"
    ),
    "namespace": (
        "{%- macro turn(m) -%}[{{ m.role | upper }}]{{ m.content.strip().split('</think>')[-1].lstrip('\\n') }}{%- endmacro -%}"
        "{%- set ns = namespace(last=0, n=messages | length - 1) %}{%- for m in messages[::-1] %}"
        "{%- set index = (messages | length - 1) - loop.index0 %}{%- if m.role == 'user' and ns.last == 0 %}"
        "{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{%- if enable_thinking is defined and enable_thinking is false %}<think>\\n\\n</think>{%- endif %}"
        "{{ tools | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}{{ '%03d' | format(7) }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% elif m['role'] not in ['user', 'system'] %}{{ raise_exception('roles') }}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    ),
}


def make_tokenizers():
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHATML}
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATES["generation"]}]
    configs = [config, config | {"chat_template": named}, {}, {"unk_token": None}, {"pad_token": "<pad>"}]
    for (name, parsed), config in zip(TOKENIZERS.items(), configs):
        save("tokenizer", name, json.dumps(parsed, ensure_ascii=False) + "\0" + json.dumps(config))
    for name, source in TEMPLATES.items():
        save("tokenizer", f"template_{name}", "\0" + json.dumps({"bos_token": "<s>"}) + "\0" + source)


def for_tiny_model(request):
    """A request that `whole_model` can be asked: one block of width 8."""
    for injection in request.get("inject", []):
        injection |= {"vector": "width_8.safetensors#v", "layer": 0}
        injection.pop("vector_layer", None)
    for capture in request.get("capture", []):
        if isinstance(capture.get("layers"), list):
            capture["layers"] = [0]
    if "sampling" in request:
        request["sampling"]["max_tokens"] = 8
    return json.dumps(request)


def make_requests():
    paths = sorted((ROOT / "examples/requests").glob("*.jsonl"))
    for path in [*paths, GOLDEN / "plain/generate.jsonl"]:
        lines = [for_tiny_model(json.loads(line)) for line in path.read_text().splitlines()]
        save("requests", path.name if path in paths else "sampling.jsonl", "\n".join(lines[:6]))
    one = {
        "id": "all", "messages": [{"role": "user", "content": "the ship"}], "system": "", "prefill": "Ok",
        "thinking": "template", "n": 2, "stop": ["\n"], "logprobs": 3, "score": ["the", [5, 6]],
        "inject": [
            {"vector": {"width_8.safetensors#v": 0.5}, "layer": [0], "site": "resid_mid", "strength": 4, "op": "add",
             "strength_mode": "row", "from": {"start_of": {"text": "ship", "turn": "user.first", "nth": 1}},
             "to": "prompt_end", "vector_layer": 0},
            {"vector": [1, 0, 0, 0, 0, 0, 0, 2], "layer": 0, "strength": -1.5, "strength_mode": "reference", "from": -3},
            {"vector": "width_8.safetensors#v", "layer": 0, "strength": 1, "to": {"end_of": {"text": "the", "turn": 1}}},
        ],
        "capture": [{"site": "resid_post", "layers": "all", "positions": [0, -1]}, {"site": "logits", "positions": "last"}],
        "sampling": {"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "max_tokens": 9, "ignore_eos": True},
    }
    vector = "width_8.safetensors#v"
    hooks = {
        "id": "patched", "tokens": [1, 2, 3, 4, 5],
        "inject": [
            {"op": "clamp", "vector": vector, "layer": {"first": 0, "last": 0}, "min": -1, "max": 2, "keep_norm": True,
             "window": [{"at": 0}, {"from": 2, "to": {"generated": 2}, "every": 2}]},
            {"op": "project_out", "vector": vector, "layer": "all", "window": "generated",
             "when": {"vector": vector, "layer": 0, "site": "resid_pre", "measure": "coordinate", "above": 0.1, "latch": True}},
            {"op": "scale", "strength": 0, "site": "head_out", "layer": 0, "head": "all", "window": "prompt"},
            {"op": "replace", "layer": 0, "source": {"request": "other", "window": {"at": 1}}, "window": "last"},
            {"op": "add", "hook": "mlp_out_post.0", "source": {"request": "other", "site": "resid_pre"}, "window": "prompt"},
        ],
        "capture": [
            {"site": "resid_post", "layers": [0], "reduce": {"cosine": [vector, {vector: -1}]}},
            {"hook": "blocks.0.attn.hook_rot_k", "reduce": "mean"},
            {"site": "final_norm", "positions": "last", "reduce": "norm"},
            {"site": "resid_mid", "layers": [0], "reduce": {"lens": 3}},
        ],
        "sampling": {"max_tokens": 4},
    }  # fmt: skip
    other = {"id": "other", "tokens": [5, 4, 3, 2, 1], "inject": [{"vector": vector, "layer": 0, "strength": 1}]}
    save("requests", "hooks.jsonl", json.dumps(hooks) + "\n" + json.dumps(other) + "\n")
    save("requests", "everything.jsonl", json.dumps(one) + "\n" + json.dumps({"id": "b", "text": "the"}) + "\n")


for make in [make_gguf, make_safetensors, make_vectors, make_configs, make_tokenizers, make_requests]:
    make()
