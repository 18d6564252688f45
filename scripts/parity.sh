#!/bin/sh
# Compares inkling with Hugging Face transformers on a whole model, clean and injected:
#   f32: every row of the stream within 5e-5, of the logits within 1e-4;
#   bf16: mean worst-row error and the logits' KL not above those of transformers' own bf16.
#
#   scripts/parity.sh MODEL.gguf|HF_FOLDER [WORK_DIR]
#
# PYTHON: an interpreter with torch, transformers, safetensors, gguf (default python3).
# INKLING: the binary (default target/release/inkling).
set -eu
model=$1
work=${2:-target/parity}
python=${PYTHON:-python3}
inkling=${INKLING:-target/release/inkling}
scripts=$(dirname "$0")
mkdir -p "$work"

if [ -f "$model" ]; then
    folder=$work/hf
    [ -f "$folder/tokenizer.json" ] || "$python" "$scripts/gguf_to_hf.py" "$model" "$folder" --dtype float32
else
    folder=$model
fi
"$python" "$scripts/parity_requests.py" "$folder" "$work"
requests=$work/requests.jsonl
"$python" "$scripts/hf_reference.py" "$folder" "$requests" "$work/hf_f32.safetensors" --dtype float32
"$python" "$scripts/hf_reference.py" "$folder" "$requests" "$work/hf_bf16.safetensors" --dtype bfloat16
for dtype in f32 bf16; do
    "$inkling" forward --model "$model" --input "$requests" --out "$work/$dtype.safetensors" --dtype $dtype
done

status=0
echo "f32 against transformers' f32:"
"$python" "$scripts/compare.py" "$work/f32.safetensors" "$work/hf_f32.safetensors" || status=1
echo "bf16 against transformers' f32, and transformers' own bf16 against it:"
"$python" "$scripts/compare.py" "$work/bf16.safetensors" "$work/hf_f32.safetensors" \
    --not-worse-than "$work/hf_bf16.safetensors" || status=1
exit $status
