#!/usr/bin/env bash
# Everything that needs a GPU, in one go and in a few minutes: the tests marked `gpu`, speed, training throughput, a whole
# volume, training by torchrun (NCCL) that resumes. Needs no data set, and nothing from the network.
#
#   benchmarks/gpu.sh            # on a machine with one GPU: minutes, by estimate
#   benchmarks/gpu.sh --quick    # every part at its smallest, on a CPU, too
#
# OUT      folder of gpu.json and gpu.log (./gpu_output)
# WHEELS   folder of wheels of packages that the machine lacks (.wheels); none is needed where requirements.txt is installed
# PYTHON   interpreter (python3)
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_output} WHEELS=${WHEELS:-.wheels} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
"$PYTHON" -m benchmarks.gpu --output "$OUT/gpu.json" "$@" 2>&1 | tee "$OUT/gpu.log"
