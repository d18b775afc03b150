// Attention over a paged cache whose blocks are stored ready for the dot-product instruction.
//
// A tile holds 16 positions of one key/value head: the keys as (H/2, 16, 2), then the values as (8, H, 2), bfloat16.
// One row is one query head of one token. A row walks through its keys in stretches of 64 that begin at multiples of 64
// (online softmax, float32 sums; Milakov and Gimelshein 2018). Its arithmetic is the same whoever stands beside it, so
// rows may be computed together as it pays: the heads of a group, the tokens of a prompt, and above all the requests
// that share a prefix, whose keys and values are then read from memory once for all of them.
#pragma once
#include "cpu_math.h"

constexpr int STRETCH = 4;      // tiles that a row looks at together
constexpr int MAX_TOGETHER = 4;  // rows computed together

struct Row {
  const uint16_t* q;     // (H) bfloat16, times the scale and log2(e)
  const int32_t* table;  // the tiles of the sequence, in order
  int64_t position;
  int64_t lowest;        // the first position that the row sees
  float largest, total;  // of the softmax so far
  float* out;            // (H) sum of values so far
};

struct Cache {
  uint16_t* tiles;
  int64_t num_kv_heads, head_dim;

  uint16_t* keys(int64_t tile, int64_t head) const { return tiles + (tile * num_kv_heads + head) * 2 * TILE * head_dim; }
  uint16_t* values(int64_t tile, int64_t head) const { return keys(tile, head) + TILE * head_dim; }

  void store(int64_t tile, int64_t head, int64_t place, const uint16_t* k, const uint16_t* v) const {
    uint16_t* to_k = keys(tile, head) + place * 2;  // pairs of numbers
    uint16_t* to_v = values(tile, head) + place / 2 * head_dim * 2;
    for (int64_t d = 0; d < head_dim; d += 2) std::memcpy(to_k + d * TILE, k + d, 4);
    // Every other place: the ones between are another position's, perhaps another thread's.
    const __mmask32 own = place % 2 ? 0xAAAAAAAA : 0x55555555;
    for (int64_t d = 0; d < head_dim; d += LANES) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + d)));
      _mm512_mask_storeu_epi16(to_v + d * 2, own, place % 2 ? _mm512_slli_epi32(wide, 16) : wide);
    }
  }
  // What a freed tile held must not reach an output: a masked key's value is multiplied by zero, and NaN survives that.
  void clear_values(int64_t tile, int64_t head) const { std::memset(values(tile, head), 0, TILE * head_dim * 2); }
};

inline void fetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }  // to the second cache: a stretch fills the first

// Scores of ROWS rows with 64 keys, hidden ones minus infinity: out[row][tile]. Meanwhile the `coming` keys are fetched.
template <int ROWS>
inline void score(const Row* rows, const uint16_t* const* keys, const uint16_t* const* coming, int64_t head_dim, int64_t start,
                  __m512 out[][STRETCH]) {
  __m512 s[ROWS][STRETCH];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < STRETCH; ++t) s[r][t] = _mm512_setzero_ps();
  for (int64_t d = 0; d < head_dim; d += 2) {
    __m512 k[STRETCH];
    for (int t = 0; t < STRETCH; ++t) k[t] = _mm512_loadu_ps(keys[t] + d * TILE), fetch(coming[t] + d * TILE);
    for (int r = 0; r < ROWS; ++r) {
      const __m512 q = pair(rows[r].q + d);
      for (int t = 0; t < STRETCH; ++t) s[r][t] = dot_pairs(s[r][t], k[t], q);
    }
  }
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < STRETCH; ++t) {
      const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(start + t * TILE)));
      const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(int(rows[r].position))) &
                             _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(int(rows[r].lowest)));
      out[r][t] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), s[r][t]);
    }
}

// Fetch the `coming` values, and add 64 weighted values to VECTORS x 16 numbers of each row's sum, which is first multiplied by `shrink`.
template <int ROWS, int VECTORS>
inline void add_values(Row* rows, const uint16_t* const* values, const uint16_t* const* coming,
                       const uint16_t (*weights)[STRETCH * TILE], const float* shrink, int64_t head_dim, int64_t from) {
  __m512 sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sum[r][v] = _mm512_mul_ps(_mm512_loadu_ps(rows[r].out + from + v * LANES), _mm512_set1_ps(shrink[r]));
  for (int t = 0; t < STRETCH; ++t)
    for (int j = 0; j < TILE / 2; ++j) {
      __m512 value[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        value[v] = _mm512_loadu_ps(values[t] + (j * head_dim + from + v * LANES) * 2);
        fetch(coming[t] + (j * head_dim + from + v * LANES) * 2);
      }
      for (int r = 0; r < ROWS; ++r) {
        const __m512 w = pair(weights[r] + t * TILE + j * 2);
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = dot_pairs(sum[r][v], value[v], w);
      }
    }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(rows[r].out + from + v * LANES, sum[r][v]);
}

// Let ROWS rows look at the 64 positions from `start` on; they share these tiles. `coming` are those looked at next.
template <int ROWS>
inline void look(Row* rows, const Cache& cache, int64_t head, int64_t start, const int32_t* tiles, const int32_t* coming) {
  const uint16_t *keys[STRETCH], *values[STRETCH], *next_keys[STRETCH], *next_values[STRETCH];
  for (int t = 0; t < STRETCH; ++t) {
    keys[t] = cache.keys(tiles[t], head), values[t] = cache.values(tiles[t], head);
    next_keys[t] = cache.keys(coming[t], head), next_values[t] = cache.values(coming[t], head);
  }
  __m512 s[ROWS][STRETCH];
  alignas(64) uint16_t weights[ROWS][STRETCH * TILE];
  float shrink[ROWS];
  score<ROWS>(rows, keys, next_keys, cache.head_dim, start, s);
  for (int r = 0; r < ROWS; ++r) {
    const __m512 top = _mm512_max_ps(_mm512_max_ps(s[r][0], s[r][1]), _mm512_max_ps(s[r][2], s[r][3]));
    const float before = rows[r].largest, now = _mm512_reduce_max_ps(top);
    rows[r].largest = now > before ? now : before;
    __m512 sum = _mm512_setzero_ps();
    for (int t = 0; t < STRETCH; ++t) {
      const __m512 w = exp2(_mm512_sub_ps(s[r][t], _mm512_set1_ps(rows[r].largest)));
      sum = _mm512_add_ps(sum, w);
      _mm256_store_si256((__m256i*)(weights[r] + t * TILE), narrow(w));
    }
    shrink[r] = _mm512_cvtss_f32(exp2(_mm512_set1_ps(before - rows[r].largest)));
    rows[r].total = rows[r].total * shrink[r] + _mm512_reduce_add_ps(sum);
  }
  int64_t d = 0;
  for (; d + 4 * LANES <= cache.head_dim; d += 4 * LANES) add_values<ROWS, 4>(rows, values, next_values, weights, shrink, cache.head_dim, d);
  for (; d < cache.head_dim; d += LANES) add_values<ROWS, 1>(rows, values, next_values, weights, shrink, cache.head_dim, d);
}

inline void look_together(Row* rows, int num_rows, const Cache& cache, int64_t head, int64_t start, const int32_t* tiles,
                          const int32_t* coming) {
  int r = 0;
  for (; r + 4 <= num_rows; r += 4) look<4>(rows + r, cache, head, start, tiles, r + 4 < num_rows ? tiles : coming);
  if (num_rows - r == 3) look<3>(rows + r, cache, head, start, tiles, coming);
  if (num_rows - r == 2) look<2>(rows + r, cache, head, start, tiles, coming);
  if (num_rows - r == 1) look<1>(rows + r, cache, head, start, tiles, coming);
}

// Attend for rows of one key/value head, neighbours being those that share most. `out` is cleared first.
inline void attend(Row* rows, int num_rows, const Cache& cache, int64_t head) {
  int64_t first = rows[0].lowest, last = 0;
  for (int r = 0; r < num_rows; ++r) {
    std::memset(rows[r].out, 0, cache.head_dim * sizeof(float));
    rows[r].largest = -__builtin_inff();
    rows[r].total = 0.f;
    first = rows[r].lowest < first ? rows[r].lowest : first;
    last = rows[r].position > last ? rows[r].position : last;
  }
  constexpr int64_t width = STRETCH * TILE;
  for (int64_t start = first / width * width; start <= last; start += width) {
    const auto looks = [&](const Row& row) { return row.position >= start && row.lowest < start + width; };
    const int64_t tile = start / TILE;
    for (int r = 0; r < num_rows;) {
      if (!looks(rows[r])) { ++r; continue; }
      const int32_t* tiles = rows[r].table + tile;
      int end = r + 1;
      while (end < num_rows && looks(rows[end]) && !std::memcmp(rows[end].table + tile, tiles, sizeof(int32_t) * STRETCH)) ++end;
      const int32_t* coming = tiles;
      if (end < num_rows && looks(rows[end])) coming = rows[end].table + tile;
      else if (end == num_rows && rows[0].position >= start + width) coming = rows[0].table + tile + STRETCH;
      look_together(rows + r, end - r, cache, head, start, tiles, coming);
      r = end;
    }
  }
  for (int r = 0; r < num_rows; ++r)
    for (int64_t d = 0; d < cache.head_dim; ++d) rows[r].out[d] /= rows[r].total;
}
