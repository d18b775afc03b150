// Rounding weights to 4 or 8 bits: for each group the scale with the smallest squared error among 26 clipping ratios and
// two least-squares fits, as modelwright.nn.lowbit searches it (the twin), at memory speed.
#pragma once
#include "cpu_math.h"

constexpr int NUM_RATIOS = 26;  // 1.00, 0.98, .. 0.50 of the largest weight

inline float to_half(float x) {  // to bfloat16 and back
  return _mm512_cvtss_f32(widen(narrow(_mm512_set1_ps(x))));
}

// One group of `size` weights (a multiple of 16): write q (-2^(bits-1) .. 2^(bits-1) - 1) and return the scale.
inline float round_group(const float* w, int64_t size, int bits, int8_t* best_q) {
  const float high = float((1 << (bits - 1)) - 1), low = -high - 1;
  __m512 top = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += LANES) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(w + i)));
  const float largest = _mm512_reduce_max_ps(top);
  float best_error = __builtin_inff(), best_scale = 1.f;
  const auto round16 = [&](int64_t i, __m512 inverse) {
    const __m512 q = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_loadu_ps(w + i), inverse), 0);
    return _mm512_min_ps(_mm512_max_ps(q, _mm512_set1_ps(low)), _mm512_set1_ps(high));
  };
  const auto offer = [&](float scale) {
    scale = to_half(scale);
    if (!(scale > 0.f)) scale = 1.f;
    const __m512 s = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.f / scale);
    __m512 error = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += LANES) {
      const __m512 off = _mm512_sub_ps(_mm512_mul_ps(round16(i, inverse), s), _mm512_loadu_ps(w + i));
      error = _mm512_fmadd_ps(off, off, error);
    }
    const float sum = _mm512_reduce_add_ps(error);
    if (sum < best_error) best_error = sum, best_scale = scale;
  };
  for (int r = 0; r < NUM_RATIOS; ++r) offer(largest * (float(1.0 - 0.02 * r) / high));
  for (int fit = 0; fit < 2; ++fit) {  // given q, the best scale is a least-squares fit
    __m512 qw = _mm512_setzero_ps(), qq = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += LANES) {
      const __m512 q = round16(i, _mm512_set1_ps(1.f / best_scale));
      qw = _mm512_fmadd_ps(q, _mm512_loadu_ps(w + i), qw);
      qq = _mm512_fmadd_ps(q, q, qq);
    }
    const float squares = _mm512_reduce_add_ps(qq);
    offer(_mm512_reduce_add_ps(qw) / (squares > 1e-30f ? squares : 1e-30f));
  }
  for (int64_t i = 0; i < size; i += LANES)
    _mm_storeu_si128((__m128i*)(best_q + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(round16(i, _mm512_set1_ps(1.f / best_scale)))));
  return best_scale;
}
