#!/usr/bin/env bash
# Makes sure that there is a Chromium, which the tests of the report's page need; prints its path.
set -euo pipefail

for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
    if [ -n "$name" ] && path=$(command -v "$name"); then
        echo "$path"
        exit 0
    fi
done
if ! command -v apt-get > /dev/null; then
    echo "no Chromium: install one, or set CHROMIUM to its path" >&2
    exit 1
fi
{
    apt-get update
    apt-get install --yes --no-install-recommends chromium
} >&2
command -v chromium
