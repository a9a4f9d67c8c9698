#!/usr/bin/env bash
# The core under the address, undefined-behaviour and thread sanitizers, and under valgrind where it is installed; every
# allocation fails once there too. CXX chooses the compiler, ISAS=avx2 restricts the instruction sets.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${BUILD_DIR:-build/sanitize}
run() {  # name, flags, arguments of the check
    cmake -S . -B "$out/$1" -DBATCHNORM_ONLY_CHECK=ON -DBATCHNORM_ISAS="${ISAS:-all}" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g $2" > /dev/null
    cmake --build "$out/$1" --parallel "${JOBS:-2}"
    "$out/$1/batchnorm_check" ${3:-}
}
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=die_after_fork=0  # the check forks on purpose, and its child makes threads
echo "== address and undefined behaviour"
run address "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
echo "== thread"
run thread "-fsanitize=thread" --brief
if command -v valgrind > /dev/null; then
    echo "== valgrind (it knows no AVX-512: it hides it, and the AVX2 and baseline kernels run)"
    run plain ""
    valgrind --quiet --error-exitcode=9 --leak-check=full "$out/plain/batchnorm_check" --brief
fi
