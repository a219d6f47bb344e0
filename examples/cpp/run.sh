#!/usr/bin/env bash
# examples/cpp/run.sh [PYTHON]: exports the model, builds the program, runs it; fails where a result is not eager mode's.
# Needs a Python with torch and heedful installed, and g++ 10 or newer, which AOTInductor calls too.
set -euo pipefail
cd "$(dirname "$0")"

python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$work/cache

directory_of() { "$python" -c "import importlib.util as i; print(i.find_spec('$1').submodule_search_locations[0])"; }
torch=$(directory_of torch)
heedful=$(directory_of heedful)

# --no-as-needed: nothing in main.cpp names libheedful.so, and what export.py compiles asks for libtorch.so by name.
g++ -std=c++20 -isystem "$torch/include" main.cpp -o "$work/main" \
  -L"$heedful" -L"$torch/lib" -Wl,-rpath,"$heedful:$torch/lib" -Wl,--no-as-needed -lheedful -ltorch -ltorch_cpu -lc10 &
build=$!
"$python" export.py "$work"
wait $build
"$work/main" "$work/block.pt2" "$work/expected.pt"
