#!/bin/sh
# Everything to know from the first minutes on a GPU, in one command that ends inside 560 seconds:
#   load_tests/gpu/first_contact.sh [--smoke] [OUT]
# OUT (default load_tests/results/first-contact) gets results.jsonl, log.txt, triton-tests.xml and summary.md.
# PYTHON names the interpreter; WHEELS a folder of wheels to install for this run: of what the project needs, images for
# GPUs usually lack msgspec alone. VLLM names an unpacked wheel of vLLM, whose kernels then run beside ours.
# --smoke shows on a CPU that every step runs to its end.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
exec "$PYTHON" -m load_tests.gpu.first_contact "$@"
