// Products of activation rows with a packed matrix, 32 outputs at a time.
//
//   y[r, o] = sum over groups g of  (sum_{i in g} q[o, i] a[r, i])  *  s[o, g] t[r, g]
//
// q: 4- or 8-bit weights with scale s; a: 8-bit activations with scale t, made by `quantize_row`. The inner sum is in
// whole numbers and exact; the outer one runs over the groups in order. So an output depends on its own row alone: not
// on the number of rows, nor on the thread that computes it. 16-bit weights are bfloat16, multiplied in pairs in order.
//
// A block holds 32 outputs, group after group, in the order in which it is read:
//   4 bits:  4 x (2 vectors of 16 outputs x 8 inputs: the first four in the low half of each byte), 32 bf16 scales
//   8 bits:  8 x (2 vectors of 16 outputs x 4 inputs), 32 bf16 scales
//   16 bits: 16 x (2 vectors of 16 outputs x 2 inputs)
// Weights are stored unsigned (q + 8, q + 128), as the instruction wants; `Rows.offset` takes the surplus out.
#pragma once
#include "cpu_math.h"

struct Matrix {
  const uint8_t* blocks;  // 64-byte aligned
  const float* bias;      // num_outs, or null
  int64_t num_ins;        // a multiple of 32
  int64_t num_outs;       // rounded up to a multiple of 32
  int64_t bits;           // 4, 8 or 16
};

struct Rows {        // activations as a matrix of some bits takes them
  int8_t* q;         // (rows, ins), for 4 and 8 bits
  float* scale;      // (rows, groups)
  int32_t* offset;   // (rows, groups): minus the sum of q times the weights' surplus
  uint16_t* halves;  // (rows, ins), for 16 bits
};

constexpr int64_t group_bytes(int64_t bits) { return bits == 16 ? BLOCK * GROUP * 2 : BLOCK * GROUP * bits / 8 + BLOCK * 2; }
constexpr int64_t block_bytes(int64_t bits, int64_t num_ins) { return num_ins / GROUP * group_bytes(bits); }

// Store 32 numbers as one group of a row: to the nearest of -127 .. 127 times the largest / 127.
inline void quantize_group(__m512 x0, __m512 x1, int64_t bits, int8_t* q, float* scale, int32_t* offset) {
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
  const __mmask16 unnumber = _mm512_cmp_ps_mask(x0, x1, _CMP_UNORD_Q);
  const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
  const __m512i i0 = _mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse));
  const __m512i i1 = _mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse));
  _mm_storeu_si128((__m128i*)q, _mm512_cvtsepi32_epi8(i0));
  _mm_storeu_si128((__m128i*)(q + LANES), _mm512_cvtsepi32_epi8(i1));
  *scale = unnumber ? __builtin_nanf("") : largest / 127.f;
  *offset = -(bits == 4 ? 8 : 128) * _mm512_reduce_add_epi32(_mm512_add_epi32(i0, i1));
}

// Store a row x * factor * weight (weight may be null) as the activations of a matrix of `bits`.
inline void quantize_row(const float* x, float factor, const float* weight, int64_t size, int64_t bits, Rows rows, int64_t row) {
  for (int64_t i = 0; i < size; i += GROUP) {
    __m512 v[2];
    for (int h = 0; h < 2; ++h) {
      v[h] = _mm512_mul_ps(_mm512_loadu_ps(x + i + h * LANES), _mm512_set1_ps(factor));
      if (weight) v[h] = _mm512_mul_ps(v[h], _mm512_loadu_ps(weight + i + h * LANES));
    }
    if (bits == 16) {
      for (int h = 0; h < 2; ++h) _mm256_storeu_si256((__m256i*)(rows.halves + row * size + i + h * LANES), narrow(v[h]));
    } else {
      const int64_t at = row * (size / GROUP) + i / GROUP;
      quantize_group(v[0], v[1], bits, rows.q + row * size + i, rows.scale + at, rows.offset + at);
    }
  }
}

inline __m512i four(const int8_t* a) {  // four neighbouring activations in every lane
  int32_t bits;
  std::memcpy(&bits, a, 4);
  return _mm512_set1_epi32(bits);
}

// One block times ROWS rows, to out (ROWS, 32). BITS 4 or 8.
template <int BITS, int ROWS>
inline void multiply_integers(const uint8_t* w, int64_t num_ins, const Rows& rows, int64_t first, int64_t ahead, float* out) {
  const int64_t num_groups = num_ins / GROUP;
  const int8_t* a = rows.q + first * num_ins;
  const float* scale = rows.scale + first * num_groups;
  const int32_t* offset = rows.offset + first * num_groups;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < num_groups; ++g, w += group_bytes(BITS), a += GROUP) {
    __m512i dot[ROWS][2];
    for (int r = 0; r < ROWS; ++r) dot[r][0] = dot[r][1] = _mm512_set1_epi32(offset[r * num_groups + g]);
    for (int step = 0; step < GROUP / 4; step += BITS == 4 ? 2 : 1) {
      if constexpr (BITS == 4) {
        const __m512i n0 = _mm512_load_si512(w + step * 64), n1 = _mm512_load_si512(w + step * 64 + 64);
        const __m512i w00 = _mm512_and_si512(n0, low), w01 = _mm512_and_si512(n1, low);
        const __m512i w10 = _mm512_and_si512(_mm512_srli_epi16(n0, 4), low);
        const __m512i w11 = _mm512_and_si512(_mm512_srli_epi16(n1, 4), low);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m512i x0 = four(a + r * num_ins + step * 4), x1 = four(a + r * num_ins + step * 4 + 4);
          dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], w00, x0);
          dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], w01, x0);
          dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], w10, x1);
          dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], w11, x1);
        }
      } else {
        const __m512i w0 = _mm512_load_si512(w + step * 128), w1 = _mm512_load_si512(w + step * 128 + 64);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m512i x = four(a + r * num_ins + step * 4);
          dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], w0, x);
          dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], w1, x);
        }
      }
    }
    if (ahead)
      for (int line = 0; line < group_bytes(BITS); line += 64) _mm_prefetch((const char*)w + line + ahead, _MM_HINT_T0);
    const uint8_t* scales = w + BLOCK * GROUP * BITS / 8;
    const __m512 s0 = widen(_mm256_load_si256((const __m256i*)scales));
    const __m512 s1 = widen(_mm256_load_si256((const __m256i*)(scales + 32)));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512 t = _mm512_set1_ps(scale[r * num_groups + g]);
      sum[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][0]), _mm512_mul_ps(s0, t), sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][1]), _mm512_mul_ps(s1, t), sum[r][1]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + r * BLOCK + h * LANES, sum[r][h]);
}

template <int ROWS>
inline void multiply_halves(const uint8_t* w, int64_t num_ins, const Rows& rows, int64_t first, int64_t ahead, float* out) {
  const uint16_t* a = rows.halves + first * num_ins;
  __m512 sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < num_ins; i += 2, w += 128) {
    const __m512 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + 64);
    if (ahead)
      for (int line = 0; line < 128; line += 64) _mm_prefetch((const char*)w + line + ahead, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512 x = pair(a + r * num_ins + i);
      sum[r][0] = dot_pairs(sum[r][0], w0, x);
      sum[r][1] = dot_pairs(sum[r][1], w1, x);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + r * BLOCK + h * LANES, sum[r][h]);
}

template <int ROWS>
inline void multiply_rows(const Matrix& m, const uint8_t* w, const Rows& rows, int64_t first, int64_t ahead, float* out) {
  if (m.bits == 4) multiply_integers<4, ROWS>(w, m.num_ins, rows, first, ahead, out);
  else if (m.bits == 8) multiply_integers<8, ROWS>(w, m.num_ins, rows, first, ahead, out);
  else multiply_halves<ROWS>(w, m.num_ins, rows, first, ahead, out);
}

struct RowTile {
  int64_t first;
  int count;
  int64_t ahead;  // fetch the block so many places further on; 0: none; -1: a little ahead in this one and beyond
};

constexpr int MAX_ROWS = 8;   // of a tile; reading a block once is worth the registers that 8 rows lack
constexpr int GOOD_ROWS = 6;  // 12 whole and 12 float sums, weights and a broadcast fit 32 registers
constexpr int64_t NEAR_BYTES = 128 << 10;  // of weights that many rows meet before the next weights come

// One block times up to MAX_ROWS rows beginning at `first`, bias added: out (num_rows, 32).
inline void multiply_block(const Matrix& m, int64_t block, const Rows& rows, const RowTile& tile, float* out) {
  const int64_t size = block_bytes(m.bits, m.num_ins), first = tile.first;
  const int64_t ahead = tile.ahead < 0 ? 4096 : tile.ahead * size;
  const uint8_t* w = m.blocks + block * size;
  const int num_rows = tile.count;
  switch (num_rows) {
    case 1: multiply_rows<1>(m, w, rows, first, ahead, out); break;
    case 2: multiply_rows<2>(m, w, rows, first, ahead, out); break;
    case 3: multiply_rows<3>(m, w, rows, first, ahead, out); break;
    case 4: multiply_rows<4>(m, w, rows, first, ahead, out); break;
    case 5: multiply_rows<5>(m, w, rows, first, ahead, out); break;
    case 6: multiply_rows<6>(m, w, rows, first, ahead, out); break;
    case 7: multiply_rows<7>(m, w, rows, first, ahead, out); break;
    default: multiply_rows<8>(m, w, rows, first, ahead, out);
  }
  if (!m.bias) return;
  for (int r = 0; r < num_rows; ++r)
    for (int i = 0; i < BLOCK; ++i) out[r * BLOCK + i] += m.bias[block * BLOCK + i];
}

// Call visit(block, tile) for blocks [begin, end) and all rows, in tiles of nearly equal height. A visit reads `num_bytes`
// of weights. Many rows go through several blocks tile by tile: a tile of rows is then read from the nearest cache, and
// the weights, which come in one stream, from the second. The last tile of rows fetches the blocks of the next round.
template <class Visit>
inline void each_tile(int64_t begin, int64_t end, int64_t num_rows, int64_t num_bytes, Visit visit) {
  if (num_rows == 0) return;
  if (num_rows <= MAX_ROWS) {
    for (int64_t block = begin; block < end; ++block) visit(block, RowTile{0, int(num_rows), -1});
    return;
  }
  const int64_t num_tiles = (num_rows + GOOD_ROWS - 1) / GOOD_ROWS, round = num_bytes < NEAR_BYTES ? NEAR_BYTES / num_bytes : 1;
  for (int64_t near = begin; near < end; near += round)
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t first = num_rows * t / num_tiles, past = num_rows * (t + 1) / num_tiles;
      for (int64_t block = near; block < near + round && block < end; ++block)
        visit(block, RowTile{first, int(past - first), t == num_tiles - 1 ? round : 0});
    }
}
