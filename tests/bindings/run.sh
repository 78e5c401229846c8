#!/usr/bin/env bash
# usage: run.sh CALLER SOURCE_DIR LIBRARY WORKDIR: builds and runs a caller; 77 where its toolchain is missing.
set -euo pipefail
language=$1 source_dir=$2 library=$3 work=$4
library_dir=$(dirname "$library")

require() {
  command -v "$1" >/dev/null && return
  echo "Skipped: no $1 on this machine"
  exit 77
}

# apt brings NumPy to the system's own Python, which need not be the first on the PATH.
python_with_numpy() {
  local python
  for python in python3 /usr/bin/python3; do
    "$python" -c 'import numpy' 2>/dev/null && echo "$python" && return
  done
  echo python3
}

case $language in
  Rust)
    require rustc
    rustc --edition 2021 -L "native=$library_dir" -l adaattn -C "link-arg=-Wl,-rpath,$library_dir" \
      -o "$work/smoke_rust" "$source_dir/bindings/rust/smoke.rs"
    "$work/smoke_rust"
    ;;
  Go)
    require go
    export GOCACHE=$work/go-cache GOFLAGS=-mod=mod GO111MODULE=off CGO_ENABLED=1
    export CGO_CFLAGS="-I$source_dir/include" CGO_LDFLAGS="-L$library_dir -Wl,-rpath,$library_dir"
    go build -o "$work/smoke_go" "$source_dir/bindings/go/smoke.go"
    "$work/smoke_go"
    ;;
  Python)
    require python3
    python3 "$source_dir/bindings/python/smoke.py" "$library"
    ;;
  PythonModule)
    require python3
    "$(python_with_numpy)" "$source_dir/tests/bindings/python_module.py" "$library" "$source_dir"
    ;;
  PythonModuleOnCuda)
    require python3
    python3 "$source_dir/tests/bindings/python_torch.py" "$library" "$source_dir"
    ;;
  *) exit 64 ;;
esac
