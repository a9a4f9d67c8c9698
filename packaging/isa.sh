#!/bin/sh
# Prints the best instruction set of this processor that the core knows, or "all" where it cannot tell.
# A build for this machine alone (make demo) compiles that one and is several times shorter.
[ "$(uname -m)" = x86_64 ] && [ -r /proc/cpuinfo ] || { echo all; exit 0; }
flags=" $(grep -m1 '^flags' /proc/cpuinfo | cut -d: -f2) "
has() { for f in "$@"; do case "$flags" in *" $f "*) ;; *) return 1 ;; esac; done; }
if ! has avx2 fma f16c; then echo baseline
elif ! has avx512f avx512bw avx512dq avx512vl; then echo avx2
elif has avx512_bf16; then echo avx512bf16
else echo avx512; fi
