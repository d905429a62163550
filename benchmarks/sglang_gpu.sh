#!/usr/bin/env bash
# SGLang on one GPU where nothing can be fetched: wheels are brought along, in parts.
#
#   sglang_gpu.sh install DIR     one part of the wheels into a directory of its own (repeat)
#   sglang_gpu.sh run DATA [...]  every step of sglang_gpu.py; DATA as its --data; at most
#                                 SECONDS_LIMIT seconds (285)
#
# What of sglang is not as published, all for want of size and of no effect on gpt-oss here: its
# kernel package is carried for Hopper alone and without flash_ops, flashmla_ops and infllm_ops;
# flashinfer, xgrammar, soundfile and IPython are stubs (sglang_stubs/). Its own files are unpatched.
set -u
home=${SGLANG_HOME:-/tmp/sglang}
here=$(cd "$(dirname "$0")" && pwd)
started=$SECONDS

case ${1:-} in
install)
  part=$home/$(basename "$2")
  mkdir -p "$part"
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --root-user-action ignore \
    --target "$part" "$2"/*.whl || echo "install $2 FAILED"
  echo "install $2: $((SECONDS - started)) s, $(du -sm "$part" | cut -f1) MB"
  ;;
run)
  paths=$(printf '%s:' "$home"/*/)
  cat > "$home/python" <<EOF
#!/bin/sh
PATH=${paths//\/:/\/bin:}$PATH PYTHONPATH=$paths$here/sglang_stubs SGLANG_IS_FLASHINFER_AVAILABLE=false \\
  exec $(command -v python3) "\$@"
EOF
  chmod +x "$home/python"
  # the evaluating process keeps the machine's own transformers; it lacks pydantic
  mkdir -p "$home.own"
  for name in pydantic pydantic_core annotated_types typing_inspection; do
    cp -r "$home"/*/$name* "$home.own/" 2>/dev/null
  done
  cd "$here/.." || exit 1
  limit=${SECONDS_LIMIT:-285}
  PYTHONUNBUFFERED=1 PYTHONPATH=src:$home.own timeout -s INT -k 10 "$limit" \
    python3 benchmarks/sglang_gpu.py --python "$home/python" --data "$2" --out "${OUT:-$home/out}" \
    --seconds $((limit - 15)) ${@:3}
  echo "run: code $?, $((SECONDS - started)) s"
  ;;
*)
  sed -n '2,7p' "$0"
  exit 2
  ;;
esac
