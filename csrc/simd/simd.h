// The one place where the instruction set that this translation unit is compiled for is picked.
#pragma once
#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(__SSE2__)
#include "sse2.h"
#elif defined(__aarch64__)
#include "neon.h"
#else
#include "portable.h"
#endif
