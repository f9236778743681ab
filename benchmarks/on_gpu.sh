#!/usr/bin/env bash
# What a GPU must show, in ten minutes: the tests that matter most there, and the speed of attention and of decoding.
#
#     benchmarks/on_gpu.sh [page to write]              PYTHON=python3: an interpreter with a CUDA build of torch
#
# Each part has a time limit, and one that fails or runs out of time stops no other. The page names the device and holds the last
# lines of each part; by default it is benchmarks/results/gpu-NAME.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if ! device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null) || [ -z "$device" ]; then
	echo "on_gpu.sh: torch sees no CUDA device; this asks questions about one" >&2
	exit 2
fi
page=${1:-benchmarks/results/gpu-$(echo "$device" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-').md}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
versions=$("$PYTHON" -c 'import torch, triton; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}")' 2>&1 | tail -1)
printf '# On %s\n\n%s, commit %s, %s.\n' "$device" "$versions" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$(date -u +%F)" >"$page"

failed=0
part() { # part SECONDS LINES TITLE COMMAND...
	local limit=$1 lines=$2 title=$3 begun=$SECONDS status=0
	shift 3
	timeout --kill-after 10 "$limit" "$@" >"$scratch/output" 2>&1 </dev/null || status=$?
	[ "$status" = 0 ] || failed=1
	local verdict="exit $status"
	[ "$status" = 0 ] && verdict=passed
	[ "$status" = 124 ] && verdict="stopped after $limit s"
	printf '\n## %s\n\n%s, %d s\n\n```\n' "$title" "$verdict" $((SECONDS - begun)) >>"$page"
	tail -n "$lines" "$scratch/output" >>"$page"
	printf '```\n' >>"$page"
	echo "$title: $verdict, $((SECONDS - begun)) s"
}

pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --no-header --tb short --maxfail 20 -m "not slow")
part 180 60 "The Triton kernels" "${pytest[@]}" --timeout 120 $(find tests -name test_triton.py)
part 90 60 "Kernels and transforms, tensors on the GPU" env FUNCATTN_DEVICE=cuda "${pytest[@]}" --timeout 60 \
	$(find tests -name test_flash.py -o -name test_kernels.py -o -name test_caches.py -o -name test_merging.py)
part 150 60 "Attention beside torch's kernels" "$PYTHON" benchmarks/attention_cuda.py --tokens 8192 --longest 8192 --sizes 64 128
part 120 40 "Decoding, and the share of memory bandwidth" "$PYTHON" benchmarks/decode.py --cuda
echo "written: $page"
exit $failed
