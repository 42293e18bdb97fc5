#!/bin/sh
# Starts app.py as Holoscan needs it: with a larger stack, and with libcudart.so.13, which requirements.txt installs.
set -eu
python=${PYTHON:-python}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$packages/nvidia/cu13/lib"
ulimit -S -s 32768  # KiB
exec "$python" "$(dirname "$0")/app.py" "$@"
