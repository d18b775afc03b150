// Small pieces that the other files share: bfloat16, powers of two, sums over a vector.
// Everything is written for AVX-512 and has one fixed order of operations, so equal inputs give equal bits.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int LANES = 16;   // float32 numbers in a vector
constexpr int BLOCK = 32;   // outputs in a block of a packed matrix
constexpr int GROUP = 32;   // inputs that share a scale
constexpr int TILE = 16;    // positions in a tile of the cache
constexpr float LOG2_E = 1.44269504088896340736f;

inline __m512 widen(__m256i halves) {  // 16 bfloat16 to float32
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m256i narrow(__m512 x) {  // 16 float32 to bfloat16, to nearest, ties to even
  return (__m256i)_mm512_cvtneps_pbh(x);
}

inline __m512 pair(const void* two_halves) {  // two neighbouring bfloat16 in every lane
  int32_t bits;
  std::memcpy(&bits, two_halves, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}

inline __m512 dot_pairs(__m512 sum, __m512 a, __m512 b) {  // sum + a0 b0 + a1 b1 in each lane
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// 2^x within 2 units of the last place; 0 below -149, infinity above 128. NaN stays NaN.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // the second operand is kept when it is NaN
  x = _mm512_min_ps(_mm512_set1_ps(200.f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);  // in [-1/2, 1/2]
  __m512 p = _mm512_set1_ps(1.5403530e-4f);     // Taylor: ln(2)^n / n!
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, whole);
}

inline __m512 silu(__m512 x) {
  const __m512 e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// 1 / sqrt(mean of squares + eps) of a row whose length is a multiple of 16.
inline float inverse_rms(const float* x, int64_t size, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += LANES) {
    const __m512 v = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return 1.f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / float(size) + eps);
}
