// Copies that leave the caches alone. Per instruction set, like simd.h.
#pragma once

namespace bn::BN_ISA {

inline void stream(void *to_, const void *from_, size_t bytes) {
    char *to = static_cast<char *>(to_);
    const char *from = static_cast<const char *>(from_);
#if defined(__SSE2__)
    size_t head = (64 - (reinterpret_cast<uintptr_t>(to) & 63)) & 63;
    if (head > bytes) head = bytes;
    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
        for (int i = 0; i < 64; i += 32)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(to + i),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i)));
#else
        for (int i = 0; i < 64; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i *>(to + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i)));
#endif
    }
#endif
    memcpy(to, from, bytes);
}

inline void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace bn::BN_ISA
